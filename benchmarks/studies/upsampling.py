"""Ways to read between a teacher's cells without a student: bilinear grids, the average of views, a filter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from apm.test_time.grid_views import GridView


@dataclass(frozen=True)
class GridField:
    """A grid read at any places: bilinear between the middles of its cells, constant past the outermost."""

    grid: Tensor
    """(h, w, D), of the whole square."""

    def read(self, points: Tensor) -> Tensor:
        """Values (1, Q, D) at places (Q, 2), y and x as shares of the side."""
        where = (2 * points.flip(1) - 1).to(self.grid)[None, None]  # x before y, in [-1, 1]
        maps = self.grid.permute(2, 0, 1)[None]
        return functional.grid_sample(maps, where, padding_mode="border", align_corners=False)[:, :, 0].mT


@dataclass(frozen=True)
class Overlay:
    """Grids of views laid over one another: at each place the mean of those that show it, each read bilinearly.

    A view counts by how small its cells are, as a cell does in a student's target.
    """

    seen: Sequence[tuple[GridView, Tensor]]

    def read(self, points: Tensor) -> Tensor:
        """Values (1, Q, D) at places (Q, 2), y and x as shares of the side."""
        total, weights = torch.zeros(len(points), self.seen[0][1].shape[2]), torch.zeros(len(points), 1)
        for view, grid in self.seen:
            top, left, bottom, right = view.box
            down, across = (points[:, 0] - top) / (bottom - top), (points[:, 1] - left) / (right - left)
            inside = ((down >= 0) & (down <= 1) & (across >= 0) & (across <= 1)).nonzero()[:, 0]
            if view.flipped:
                across = 1 - across
            weight = grid.shape[0] * grid.shape[1] / ((bottom - top) * (right - left))
            total[inside] += weight * GridField(grid).read(torch.stack((down, across), dim=1)[inside])[0].cpu()
            weights[inside] += weight
        return (total / weights)[None]


def joint_bilateral(values: Tensor, colours: Tensor, *, reach: float, spread: float, stride: int = 1) -> Tensor:
    """Average maps over places that are near and have a like colour (Petschnigg et al. 2004, Kopf et al. 2007).

    Args:
        values: (K, H, W) maps.
        colours: (3, H, W) in [0, 1].
        reach: standard deviation of the weight by distance, in places; cut off at twice that.
        spread: standard deviation of the weight by the distance of colours.
        stride: places between those that are averaged.

    Returns:
        (K, H, W): weighted means, the weights of each place's neighbours adding up to 1.
    """
    far = stride * max(1, math.floor(2 * reach / stride))
    height, width = colours.shape[1:]
    total, weights = torch.zeros_like(values), torch.zeros(height, width)

    def overlap(shift: int, size: int) -> tuple[slice, slice]:
        return slice(max(0, -shift), size - max(0, shift)), slice(max(0, shift), size + min(0, shift))

    for down in range(-min(far, height - 1), min(far, height - 1) + 1):
        for across in range(-min(far, width - 1), min(far, width - 1) + 1):
            if down % stride or across % stride:
                continue
            (rows, other_rows), (cols, other_cols) = overlap(down, height), overlap(across, width)
            apart = (colours[:, rows, cols] - colours[:, other_rows, other_cols]).square().sum(dim=0)
            weight = torch.exp(-(down**2 + across**2) / (2 * reach**2) - apart / (2 * spread**2))
            total[:, rows, cols] += weight * values[:, other_rows, other_cols]
            weights[rows, cols] += weight
    return total / weights
