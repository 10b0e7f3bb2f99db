"""A plain convolutional autoencoder that fills in hidden locations: the baseline for GLOM, of the same size.

Three downsamplings to a few cells that see nearly the whole image, and back with nearest neighbours and convolutions,
without skip connections. It trains on the same images in the same order, with the same locations hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from apm.errors import UsageError
from apm.glom.config import GLOMTraining
from apm.pretrain.checkpoint import Network
from apm.pretrain.loop import Trainer, parts

CHANNELS = (1, 2, 4, 4, 4, 2, 1)
"""Of the layers between the pixels, in units of the width."""
STRIDES = (1, 2, 2, 2)
"""Of the first four layers; the others come after a doubling of the side, but for the last one."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderSizes:
    """Sizes of the network.

    Raises:
        UsageError: sizes that cannot go together.
    """

    width: int = 16
    """Channels of the first and of the last layer but one."""
    image_size: int = 32
    patch_size: int = 4
    """Side of a place that is hidden or not, in pixels."""

    def __post_init__(self) -> None:
        """Check that sides can be halved, and hidden."""
        if self.width < 1 or self.image_size % 8 or self.image_size % self.patch_size:
            raise UsageError(f"An autoencoder halves images three times, and places tile them; got {self}.")


class Autoencoder(nn.Module):
    """Images (B, 3, S, S) with hidden places → whole images."""

    def __init__(self, config: AutoencoderSizes, *, seed: int | None = 0) -> None:
        """Draw the weights, uniform in ±√(6 / inputs), biases 0 (He et al. 2015); None: they come from elsewhere."""
        super().__init__()
        self.config = config
        channels = [3, *(config.width * unit for unit in CHANNELS), 3]
        strides = [*STRIDES, *[1] * (len(channels) - 1 - len(STRIDES))]
        self.layers = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=stride, padding=1)
            for before, after, stride in zip(channels, channels[1:], strides, strict=False)
        )
        if seed is not None:
            self._draw(np.random.Generator(np.random.PCG64(seed)))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, 3, S, S)."""
        x, last = images, len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            if len(STRIDES) <= number < last:
                x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = layer(x)
            if number < last:
                x = F.gelu(x)
        return x

    @torch.no_grad()
    def _draw(self, generator: np.random.Generator) -> None:
        for name, parameter in self.named_parameters():
            if "bias" in name:
                parameter.zero_()
            else:
                bound = math.sqrt(6 / parameter[0].numel())
                parameter.copy_(torch.from_numpy(generator.uniform(-bound, bound, parameter.shape)))


def shapes(config: AutoencoderSizes) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by name, without making any."""
    with torch.device("meta"):
        model = Autoencoder(config, seed=None)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def parameters(of: dict[str, tuple[int, ...]]) -> int:
    """How many numbers parameters of these shapes are."""
    return sum(math.prod(shape) for shape in of.values())


def width_of_size(count: int) -> int:
    """The width with which an autoencoder's number of parameters is nearest to `count`."""
    return min(range(1, 257), key=lambda width: abs(parameters(shapes(AutoencoderSizes(width=width))) - count))


NETWORK = Network(
    "autoencoder",
    "python -m apm.benchmarks.studies.glom_reconstruction",
    AutoencoderSizes,
    shapes,
    lambda sizes, seed: Autoencoder(sizes, seed=seed),
)


def pixels_hidden(hidden: Tensor, side: int) -> Tensor:
    """Which places (B, N) are hidden → which pixels (B, 1, S, S), places `side` pixels wide."""
    grid = math.isqrt(hidden.shape[1])
    return hidden.view(-1, 1, grid, grid).repeat_interleave(side, 2).repeat_interleave(side, 3)


def filling_errors(filled: Tensor, images: Tensor, hidden: Tensor, side: int) -> Tensor:
    """Mean squared error (B,) over the hidden pixels of images (B, 3, S, S)."""
    mask = pixels_hidden(hidden, side)
    return ((filled - images).square() * mask).sum((1, 2, 3)) / (3 * mask.sum((1, 2, 3)))


class AutoencoderTrainer(Trainer):
    """An autoencoder, trained by GLOM's settings on the images in a cache: the same order, the same places hidden."""

    network = NETWORK
    model: Autoencoder
    config: GLOMTraining

    def _errors(self, numbers: NDArray[np.int64], draw: tuple[int, ...]) -> Tensor:
        side = self.model.config.patch_size
        places = (self.model.config.image_size // side) ** 2
        images = self.cache.inputs(numbers).contiguous().to(self.device)
        hidden = torch.from_numpy(self.config.hidden_places(len(numbers), places, draw=draw)).to(self.device)
        return filling_errors(self.model(images.masked_fill(pixels_hidden(hidden, side), 0.0)), images, hidden, side)

    def gradients(self) -> dict[str, float]:
        """Of the error of hidden places; see `Trainer`."""
        error = self._errors(self.config.batch(self.train, self.step), (0, self.step)).mean()
        error.backward()
        return {"denoising": error.item()}

    @torch.no_grad()
    def held_out_losses(self) -> dict[str, float]:
        """Error of hidden places over the held-out images."""
        size = self.config.batch_size
        errors = [self._errors(part, (1, number * size)) for number, part in enumerate(parts(self.held_out, size))]
        return {"denoising": torch.cat(errors).mean().item()}


def train_until(trainer: Trainer, step: int, *, save_every: int = 200, on_step: Any = lambda step: None) -> None:
    """Train up to a step, which may be before the last one of the schedule; the checkpoint is brought up to date."""
    if trainer.step >= step:
        return
    while trainer.step < step:
        trainer.advance()
        on_step(trainer.step)
        if trainer.step % save_every == 0 or trainer.step == step:
            trainer.save()
