"""What the methods that tune the image tower's normalisation on a batch of test images have in common.

Their answers depend on the images of the batch: the run hands them batches of the size in the settings, cut from its
seeded order, and the last one may be smaller. After each batch the tower is the teacher's own again, so that nothing
else of the stream matters.

LayerNorm is tuned, as the authors' transformers have it: every transformer of open_clip and timm, ConvNeXt and Swin. A
tower with BatchNorm alone, CLIP's ResNets and the embedded teacher, is refused unless ``norms=batch`` says that its
weights and biases are to be tuned; then its statistics stay those of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from apm.errors import UsageError, unknown
from apm.text.zeroshot import ZeroShotHead

from .base import Batch, Json, MethodOptions, Prediction, display_name, make_settings, settings_record
from .features import usable
from .prompted import gather
from .published import Published
from .towers import NORM_NAMES, TunableTower


@dataclass(frozen=True, kw_only=True)
class NormSettings:
    """Settings of every such method."""

    batch: int = 128
    """Images adapted to together."""
    steps: int = 10
    lr: float = 1e-3
    """Of Adam, made anew for each batch."""
    norms: str = "layer"
    """What is tuned: the weights and biases of LayerNorm (``layer``) or of BatchNorm (``batch``)."""

    def __post_init__(self) -> None:
        if self.batch < 1 or self.steps < 0:
            raise UsageError(f"batch must be 1 or more and steps 0 or more, not {self.batch} and {self.steps}.")
        if not self.lr > 0:
            raise UsageError(f"lr must be above 0, not {self.lr}.")
        if self.norms not in NORM_NAMES:
            raise unknown("norms", self.norms, NORM_NAMES)


PUBLISHED = Published(source="one setting and prompt for all data sets", prompts="single")


class NormTuned:
    """A method that tunes normalisation layers anew for each batch; what differs is the loss."""

    published = PUBLISHED
    stream = True
    gradients = True
    registered: ClassVar[str]
    """Its name in the registry."""
    settings_type: ClassVar[type[NormSettings]] = NormSettings

    def __init__(self, options: MethodOptions) -> None:
        self.name = display_name(self.registered, options)
        self._chosen = make_settings(self.settings_type, self.registered, options)
        self.settings: Mapping[str, Json] = settings_record(self._chosen)
        self.together = self._chosen.batch
        """How many images it wants in each batch."""

    def reset(self) -> None:
        """Nothing is kept from one batch to the next."""

    def predict(self, batch: Batch) -> Prediction:
        """Adapt to the batch, in parts of the settings' size, and classify it.

        An image whose token is zero or not finite has no answer and no part in the others'.
        """
        tower = TunableTower(batch.teacher, self.registered)
        start = tower.norm_parameters(self._chosen.norms)
        good = usable(batch.tokens().unsqueeze(1))
        rows: list[tuple[Tensor, dict[str, Tensor]]] = []
        if any(good):
            for pixels in batch.pixels()[torch.tensor(good)].split(self._chosen.batch):
                leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
                logits, figures = self.adapt(tower, leaves, pixels, batch)
                rows += [(row, {name: each[i] for name, each in figures.items()}) for i, row in enumerate(logits)]
        return gather(good, len(batch.head.features), rows)

    def adapt(
        self, tower: TunableTower, leaves: Mapping[str, Tensor], pixels: Tensor, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Tune the leaves in place, by name, on images (B, 3, H, W): their logits (B, C), and figures (B,) of each."""
        raise NotImplementedError

    def optimiser(self, leaves: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        """Adam with no memory of other images."""
        return torch.optim.Adam(list(leaves.values()), lr=self._chosen.lr)


def logits_of(tower: TunableTower, leaves: Mapping[str, Tensor], pixels: Tensor, head: ZeroShotHead) -> Tensor:
    """What the tuned tower says of images (B, 3, H, W): (B, C)."""
    return head.logit_scale * tower.features(pixels, leaves) @ head.features.T
