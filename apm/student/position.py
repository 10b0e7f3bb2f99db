"""Fixed 2-D sin/cos position codes: coordinates in, code out, nothing learned.

The code of a location is separable, ``p(y, x) = [e(x), e(y)]``: its first half depends on the column alone and its
second half on the row alone. The engine lives off that.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from apm.errors import UsageError


def axis_code(coordinates: Tensor | Sequence[float], width: int) -> Tensor:
    """Code one axis by sines and cosines (Vaswani et al. 2017, section 3.5).

    Args:
        coordinates: (Q,) positions in grid cells; any real number, fractions included.
        width: length of the code, even. Entries 2k are sines and 2k + 1 cosines of
            ``coordinate * exp(-2k ln(10000) / width)``.

    Returns:
        (Q, width) float32 in [-1, 1].
    """
    if width < 2 or width % 2:
        raise UsageError(f"A sin/cos code of one axis needs an even width of 2 or more, not {width}.")
    # float64 inside: the angle of a large coordinate must not lose digits before the sine is taken
    where = torch.as_tensor(coordinates, dtype=torch.float64)
    if where.ndim != 1:
        raise UsageError(f"Coordinates must form one list (Q,), not an array of shape {tuple(where.shape)}.")
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=where.device)
    angles = where[:, None] * torch.exp(exponents * (-math.log(10000.0) / width))  # (Q, width / 2)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1).float()  # (Q, width)


def position_code(rows: Tensor | Sequence[float], cols: Tensor | Sequence[float], width: int) -> Tensor:
    """Code locations of the grid: the first half encodes the column (x), the second half the row (y).

    Args:
        rows: (Q,) row of each location, in grid cells, 0 at the top.
        cols: (Q,) column of each location, in grid cells, 0 at the left.
        width: length of the code, a multiple of 4.

    Returns:
        (Q, width) float32 in [-1, 1].
    """
    if len(rows) != len(cols):
        raise UsageError(f"Every location needs a row and a column; got {len(rows)} rows and {len(cols)} columns.")
    return torch.cat((axis_code(cols, width // 2), axis_code(rows, width // 2)), dim=1)


def grid_locations(grid: int) -> tuple[Tensor, Tensor]:
    """Rows and columns, each (grid * grid,) int64, of all cells of a square grid in reading order."""
    rows, cols = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    return rows.flatten(), cols.flatten()


def dense_locations(grid: int, size: int) -> tuple[Tensor, Tensor]:
    """Centres of size × size equal cells laid over a student's whole square, in its own coordinates.

    Args:
        grid: the student's cells a side; its coordinates are these cells, their centres at 0 … grid - 1.
        size: locations a side, any number from 1 on: finer than the grid, or coarser.

    Returns:
        rows and columns, each (size²,) float64 in [-0.5, grid - 0.5], in reading order.
    """
    if size < 1:
        raise UsageError(f"At least one location a side is needed, not {size}.")
    axis = (torch.arange(size, dtype=torch.float64) + 0.5) * (grid / size) - 0.5
    rows, cols = torch.meshgrid(axis, axis, indexing="ij")
    return rows.flatten(), cols.flatten()
