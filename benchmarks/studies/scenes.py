"""Scenes whose parts are known: photographs with masks, and composites of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from apm.errors import UsageError
from apm.images.load import load_image
from apm.images.paths import printable
from apm.student.islands import Labels
from apm.test_time.island_fields import square_of

from .composites import composites


@dataclass(frozen=True)
class Scene:
    """An image and what is where.

    Attributes:
        name: of the image.
        square: RGB, as wide as high.
        truth: (G, G) numbers; those below 0 are not known.
    """

    name: str
    square: Image.Image
    truth: Labels

    @property
    def usable(self) -> bool:
        """Whether some neighbours are known to be of one part, and some of two."""
        known, same = neighbours(self.truth)
        return bool((known & same).any() and (known & ~same).any())


def neighbours(truth: Labels) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Of neighbours to the right and below, in reading order: whether both are known, and of one part."""
    pairs = ((truth[:, :-1], truth[:, 1:]), (truth[:-1], truth[1:]))
    known = np.concatenate([((one >= 0) & (other >= 0)).ravel() for one, other in pairs])
    return known, np.concatenate([(one == other).ravel() for one, other in pairs])


def places_of(mask: Image.Image, grid: int) -> Labels:
    """Tell the places (grid, grid) of a square mask by the number that most of their pixels have; -1 where it is 0."""
    side = grid * 8
    pixels = np.asarray(mask.resize((side, side), Image.Resampling.NEAREST)).astype(np.int64)
    cells = pixels.reshape(grid, 8, grid, 8).swapaxes(1, 2).reshape(grid, grid, 64)
    most: Labels = np.apply_along_axis(lambda cell: np.bincount(cell).argmax(), 2, cells).astype(np.int64)
    return np.where(most > 0, most, -1)


def masked_files(root: Path) -> list[tuple[Path, Path]]:
    """Find the photographs below a folder that have a mask, each with it, in the order of their names.

    Raises:
        UsageError: there are none.
    """
    found = [(path, root / "masks" / f"{path.stem}.png") for path in sorted((root / "images").glob("*.jpg"))]
    found = [(path, mask) for path, mask in found if mask.is_file()]
    if not found:
        raise UsageError(f"{printable(root)} holds no photographs with masks: images/*.jpg and masks/*.png.")
    return found


def read_mask(path: Path) -> NDArray[np.int32]:
    """Read the numbers (H, W) of a mask's pixels, which may have 16 bits."""
    with Image.open(path) as opened:
        return np.asarray(opened).astype(np.int32)


def photographs(root: Path, grid: int) -> Iterator[Scene]:
    """Read the photographs with masks below a folder, see `masked_files`."""
    for path, mask in masked_files(root):
        numbers = Image.fromarray(read_mask(mask))
        yield Scene(path.name, square_of(load_image(path).image), places_of(_square(numbers), grid))


def _square(mask: Image.Image) -> Image.Image:
    side = min(mask.size)
    left, top = (mask.width - side) // 2, (mask.height - side) // 2
    return mask.crop((left, top, left + side, top + side))


def pasted(scenes: Sequence[Scene], count: int, grid: int, *, seed: int) -> list[Scene]:
    """Composites of these photographs; the truth is whether a place's middle lies in the pasted square."""

    samples = [SimpleNamespace(label=number, load=lambda one=one: one.square) for number, one in enumerate(scenes)]
    made = composites(samples, count, seed=seed)
    middles = (np.arange(grid) + 0.5) / grid
    return [
        Scene(
            f"composite {number} of {count}",
            one.image,
            np.array([[int(one.holds((y, x))) for x in middles] for y in middles]),
        )
        for number, one in enumerate(made)
    ]
