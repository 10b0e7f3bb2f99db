"""Fields of adapted students: what is kept, how they unfold again at any location, and grids at their places."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from apm.errors import UsageError
from apm.student.engine_readout import Parameters
from apm.student.guide import colour_code
from apm.student.matmul import product
from apm.student.position import position_code

# Locations that are answered at a time: bounds the memory whatever the number asked for
CHUNK = 4096


@dataclass
class SavedField:
    """Trigger columns and weights of B students. Unfolds into features at any location."""

    columns: Tensor  # (B, N)
    weights: Parameters  # of the coordinate MLP, each (B, *shape)
    position_dim: int
    query: Tensor | None = None  # (B, heads, D), what scores a feature plus its code; None: the readout is the mean
    guide: Tensor | None = None  # (B, 3, G, G), the colours that queries hold a code of; None: they hold none

    @torch.no_grad()
    def features(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Features (B, Q, D) at Q locations, rows and columns in grid cells; bounded memory besides the result."""
        return torch.cat([features for _, _, features in self._parts(rows, cols)], dim=1)

    def read(self, points: Tensor | Sequence[Sequence[float]]) -> Tensor:
        """Features (B, Q, D) at any places of the square that the students saw, in any order and number.

        Args:
            points: (Q, 2): y and x of each place, as shares of the side from the top left, in [0, 1].

        Raises:
            UsageError: another shape, or a place that is not in the square.
        """
        where = torch.as_tensor(points, dtype=torch.float64)
        if where.ndim != 2 or where.shape[1] != 2:
            raise UsageError(f"Locations must have the shape (Q, 2), y and x of each, not {tuple(where.shape)}.")
        if not bool(((where >= 0) & (where <= 1)).all()):
            raise UsageError("Locations are shares of the square's side: y and x must lie between 0 and 1.")
        rows, cols = (where * math.isqrt(self.columns.shape[1]) - 0.5).unbind(dim=1)
        return self.features(rows, cols)

    @torch.no_grad()
    def attention(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Share (B, heads, Q) of each of Q locations in what the object query gathers from these; sums to 1 a head."""
        if self.query is None:
            raise UsageError('Attention exists only if the object query reads the token: readout="query".')
        scores = []
        for some_rows, some_cols, features in self._parts(rows, cols):
            keys = features + position_code(some_rows, some_cols, features.shape[2]).to(features)
            scores.append(product(self.query, keys.mT))
        return torch.cat(scores, dim=2).softmax(dim=2)

    def _parts(self, rows: Tensor, cols: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield rows, columns and features (B, at most CHUNK, D) of all locations in their order."""
        if len(rows) != len(cols):
            raise UsageError(f"Every location needs a row and a column; got {len(rows)} rows and {len(cols)} columns.")
        cells = self.columns.shape[1]
        by_column, by_position = self.weights["mlp.layer1.weight"].split((cells, self.position_dim), dim=2)
        shared = product(self.columns[:, None], by_column.mT) + self.weights["mlp.layer1.bias"][:, None]  # (B, 1, H1)
        for some_rows, some_cols in zip(rows.split(CHUNK), cols.split(CHUNK), strict=True):
            positions = position_code(some_rows, some_cols, self.position_dim).to(shared)
            x = product(positions.expand(len(self.columns), -1, -1), by_position.mT)
            x += shared
            if self.guide is not None:
                code = colour_code(self.guide, some_rows, some_cols, math.isqrt(cells))
                x += product(code, self.weights["mlp.guide.weight"].mT)
            x.relu_()
            for layer in ("mlp.layer2", "mlp.layer3", "mlp.head"):
                x = product(x, self.weights[f"{layer}.weight"].mT) + self.weights[f"{layer}.bias"][:, None]
                x = x if layer == "mlp.head" else x.relu_()
            yield some_rows, some_cols, x

    def double(self) -> "SavedField":
        """Copy into float64: its answers tell how far rounding reaches into those of this one."""
        weights = {name: value.double() for name, value in self.weights.items()}
        query = None if self.query is None else self.query.double()
        guide = None if self.guide is None else self.guide.double()
        return SavedField(self.columns.double(), weights, self.position_dim, query, guide)

    @staticmethod
    def join(parts: "list[SavedField]") -> "SavedField":
        """Put the samples of several batches behind one another."""
        if len(parts) == 1:
            return parts[0]
        weights = {name: torch.cat([part.weights[name] for part in parts]) for name in parts[0].weights}
        queries = [part.query for part in parts if part.query is not None]
        query = torch.cat(queries) if queries else None
        guides = [part.guide for part in parts if part.guide is not None]
        guide = torch.cat(guides) if guides else None
        return SavedField(torch.cat([part.columns for part in parts]), weights, parts[0].position_dim, query, guide)


def resample(grid: Tensor, side: int) -> Tensor:
    """Read a grid at the cell centres of another one that covers the same square: bilinear, constant past the edge.

    Args:
        grid: (..., h', w', D), floating point; cell (i, j) covers [i/h', (i+1)/h') x [j/w', (j+1)/w') of the square.
        side: cells along each side of the grid wanted, 1 or more.

    Returns:
        (..., side * side, D), in reading order as `apm.student.position.grid_locations`, in the grid's type.
    """
    if grid.ndim < 3 or not grid.numel():
        raise UsageError(f"A grid has the shape (..., h', w', D), none of them 0, not {tuple(grid.shape)}.")
    if side < 1:
        raise UsageError(f"A grid needs 1 cell or more along each side, not {side}.")
    *before, height, width, dim = grid.shape
    maps = grid.reshape(-1, height, width, dim).permute(0, 3, 1, 2)  # (M, D, h', w')
    maps = F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)
    return maps.flatten(2).mT.reshape(*before, side * side, dim)
