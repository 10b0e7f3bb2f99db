"""How GLOM learns from images alone (Hinton 2021, sections 2 and 8).

Denoising: some places of an image are hidden, and their pixels are read from one level's embeddings after half the
steps or more. Contrast: at every place and level, what the nets say bottom-up and top-down is to resemble the embedding
that all opinions together came to, more than it resembles those of other places and other images. Places that already
agree do not repel each other: they are on their way to be one island.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, einsum
from torch.nn import functional as F

from apm.glom.config import GLOMConfig, GLOMTraining
from apm.glom.model import GLOM, Opinions
from apm.pretrain.checkpoint import Network, read_network
from apm.pretrain.loop import Trainer, parts


def shapes(config: GLOMConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by name, without making any."""
    with torch.device("meta"):
        model = GLOM(config, seed=None)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


NETWORK = Network("glom", "apm glom train", GLOMConfig, shapes, lambda sizes, seed: GLOM(sizes, seed=seed))


def denoising_errors(model: GLOM, embeddings: Tensor, images: Tensor, hidden: Tensor) -> Tensor:
    """Mean squared error (B,) of the pixels predicted for the hidden locations.

    Args:
        model: whose `pixels` reads them.
        embeddings: of one level (B, N, D).
        images: whole ones (B, 3, S, S), normalised.
        hidden: which places (B, N); at least one of each image.
    """
    errors = (model.pixels(embeddings) - model.patches(images)).square().mean(-1)  # (B, N)
    return (errors * hidden).sum(1) / hidden.sum(1)


def contrast(said: Tensor, settled: Tensor, *, temperature: float, agree: float) -> Tensor:
    """Cross-entropy of identifying each of M columns' own embedding among all M from a net's prediction there.

    Embeddings whose cosine, the mean of the M taken out, reaches `agree` are left out as false answers. The gradient
    goes into what is said alone, so that nets follow where the columns settled and not the reverse.

    Args:
        said: opinions of one net, (M, L, D).
        settled: embeddings that all opinions came to, (M, L, D).
        temperature: of the softmax over cosines.
        agree: in [-1, 1].

    Returns:
        The mean over columns and levels; 0 where all agree.
    """
    settled = settled.detach()
    directions = F.normalize(settled, dim=-1)
    cosines = einsum("mld,nld->lmn", F.normalize(said, dim=-1), directions)  # (L, M, M)
    centred = F.normalize(settled - settled.mean(0), dim=-1)
    alike = einsum("mld,nld->lmn", centred, centred) >= agree  # (L, M, M)
    own = torch.eye(len(said), dtype=torch.bool, device=said.device)  # (M, M)
    logits = (cosines / temperature).masked_fill(alike & ~own, -torch.inf)
    return -logits.log_softmax(-1).diagonal(dim1=1, dim2=2).mean()


class GLOMTrainer(Trainer):
    """GLOM, trained on the images in a cache."""

    network = NETWORK
    model: GLOM
    config: GLOMTraining

    def check(self, sizes: GLOMConfig) -> None:
        """Refuse a level to read from that the network does not have."""
        self.config.check_level(sizes)

    def losses(
        self, numbers: NDArray[np.int64], hidden: NDArray[np.bool_], columns: NDArray[np.int64], *, steps: int
    ) -> tuple[Tensor, Tensor]:
        """Denoising error of each image (B,), and the contrast of bottom-up and top-down together.

        Args:
            numbers: of the images in the cache, B of them.
            hidden: places (B, N) that the columns do not see.
            columns: numbers, among the B · N, of those that are contrasted.
            steps: after which both are taken.
        """
        images, mask = self.cache.inputs(numbers).to(self.device), torch.from_numpy(hidden).to(self.device)
        embeddings, opinions = settle(self.model, hide(self.model, images, mask), steps)
        errors = denoising_errors(self.model, embeddings[:, :, self.config.read_level], images, mask)
        drawn = torch.from_numpy(columns).to(self.device)
        settled, *said = (
            rearrange(one, "b n l d -> (b n) l d")[drawn] for one in (embeddings, opinions.bottom_up, opinions.top_down)
        )
        how = {"temperature": self.config.temperature, "agree": self.config.agree}
        terms = [contrast(said[0], settled, **how)]
        if self.model.top_down is not None and self.model.config.levels > 1:
            terms.append(contrast(said[1][:, :-1], settled[:, :-1], **how))  # nothing is above the highest level
        return errors, torch.stack(terms).mean()

    @torch.no_grad()
    def held_out_losses(self) -> dict[str, float]:
        """Denoising error and contrast over the held-out images after all steps, in float32."""
        errors, contrasts = [], []
        model, size = self.model.config, self.config.batch_size
        for number, part in enumerate(parts(self.held_out, size)):
            draw = (1, number * size)
            hidden = self.config.hidden_places(len(part), model.places, draw=draw)
            columns = self._columns(len(part), *draw)
            error, contrasted = self.losses(part, hidden, columns, steps=self.config.settling or model.steps)
            errors.append(error)
            contrasts.append(contrasted * len(part))
        contrast_mean = torch.stack(contrasts).sum() / len(self.held_out)
        return {"denoising": torch.cat(errors).mean().item(), "contrast": contrast_mean.item()}

    def _columns(self, images: int, *draw: int) -> NDArray[np.int64]:
        every = images * self.model.config.places
        generator = np.random.default_rng([self.config.seed, 6, *draw])
        return np.sort(generator.choice(every, min(self.config.contrast_columns, every), replace=False))

    def gradients(self) -> dict[str, float]:
        """Set those of both losses; see `Trainer`."""
        model, numbers = self.model.config, self.config.batch(self.train, self.step)
        hidden = self.config.hidden_places(len(numbers), model.places, draw=(0, self.step))
        columns = self._columns(len(numbers), 0, self.step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            errors, contrasted = self.losses(
                numbers, hidden, columns, steps=self.config.settling_steps(self.step, model)
            )
        (errors.mean() + self.config.contrast_weight * contrasted).backward()
        return {"denoising": errors.mean().item(), "contrast": contrasted.item()}


def hide(model: GLOM, images: Tensor, hidden: Tensor) -> Tensor:
    """Make the hidden locations (B, N) of images (B, 3, S, S) grey: 0, the mean of ImageNet."""
    return model.images(model.patches(images).masked_fill(hidden[..., None], 0.0))


def settle(model: GLOM, images: Tensor, steps: int) -> tuple[Tensor, Opinions]:
    """Embeddings (B, N, L, D) after `steps`, 1 or more, and the opinions that the last of them was the mean of."""
    tokens = model.tokens(model.patches(images))  # (B, N, D)
    levels = model(images, steps=steps - 1)
    opinions = model.opinions(levels, tokens)
    return model.step(levels, opinions), opinions


def load_glom(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> tuple[GLOM, dict[str, Any]]:
    """Read a trained GLOM, and the settings that it was trained with.

    Raises:
        UsageError: no such file, another kind of checkpoint, or a damaged one.
    """
    checkpoint = read_network(path, NETWORK)
    model = GLOM(checkpoint.student, seed=None)
    model.load_state_dict(checkpoint.weights)
    return model.to(device).eval().requires_grad_(False), {**checkpoint.settings, "step": checkpoint.step}
