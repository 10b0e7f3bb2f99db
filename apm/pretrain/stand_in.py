"""A student that replaces layers of its teacher: it gets their input and predicts their output.

The paper's student, its colours left out: one filter over what is given makes the trigger column, the column is
unfolded with the code of each place, and the coordinate MLP answers with the teacher's activations there after the
last layer. The input is the image (layer 0), or the activations after an earlier layer. Tokens that belong to no place
(class and registers) are queried at places above the square. With ``local`` a query also holds the input at its place,
which is not in the paper: the column has one number for a place, less than any linear map is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from apm.errors import UsageError
from apm.pretrain.checkpoint import Network, read_network
from apm.student.config import APMConfig
from apm.student.position import dense_locations, position_code
from apm.test_time.inputs import student_pixels

if TYPE_CHECKING:
    from apm.teachers.cut_towers import Layers


@dataclass(frozen=True)
class StandInSizes:
    """Sizes of such a student.

    Raises:
        UsageError: sizes that cannot go together.
    """

    image: bool = True
    """Whether the input is an image, not a layer's output."""
    channels: int = 3
    """Channels of the input at each location."""
    side: int = 224
    """Locations per side of the input; for an image, pixels."""
    patch_size: int = 14
    """Locations per side of the filter."""
    dim: int = 512
    """Width of the output."""
    places: int = 16
    """Locations per side of the output."""
    prefix: int = 0
    """Output tokens that belong to no location."""
    local: bool = False
    position_dim: int = 256
    hidden: tuple[int, int, int] = (1024, 512, 256)

    def __post_init__(self) -> None:
        """Check the sizes against one another."""
        numbers = (self.channels, self.side, self.patch_size, self.dim, self.places, self.position_dim, *self.hidden)
        if min(numbers) < 1 or self.prefix < 0 or len(self.hidden) != 3:
            raise UsageError(f"All sizes of the student must be positive and three of them hidden widths: {self}.")
        if self.side % self.patch_size or self.position_dim % 4:
            raise UsageError(
                f"The filter must tile the {self.side} locations, and the position code's width must be a multiple of "
                f"4: {self}."
            )
        if self.local and self.side % self.places:
            raise UsageError(
                f"Queries can contain the input at their locations only if these tile it: {self.places} locations per "
                f"side do not tile {self.side}. Leave out --local."
            )

    @property
    def grid(self) -> int:
        """Side of the trigger column's grid."""
        return self.side // self.patch_size

    @property
    def tokens(self) -> int:
        """Number of output tokens."""
        return self.prefix + self.places**2

    @property
    def image_size(self) -> int:
        """Side of the images that training keeps, in pixels; the least where none is given."""
        return self.side if self.image else 1

    @property
    def local_width(self) -> int:
        """Numbers in a query from the input at its location."""
        return self.channels * (self.side // self.places) ** 2 if self.local else 0

    @classmethod
    def between(cls, layers: Layers, first: int, last: int, *, preset: str, local: bool = False) -> StandInSizes:
        """A preset's student that replaces the layers after `first` (0: the image) up to `last`."""
        layers.check(first, last)
        given, wanted = layers.shapes[first], layers.shapes[last]
        model = APMConfig.preset(preset, dim=wanted.width)
        patch = next(n for n in range(1, given.side + 1) if not given.side % n and given.side // n <= model.grid)
        return cls(
            image=first == 0,
            channels=given.width,
            side=given.side,
            patch_size=patch,
            dim=wanted.width,
            places=wanted.side,
            prefix=wanted.prefix,
            local=local,
            position_dim=model.position_dim,
            hidden=model.hidden,
        )


class StandIn(nn.Module):
    """The network; its ``config`` holds its sizes."""

    def __init__(self, config: StandInSizes, *, seed: int = 0) -> None:
        """Draw the weights: N(0, 2 / inputs) before a ReLU (He et al. 2015), N(0, 0.01 / inputs) in the head; biases 0.

        So training begins about what the head's bias says, the mean token, and not at a random pattern about it.
        """
        super().__init__()
        self.config = config
        first, second, third = config.hidden
        query = config.grid**2 + config.position_dim + config.local_width
        self.column = nn.Conv2d(config.channels, 1, config.patch_size, stride=config.patch_size)
        self.layer1, self.layer2 = nn.Linear(query, first), nn.Linear(first, second)
        self.layer3, self.head = nn.Linear(second, third), nn.Linear(third, config.dim)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                gain = {"column": 1.0, "head": 0.01}.get(name.split(".")[0], 2.0)
                deviation = math.sqrt(gain / parameter[0].numel()) if parameter.ndim > 1 else 0.0
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)

    def places_part(self) -> Tensor:
        """The positions' part of the first layer (T, H1): the same for all inputs."""
        config = self.config
        rows, cols = dense_locations(config.grid, config.places)
        above = -1.0 - torch.arange(config.prefix, dtype=torch.float64)  # those of no place
        codes = position_code(torch.cat((above, rows)), torch.cat((above, cols)), config.position_dim)
        _, of_place, _ = self._parts()
        return functional.linear(codes.to(of_place), of_place, self.layer1.bias)

    def forward(self, given: Tensor, some: Tensor | None = None, *, at_places: Tensor | None = None) -> Tensor:
        """Answer.

        Args:
            given: images (B, 3, S, S), or tokens (B, T', C) after a layer.
            some: numbers of the tokens wanted (Q,); None: all.
            at_places: `places_part`, where it is known.

        Returns:
            Tokens (B, Q, D).
        """
        config, at = self.config, slice(None) if some is None else some
        of_column, _, of_given = self._parts()
        x = (self.column(map_of(given, config.side)).flatten(1) @ of_column.T)[:, None]  # (B, 1, H1)
        x = x + (self.places_part() if at_places is None else at_places)[at]
        if config.local:
            local = at_their_places(given, config.side, config.places, config.prefix)
            x = x + local[:, at] @ of_given.T
        for layer in (self.layer2, self.layer3):
            x = layer(x.relu())
        found: Tensor = self.head(x.relu().float())
        return found

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """The first layer's weights: for the column, for the position, and for the input there."""
        config = self.config
        of_column, of_place, of_given = self.layer1.weight.split(
            (config.grid**2, config.position_dim, config.local_width), dim=1
        )
        return of_column, of_place, of_given


def map_of(given: Tensor, side: int) -> Tensor:
    """The map (B, C, side, side) of an image, or of tokens (B, T', C) of which the last are its locations."""
    return given if given.ndim == 4 else given[:, given.shape[1] - side**2 :].mT.unflatten(2, (side, side))


def at_their_places(given: Tensor, side: int, places: int, prefix: int) -> Tensor:
    """The input at each location of a layer.

    Args:
        given: images (B, 3, side, side), or tokens (B, T', C) of which the last side² are places.
        side: a multiple of `places`.
        places: of the layer, along each side.
        prefix: tokens of the layer that belong to no place.

    Returns:
        (B, prefix + places², K): the (side / places)² tokens, or pixels, in a place side by side. For tokens of no
        place those that are given, zeros behind them, if they are as many; else zeros.
    """
    found = functional.pixel_unshuffle(map_of(given, side), side // places).flatten(2).mT
    own = given.new_zeros(len(given), prefix, 0)
    if given.ndim == 3 and given.shape[1] - side**2 == prefix:
        own = given[:, :prefix]
    return torch.cat((functional.pad(own, (0, found.shape[2] - own.shape[2])), found), dim=1)


def _shapes(sizes: StandInSizes) -> dict[str, tuple[int, ...]]:
    widths = (sizes.grid**2 + sizes.position_dim + sizes.local_width, *sizes.hidden, sizes.dim)
    shapes: dict[str, tuple[int, ...]] = {
        "column.weight": (1, sizes.channels, sizes.patch_size, sizes.patch_size),
        "column.bias": (1,),
    }
    for number, name in enumerate(("layer1", "layer2", "layer3", "head")):
        shapes[f"{name}.weight"] = (widths[number + 1], widths[number])
        shapes[f"{name}.bias"] = (widths[number + 1],)
    return shapes


STAND_IN = Network(
    "stand_in",
    "apm pretrain --target-layer",
    StandInSizes,
    _shapes,
    lambda sizes, seed: StandIn(sizes, seed=seed),
)


class ShortTower:
    """A teacher's tower in which something replaces the layers after `first` up to `last`.

    Attributes:
        layers: of the teacher.
        first, last: 0 is the image.
        stand_in: what it is given (see `StandIn`) → tokens (B, T, C) after layer `last`.
    """

    def __init__(self, layers: Layers, first: int, last: int, stand_in: Callable[[Tensor], Tensor]) -> None:
        """Put it together.

        Raises:
            UsageError: there are no such layers.
        """
        layers.check(first, last)
        self.layers, self.first, self.last, self.stand_in = layers, first, last, stand_in

    @classmethod
    def load(cls, path: str | Path, layers: Layers) -> ShortTower:
        """Read a checkpoint of ``apm pretrain --target-layer``.

        Raises:
            UsageError: no such file, no such checkpoint, or one that was trained with another teacher.
        """
        found = read_network(path, STAND_IN)
        settings: dict[str, Any] = found.settings
        if settings.get("teacher") != layers.teacher.identity:
            raise UsageError(f"{path} replaces layers of {settings.get('teacher')}, not of {layers.teacher.identity}.")
        student = StandIn(found.student)
        student.load_state_dict({name: tensor.float() for name, tensor in found.weights.items()})
        student.eval().requires_grad_(False).to(layers.teacher.device)
        at_places = student.places_part()
        return cls(layers, settings["from_layer"], settings["target_layer"], lambda x: student(x, at_places=at_places))

    def inputs(self, images: list[Image.Image]) -> Tensor:
        """The input of `answer` from RGB images: the student's pixels, or the teacher's (B, 3, S, S)."""
        if self.first == 0:
            return student_pixels(images, self.layers.image_size)
        return torch.stack([self.layers.pixels(image) for image in images])

    @torch.no_grad()
    def answer(self, pixels: Tensor) -> Tensor:
        """The teacher's token (B, D), with its layers after `first` up to `last` left out."""
        pixels = pixels.to(self.layers.teacher.device)
        given = pixels if self.first == 0 else self.layers.until(pixels, self.first)
        return self.layers.finish(self.stand_in(given), self.last)
