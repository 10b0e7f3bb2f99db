"""CLIPArTT (Hakim et al., 2024): a batch is tuned towards texts that name each image's few best classes at once.

For every image a text is made of its three most probable classes, "a photo of a cat or dog or fox.". The batch's images
and these texts then say how much each image is like every other, and the batch's image–text predictions are drawn to
that. The normalisation layers of the image tower are tuned; texts are made anew at every step; everything is reset
before the next batch. The texts have the run's prompts, as all methods have; with several, their features are averaged
as for the classes. See `norm_tuned` for which towers it works with.

The likeness is held constant in a step. What the authors write as a temperature of 0.01 is the teacher's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from apm.errors import UsageError
from apm.text.zeroshot import encode_labels

from .base import Batch
from .norm_tuned import NormSettings, NormTuned, logits_of
from .prompted import gradient
from .towers import TunableTower, set_gradients


@dataclass(frozen=True, kw_only=True)
class CLIPArTTSettings(NormSettings):
    """The published settings."""

    classes: int = 3
    """How many classes an image's text names; no more than there are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes < 1:
            raise UsageError(f"CLIPArTT's classes must be 1 or more, not {self.classes}.")


class CLIPArTT(NormTuned):
    """Pull a batch's image–text predictions towards its own similarities, then classify the batch.

    The extras ``loss_first`` and ``loss_last`` are the loss before the first step and before the last, the same for
    all images of a batch.
    """

    registered = "clipartt"
    settings_type = CLIPArTTSettings
    _chosen: CLIPArTTSettings

    def adapt(
        self, tower: TunableTower, leaves: Mapping[str, Tensor], pixels: Tensor, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `NormTuned.adapt`."""
        head, optimiser = batch.head, self.optimiser(leaves)
        losses: list[Tensor] = []
        known: dict[tuple[int, ...], Tensor] = {}
        for _ in range(self._chosen.steps):
            features = tower.features(pixels, leaves)
            best = head.logits(features).topk(min(self._chosen.classes, len(head.features)), dim=1).indices
            text = _texts(batch, best.tolist(), known)
            losses.append(likeness_step(tower, leaves, pixels, features, text, head.logit_scale))
            optimiser.step()
        return logits_of(tower, leaves, pixels, head), loss_figures(losses, len(pixels))


def _texts(batch: Batch, best: list[list[int]], known: dict[tuple[int, ...], Tensor]) -> Tensor:
    """The features (B, D) of texts that name these classes; each text is encoded once and kept in `known`."""
    wanted = [tuple(row) for row in best]
    if new := [row for row in dict.fromkeys(wanted) if row not in known]:
        names = tuple(" or ".join(batch.head.labels[index] for index in row) for row in new)
        features = encode_labels(batch.teacher, names, batch.head.templates or ("a photo of a {}.",))
        known.update(zip(new, features.to(batch.head.features.device), strict=True))
    return torch.stack([known[row] for row in wanted])


def likeness_step(
    tower: TunableTower,
    leaves: Mapping[str, Tensor],
    pixels: Tensor,
    features: Tensor,
    text: Tensor,
    scale: float,
) -> Tensor:
    """Give the leaves the gradients of `likeness_loss` and return the loss.

    The loss ties all images together: its slope in their features comes first, and is then pulled back a few images at
    a time, so that memory does not grow with the batch.
    """
    slope = gradient(lambda images: likeness_loss(images, text, scale), features)
    _, gradients = tower.gradients(
        pixels, list(leaves.values()), lambda: leaves, lambda rows, at: (rows * slope[at]).sum()
    )
    set_gradients(leaves.values(), gradients)
    return likeness_loss(features, text, scale)


def likeness_loss(images: Tensor, texts: Tensor, scale: float) -> Tensor:
    """Cross-entropy of image–text predictions with the mean similarity among images and among texts.

    Args:
        images: (B, D) of unit length.
        texts: (B, D) of unit length, one for each image.
        scale: of the teacher's logits.

    Returns:
        A scalar: −1/B · Σ_ij Q_ji · log softmax_j(scale·I_i·T_j), where Q is the row-wise softmax of
        scale·(I·Iᵀ + T·Tᵀ)/2, a constant.
    """
    likeness = ((images @ images.T + texts @ texts.T) / 2).detach()
    target = (scale * likeness).softmax(dim=1).T
    return -(target * (scale * images @ texts.T).log_softmax(dim=1)).sum() / len(images)


def loss_figures(losses: list[Tensor], images: int) -> dict[str, Tensor]:
    """The first and the last of the losses, for each of the images."""
    if not losses:
        return {}
    return {name: loss.expand(images) for name, loss in (("loss_first", losses[0]), ("loss_last", losses[-1]))}
