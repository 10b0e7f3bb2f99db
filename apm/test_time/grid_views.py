"""Many views of one image as targets of one field: zoomed, shifted and mirrored crops, each encoded by the teacher.

A query of the field is a location, and every view is about locations: its cells (or, for a teacher without a grid, its
one token) cover rectangles of the square that the student sees. View 0 is that square itself. View i depends on (seed,
sample id, i) alone, so 8 views are the first 8 of 16; side and place of the views follow a sequence that covers all of
them evenly (Roberts 2018's generalised golden ratio, shifted at random for each image) rather than by chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from apm.images.crops import view_generator
from apm.student.cells import Box, Cells, shares_of
from apm.test_time.view_numbers import number_of

if TYPE_CHECKING:
    from apm.teachers.base import Teacher

GRID_SIDES = (0.4, 0.8)
"""Side of the crops whose grids are targets, as a share of the square's."""
TOKEN_SIDES = (0.2, 0.5)
"""The same for crops whose tokens are targets: a token has no information about locations in its crop."""
PAST = 0.25
"""How far past the border crops are placed, as a share of their range, before they are moved back to cover corners."""
_GOLDEN = 1.2207440846057596  # x**4 = x + 1: for sequences of three numbers


@dataclass(frozen=True)
class GridView:
    """One view of an image."""

    box: Box = (0.0, 0.0, 1.0, 1.0)
    """The part of the square that it shows."""
    flipped: bool = False
    """Whether it is shown mirrored."""


def grid_views(count: int, *, seed: int, sample_id: str, sides: tuple[float, float] = GRID_SIDES) -> list[GridView]:
    """Draw `count` views of an image, the whole square first.

    Args:
        count: 1 or more.
        seed: of the run.
        sample_id: names the image among all of its data set.
        sides: minimum and maximum side of the others, as shares of the square's.
    """
    generator = view_generator(seed, f"grid|{sample_id}", 0)
    start, flips = generator.random(3), int(generator.integers(2))
    steps = _GOLDEN ** -np.arange(1.0, 4.0)
    drawn = [GridView()]
    for index in range(1, count):
        along, down, across = np.mod(start + index * steps, 1.0)
        side = sides[0] + (sides[1] - sides[0]) * along
        top, left = (float(np.clip((1 + 2 * PAST) * share - PAST, 0, 1) * (1 - side)) for share in (down, across))
        drawn.append(GridView((top, left, top + float(side), left + float(side)), flipped=(index + flips) % 2 == 0))
    return drawn


def cut(image: Image.Image, view: GridView) -> tuple[Image.Image, GridView]:
    """Cut a view out of an image's central square, in whole pixels: the picture, and the view as actually cut."""
    if view == GridView():
        return image, view
    edge = min(image.size)
    left, top = (image.width - edge) / 2, (image.height - edge) / 2  # one of them may be half a pixel
    size = min(max(1, round((view.box[2] - view.box[0]) * edge)), *(_whole(start, edge)[1] for start in (left, top)))

    def placed(start: float, share: float) -> int:
        first, room = _whole(start, edge)
        return min(max(round(start + share * edge), first), first + room - size)

    x, y = placed(left, view.box[1]), placed(top, view.box[0])
    part = image.crop((x, y, x + size, y + size))
    if view.flipped:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    box = ((y - top) / edge, (x - left) / edge, (y + size - top) / edge, (x + size - left) / edge)
    return part, GridView(box, view.flipped)


def _whole(start: float, length: int) -> tuple[int, int]:
    """The first whole pixel from `start` on, and how many there are up to `start + length`."""
    first = math.ceil(start)
    return first, math.floor(start + length) - first


@torch.no_grad()
def view_cells(
    images: Sequence[Image.Image],
    teacher: Teacher,
    side: int,
    views: int | str,
    *,
    seed: int,
    sample_ids: Sequence[str],
    grids: Sequence[Tensor | None] | None = None,
    size: int | None = None,
) -> Cells:
    """Encode every view of B images with the teacher.

    Args:
        images: RGB.
        teacher: gives grids, or tokens where these are asked for.
        side: of the student's grid, in cells.
        views: how many, or ``tokens``, or ``tokens:N``.
        seed: of the run.
        sample_ids: one for each image.
        grids: the teacher's grids (h', w', D) of the whole images, where they are there already.
        size: side, in pixels, at which each view's grid is made; None for the teacher's default.

    Returns:
        Each view's cells, in the order of the views, on the teacher's device.
    """
    found = []
    for number, (image, name) in enumerate(zip(images, sample_ids, strict=True)):
        known = None if grids is None else grids[number]
        seen = looks(image, teacher, views, seed=seed, sample_id=name, grid=known, size=size)
        found.append(cells_of(seen, side))
    shares, features = (
        torch.cat(one) for one in zip(*((cells.shares, cells.features) for cells in found), strict=True)
    )
    return Cells(shares, features)


@torch.no_grad()
def looks(
    image: Image.Image,
    teacher: Teacher,
    views: int | str,
    *,
    seed: int,
    sample_id: str,
    grid: Tensor | None = None,
    size: int | None = None,
) -> list[tuple[GridView, Tensor]]:
    """Encode every view of one image with the teacher: the views as they were cut, and their grids (h', w', D).

    The arguments are those of `view_cells`; `grid` is that of the whole image.
    """
    count, by_token = number_of(views)
    drawn = grid_views(count, seed=seed, sample_id=sample_id, sides=TOKEN_SIDES if by_token else GRID_SIDES)
    parts = [cut(image, view) for view in drawn]
    if by_token:
        return [(view, _token(teacher, part)) for part, view in parts]
    known = [grid] + [None] * (count - 1)
    return [
        (view, teacher.encode_grid(part, size=size) if whole is None else whole)
        for (part, view), whole in zip(parts, known, strict=True)
    ]


def cells_of(seen: Sequence[tuple[GridView, Tensor]], side: int) -> Cells:
    """The cells of all views of one image, in their order, for a student of `side` × `side` locations."""
    shares = [shares_of(view.box, grid.shape[0], grid.shape[1], side, flipped=view.flipped) for view, grid in seen]
    features = torch.cat([grid.flatten(0, 1) for _, grid in seen])
    return Cells(torch.cat(shares)[None].to(features.device), features[None].float())


def _token(teacher: Teacher, part: Image.Image) -> Tensor:
    """The teacher's token of a crop, as a grid of one cell (1, 1, D)."""
    return teacher.encode_image(teacher.preprocess(part)[None].to(teacher.device))[None]
