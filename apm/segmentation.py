"""Which label is where on a whole photograph: fields of square tiles, laid side by side, read at any resolution.

The student sees squares. An image of any other shape is covered by as few as reach from end to end, each with a student
of its own; where two overlap their features are blended, the nearer to a tile's middle the more. At every place of one
lattice over the whole image the feature is classified as a token would be; between these places the probabilities are
interpolated, so that borders do not follow the lattice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from apm.segment_values import PLACES, check

if TYPE_CHECKING:
    from PIL import Image

    from apm.text.zeroshot import ZeroShotHead

MOST_PLACES = 2048
"""Places of the lattice along the longer side: a long strip gets a coarser lattice, and memory has a bound."""
CHUNK = 4096
"""Places classified at a time."""
NUMBERS = 2**24
"""Probabilities held at a time while they are interpolated."""
BACKGROUND = 0
"""In a map: none of the labels that were looked for."""


@dataclass(frozen=True)
class Region:
    """A connected piece of a label."""

    box: tuple[int, int, int, int]
    """Left, top, right, bottom in pixels of the image; right and bottom are the first past it."""
    share: float
    """Of the image's area, in (0, 1]."""


@dataclass(frozen=True)
class Part:
    """All of an image that has one label."""

    label: str
    value: int
    """Its number in the map."""
    share: float
    """Of the image's area, in (0, 1]."""
    regions: tuple[Region, ...]
    """The largest first."""


@dataclass(frozen=True)
class Segmentation:
    """Which label is where."""

    labels: tuple[str, ...]
    """Those looked for; label i has the value i + 1 in the map."""
    map: NDArray[np.int32]
    """(H, W) of the image, upright: 0 background, else the label's value."""
    parts: tuple[Part, ...]
    """The labels found, the largest share first."""
    background: float
    """Share of the image's area that has none of the labels."""
    tiles: int
    """Squares that the image was seen in, each by a student of its own."""
    places: tuple[int, int]
    """Rows and columns of the lattice on which the fields were read."""
    notes: tuple[str, ...] = ()
    """What was unusual about the file."""


class Field(Protocol):
    """What a square tile has at each of its places."""

    def read(self, points: Tensor) -> Tensor:
        """Features (1, Q, D) at places (Q, 2), as `apm.student.field.SavedField.read`."""
        ...


Tile = tuple[int, int, int]
"""Left, top, side, in pixels."""


def tiles_of(width: int, height: int) -> list[Tile]:
    """Cover an image by as few squares of its shorter side as reach from end to end, evenly laid."""
    side, length = min(width, height), max(width, height)
    count = math.ceil(length / side)
    starts = [round(number * (length - side) / max(count - 1, 1)) for number in range(count)]
    return [(start, 0, side) if width >= height else (0, start, side) for start in starts]


def segment_image(
    image: Image.Image,
    adapted: Callable[[Image.Image], Field],
    head: ZeroShotHead,
    *,
    background: Sequence[str] = (),
    min_probability: float = 0.0,
    min_area: float = 0.0,
    places: int = PLACES,
    notes: tuple[str, ...] = (),
) -> Segmentation:
    """Say for every pixel of an image which label it has.

    Args:
        image: RGB.
        adapted: square image → the field of the one student adapted to it.
        head: the labels' text features.
        background: those of its labels that count as none.
        min_probability: a place whose best label is less probable is background.
        min_area: connected pieces with a smaller share of the image's area are given to what is next to them.
        places: of the lattice along the shorter side.
        notes: on the file.

    Raises:
        UsageError: a background label that the head does not have, no other label left, or a number out of range.
    """
    check(head.labels, background, min_probability, min_area, places)
    tiles = tiles_of(*image.size)
    lattice = features_of(image, adapted, tiles, places)  # (rows, cols, D)
    wanted = [number for number, label in enumerate(head.labels) if label not in background]
    values = torch.zeros(len(head.labels), dtype=torch.int32)
    values[wanted] = torch.arange(1, len(wanted) + 1, dtype=torch.int32)
    found = Probable.of_features(lattice, head).map(image.size, values, min_probability)
    labels = tuple(head.labels[number] for number in wanted)
    found = without_small(found, min_area)
    return Segmentation(
        labels=labels,
        map=found,
        parts=parts_of(found, labels),
        background=float((found == BACKGROUND).mean()),
        tiles=len(tiles),
        places=(lattice.shape[0], lattice.shape[1]),
        notes=notes,
    )


def features_of(
    image: Image.Image, adapted: Callable[[Image.Image], Field], tiles: Sequence[Tile], places: int
) -> Tensor:
    """Read the tiles' fields on one lattice over the image: unit features (rows, cols, D), blended where tiles overlap.

    Of the fields of the tiles only one is held at a time.
    """

    def unit_features(tile: Image.Image) -> Callable[[Tensor], Tensor]:
        field = adapted(tile)
        return lambda points: functional.normalize(field.read(points)[0].cpu(), dim=1)

    return functional.normalize(blended(image, unit_features, tiles, places), dim=2)


def blended(
    image: Image.Image,
    look: Callable[[Image.Image], Callable[[Tensor], Tensor]],
    tiles: Sequence[Tile],
    places: int,
) -> Tensor:
    """Add up the tiles' values at the places of one lattice over the image, weighted by nearness to the tile's middle.

    Args:
        image: of any shape.
        look: tile → what reads V values (Q, V) at places (Q, 2) of it, y and x as shares of its side.
        tiles: that cover the image.
        places: of the lattice along the shorter side.

    Returns:
        (rows, cols, V): sums, of weights that differ from place to place.
    """
    width, height = image.size
    step = max(min(width, height) / places, max(width, height) / MOST_PLACES)  # pixels
    rows, cols = max(1, round(height / step)), max(1, round(width / step))
    y = (np.arange(rows) + 0.5) / rows * height  # (rows,) middles, in pixels
    x = (np.arange(cols) + 0.5) / cols * width
    lattice: Tensor | None = None
    for left, top, side in tiles:
        inside = (y >= top) & (y <= top + side), (x >= left) & (x <= left + side)
        within = [(axis[some] - start) / side for axis, some, start in zip((y, x), inside, (top, left), strict=True)]
        points = np.stack(np.meshgrid(*within, indexing="ij"), axis=-1).reshape(-1, 2)
        values = look(image.crop((left, top, left + side, top + side)))(torch.from_numpy(points))
        nearness = np.minimum(points, 1 - points).min(axis=1) + 1e-3  # to the tile's border
        if lattice is None:
            lattice = torch.zeros(rows, cols, values.shape[1])
        where = np.ix_(*(np.flatnonzero(some) for some in inside))
        shape = (len(within[0]), len(within[1]), -1)
        lattice[where] += (values * torch.from_numpy(nearness).float()[:, None]).reshape(shape)
    assert lattice is not None
    return lattice


def without_small(found: NDArray[np.int32], min_area: float) -> NDArray[np.int32]:
    """Give connected pieces that are smaller than a share of the map to what is nearest; the largest always stays."""
    from scipy import ndimage

    pieces, sizes = _pieces(found)
    small = sizes < min(min_area * found.size, sizes.max())
    if not small.any():
        return found
    nearest = ndimage.distance_transform_edt(small[pieces], return_distances=False, return_indices=True)
    filled: NDArray[np.int32] = found[tuple(nearest)]
    return filled


def parts_of(found: NDArray[np.int32], labels: Sequence[str]) -> tuple[Part, ...]:
    """Measure every label of a map, and its connected pieces (pixels that share a side)."""
    from scipy import ndimage

    pieces, sizes = _pieces(found)
    regions: dict[int, list[Region]] = {}
    for number, (rows, cols) in enumerate(ndimage.find_objects(pieces + 1)):
        value = int(found[rows, cols][pieces[rows, cols] == number][0])
        box = (cols.start, rows.start, cols.stop, rows.stop)
        regions.setdefault(value, []).append(Region(box, float(sizes[number] / found.size)))
    parts = [
        Part(
            label=labels[value - 1],
            value=value,
            share=math.fsum(region.share for region in some),
            regions=tuple(sorted(some, key=lambda region: (-region.share, region.box))),
        )
        for value, some in regions.items()
        if value != BACKGROUND
    ]
    return tuple(sorted(parts, key=lambda part: (-part.share, part.value)))


def _pieces(found: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number of each pixel's connected piece, from 0 on, and how many pixels each has."""
    from skimage.measure import label

    pieces = label(found, background=-1, connectivity=1).astype(np.int64) - 1
    return pieces, np.bincount(pieces.ravel())


@dataclass(frozen=True)
class Probable:
    """Probabilities, at the places of a lattice, of the labels that are the best of all somewhere."""

    labels: Tensor
    """(K,) their numbers, ascending."""
    values: Tensor
    """(K, rows, cols)."""

    @classmethod
    def of_features(cls, lattice: Tensor, head: ZeroShotHead) -> Probable:
        """Classify unit features (rows, cols, D), some at a time."""
        rows, cols, dim = lattice.shape
        text = head.features.float().cpu()

        def probabilities(some: Tensor) -> Tensor:
            return (head.logit_scale * (some @ text.T)).softmax(dim=1)  # (Q, C)

        places = lattice.reshape(-1, dim).split(CHUNK)
        winners = torch.cat([probabilities(some).argmax(dim=1) for some in places]).unique()
        among = torch.cat([probabilities(some)[:, winners] for some in places])
        return cls(winners, among.T.reshape(-1, rows, cols))

    def map(self, size: tuple[int, int], values: Tensor, min_probability: float = 0.0) -> NDArray[np.int32]:
        """Interpolate between the places, and take the best label of each pixel.

        Args:
            size: width and height of the image, in pixels.
            values: (C,) int32, each label's in the map.
            min_probability: a pixel whose best label is less probable is background.
        """
        rows, cols = self.values.shape[1:]
        width, height = size
        found = torch.empty(height, width, dtype=torch.int32)
        upper, lower, down = _between(height, rows)
        left, right, across = _between(width, cols)
        strip = max(1, NUMBERS // (len(self.labels) * max(width, cols)))
        for start in range(0, height, strip):
            some = slice(start, start + strip)
            lines = torch.lerp(self.values[:, upper[some]], self.values[:, lower[some]], down[some, None])
            probable, which = torch.lerp(lines[..., left], lines[..., right], across).max(dim=0)  # (strip, W)
            named = values[self.labels[which]]
            named[probable < min_probability] = BACKGROUND
            found[some] = named
        return found.numpy()


def _between(count: int, places: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two places beside each of `count` pixels along an axis, and how far it is from the first to the second."""
    at = ((torch.arange(count, dtype=torch.float64) + 0.5) * (places / count) - 0.5).clamp(0, places - 1)
    first = at.floor().long()
    return first, (first + 1).clamp_max(places - 1), (at - first).float()
