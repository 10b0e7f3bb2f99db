"""Training of a student that replaces layers of its teacher; see `apm.pretrain.stand_in`.

Loss: the mean squared error of the tokens after the last layer, as a share of their variance over the training images
(about their mean over images and tokens): 1 is what the mean alone would reach.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from apm.pretrain.cache import GridCache
from apm.pretrain.config import PretrainConfig
from apm.pretrain.loop import Trainer, parts
from apm.pretrain.stand_in import STAND_IN, StandIn, StandInSizes
from apm.teachers.cut_towers import Layers


class LayerTokens:
    """What a teacher holds of an image after some layers, side by side: kept as if it were the grid of a teacher."""

    def __init__(self, layers: Layers, *which: int) -> None:
        """Take layers from 1 on, in ascending order; a layer 0, which is the image, is left out."""
        teacher = layers.teacher
        self.layers, self.which = layers, tuple(layer for layer in which if layer)
        self.name, self.notes, self.device = teacher.name, teacher.notes, teacher.device
        self.identity = f"{teacher.identity}, layers {' '.join(map(str, self.which))}"
        self.grid_size = layers.image_size
        ends = np.cumsum([0, *(self._numbers(layer) for layer in self.which)]).tolist()
        self.dim = ends[-1]
        self._places = {layer: slice(*ends[n : n + 2]) for n, layer in enumerate(self.which)}

    def encode_grid(self, image: Image.Image, *, size: int | None = None) -> Tensor:
        """All of them (1, 1, K); at the teacher's own size, whatever `size` says."""
        found, before, kept = self.layers.pixels(image)[None], 0, []
        for layer in self.which:
            found = self.layers.between(found, before, layer) if before else self.layers.until(found, layer)
            before = layer
            kept.append(found.flatten())
        return torch.cat(kept).float()[None, None]

    def read(self, cache: GridCache, layer: int, numbers: NDArray[np.int64]) -> Tensor:
        """The tokens (B, T, C) of one layer, of images with these numbers in a cache."""
        shape = self.layers.shapes[layer]
        rows = cache.grids[numbers, 0, 0, self._places[layer]]
        return torch.from_numpy(rows.astype(np.float32)).unflatten(1, (shape.tokens, shape.width))

    def _numbers(self, layer: int) -> int:
        return self.layers.shapes[layer].tokens * self.layers.shapes[layer].width


class LayerTrainer(Trainer):
    """A student, trained on what goes into a teacher's layers and what comes out."""

    network = STAND_IN
    model: StandIn
    config: PretrainConfig

    def __init__(
        self,
        path: str | os.PathLike[str],
        cache: GridCache,
        sizes: StandInSizes,
        config: PretrainConfig,
        *,
        tokens: LayerTokens,
        data: Mapping[str, Any],
        **how: Any,
    ) -> None:
        """As a `Trainer`; `tokens` are what the cache's grids are of, and `data` names the two layers."""
        self.tokens, self.first, self.last = tokens, int(data["from_layer"]), int(data["target_layer"])
        super().__init__(path, cache, sizes, config, data=data, **how)

    def pair(self, numbers: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """The inputs from images (`StandIn.forward`), and the target tokens (B, T, C)."""
        given = self.tokens.read(self.cache, self.first, numbers) if self.first else self.cache.inputs(numbers)
        return given.to(self.device), self.tokens.read(self.cache, self.last, numbers).to(self.device)

    @cached_property
    def moments(self) -> tuple[Tensor, float]:
        """Mean (C,) of the target tokens over training images and tokens, and their mean variance around it."""
        total: Any = 0.0
        squares: Any = 0.0
        for part in parts(self.train, 256):
            wanted = self.tokens.read(self.cache, self.last, part).to(self.device).double()
            total, squares = total + wanted.mean(1).sum(0), squares + wanted.square().mean(1).sum(0)
        mean = total / len(self.train)
        return mean.float(), float((squares / len(self.train) - mean.square()).mean())

    def token_means(self) -> Tensor:
        """Mean of each target token over the training images (T, C)."""
        total: Any = 0.0
        for part in parts(self.train, 256):
            total = total + self.tokens.read(self.cache, self.last, part).to(self.device).double().sum(0)
        mean: Tensor = (total / len(self.train)).float()
        return mean

    def losses(
        self, numbers: NDArray[np.int64], some: NDArray[np.int64] | None = None, *, precision: str = "fp32"
    ) -> Tensor:
        """Unexplained shares (B,) of images, over the tokens with the numbers `some`, or over all."""
        at = None if some is None else torch.from_numpy(some).to(self.device)
        given, wanted = self.pair(numbers)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
            found = self.model(given, at)
        wanted = wanted if at is None else wanted[:, at]
        return (found.float() - wanted).square().mean((1, 2)) / self.moments[1]

    @torch.no_grad()
    def held_out_losses(self) -> dict[str, float]:
        """Mean over the held-out images, in float32."""
        return {"layer": torch.cat([self.losses(part) for part in parts(self.held_out, 32)]).mean().item()}

    def gradients(self) -> dict[str, float]:
        """Set those of the batch; see `Trainer`."""
        some = self.config.places(self.model.config.tokens, self.step)
        return self.share({"layer": 1.0}, lambda part: {"layer": self.losses(part, some, precision=self.precision)})

    def begin(self) -> None:
        """Let the answers begin about the training images' mean token."""
        with torch.no_grad():
            self.model.head.bias.copy_(self.moments[0])
