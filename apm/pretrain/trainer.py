"""Self-supervised training of ONE student on many images: its field against a teacher's grid, its colours too.

Modi & Rawat 2024, section 3 and figure 5. Unlike in test-time training, all images share the weights; what the student
knows of an image is its trigger column alone. Loss: ``mean((f - G)²) + rgb_weight · mean((rgb - pooled image)²)`` over
the student's own locations; G is the teacher's grid resampled to them. Where the cache holds no grids, the
colours alone are learned. With grey input the student sees the image's luma; the colours are the image's own all the
same.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from apm.errors import UsageError
from apm.images.load import IMAGENET_MEAN, IMAGENET_STD
from apm.pretrain.checkpoint import STUDENT
from apm.pretrain.config import PretrainConfig
from apm.pretrain.loop import Trainer, parts
from apm.pretrain.student import answer, grey
from apm.student.config import APMConfig
from apm.student.field import resample
from apm.student.model import APM
from apm.student.position import grid_locations, position_code


class Pretrainer(Trainer):
    """One student, trained against the grids in a cache, if it holds any, and the colours of its images."""

    network = STUDENT
    model: APM
    config: PretrainConfig

    @property
    def _weights(self) -> dict[str, float]:
        """The losses' names and weights."""
        return {**({"grid": 1.0} if self.cache.grids.size else {}), "rgb": self.config.rgb_weight}

    def check(self, sizes: APMConfig) -> None:
        """Refuse a student that is not as wide as the teacher's grid."""
        width = self.cache.grids.shape[-1]
        if width and width != sizes.dim:
            raise UsageError(f"The teacher's grid has width {width}, but the student's dim is {sizes.dim}.")

    @cached_property
    def _positions(self) -> Tensor:
        """Position codes (N, P) of the student's own locations."""
        sizes = self.model.config
        return position_code(*grid_locations(sizes.grid), sizes.position_dim).to(self.device)

    def losses(
        self, numbers: NDArray[np.int64], places: NDArray[np.int64] | None = None, *, precision: str = "fp32"
    ) -> tuple[Tensor, ...]:
        """Squared errors of the images with these numbers in the cache: of the grid (B,), if any, and the colours (B,).

        At the cells with the numbers `places`, or at all of them; ``precision`` is of the two middle layers.
        """
        at = slice(None) if places is None else torch.from_numpy(places).to(self.device)
        images = self.cache.inputs(numbers).to(self.device)
        colours = pooled_colours(images, self.model.config.patch_size)[:, at]  # (B, Q, 3)
        columns = self.model.column(grey(images) if self.config.grey_input else images)
        features, seen = answer(self.model, columns, self._positions[at], precision=precision)
        of_colours = (seen - colours).square().mean((1, 2))
        if "grid" not in self._weights:
            return (of_colours,)
        grids = resample(self.cache.targets(numbers).to(self.device), self.model.config.grid)[:, at]  # (B, Q, D)
        return (features - grids).square().mean((1, 2)), of_colours

    @torch.no_grad()
    def held_out_losses(self) -> dict[str, float]:
        """Mean squared errors of grid, if any, and colours over the held-out images, in float32."""
        found = [self.losses(part) for part in parts(self.held_out, self.config.batch_size)]
        means = (torch.cat(kind).mean().item() for kind in zip(*found, strict=True))
        return dict(zip(self._weights, means, strict=True))

    def gradients(self) -> dict[str, float]:
        """Set those of the batch; see `Trainer`."""
        places = self.config.places(self.model.config.cells, self.step)

        def errors(part: NDArray[np.int64]) -> dict[str, Tensor]:
            return dict(zip(self._weights, self.losses(part, places, precision=self.precision), strict=True))

        return self.share(self._weights, errors)

    def begin(self) -> None:
        """Let the outputs begin at the training images' mean feature and colour.

        The colours end in a ReLU: one whose drawn bias is negative, which is one in two, would be dead for ever.
        """
        features, colours = np.zeros(self.model.config.dim), np.zeros(3)
        for part in parts(self.train, 256):
            if "grid" in self._weights:
                features += self.cache.grids[part].mean((1, 2), dtype=np.float64).sum(0)
            colours += self.cache.images[part].mean((1, 2), dtype=np.float64).sum(0) / 255
        with torch.no_grad():
            if "grid" in self._weights:
                self.model.mlp.head.bias.copy_(torch.from_numpy(features / len(self.train)))
            self.model.rgb_head.layer3.bias.copy_(torch.from_numpy(colours / len(self.train)))


def pooled_colours(images: Tensor, patch_size: int) -> Tensor:
    """Normalised images (B, 3, S, S) -> mean colour of every patch (B, N, 3) in [0, 1].

    In [0, 1] and not in the image's normalised units, as the RGB head ends in a ReLU and cannot say less than zero.
    """
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    pooled = functional.avg_pool2d(images, patch_size) * std + mean
    return pooled.flatten(2).mT.clamp(0, 1)
