"""A teacher's grid of features, brought to the student's own locations."""

import torch.nn.functional as F
from torch import Tensor

from apm.errors import UsageError


def resample(grid: Tensor, side: int) -> Tensor:
    """Read a grid at the cell centres of another one that covers the same square: bilinear, constant past the edge.

    Args:
        grid: (..., h', w', D), floating point; cell (i, j) covers [i/h', (i+1)/h') x [j/w', (j+1)/w') of the square.
        side: cells along each side of the grid wanted, 1 or more.

    Returns:
        (..., side * side, D), in reading order as `apm.position.grid_locations`, in the grid's type.
    """
    if grid.ndim < 3 or not grid.numel():
        raise UsageError(f"A grid has the shape (..., h', w', D), none of them 0, not {tuple(grid.shape)}.")
    if side < 1:
        raise UsageError(f"A grid needs 1 cell or more along each side, not {side}.")
    *before, height, width, dim = grid.shape
    maps = grid.reshape(-1, height, width, dim).permute(0, 3, 1, 2)  # (M, D, h', w')
    maps = F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)
    return maps.flatten(2).mT.reshape(*before, side * side, dim)
