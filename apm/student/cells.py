"""Targets for a field in the cells of many views of one image, at the scale of these cells.

A view is a part of the square that the student sees. Each cell of the teacher's grid of a view covers a rectangle of
that square, and says something of all of it: it is compared with the field's mean over the rectangle, not with the
field at its centre. The mean is read at the student's own locations, each standing for its cell of the student's grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Box = tuple[float, float, float, float]
"""Top, left, bottom, right: shares of the side of the student's square, in [0, 1]."""

DISAGREEMENT = 0.25
"""Share of the targets' variance above which an error counts as disagreement between views (`robust_loss`)."""


@dataclass(frozen=True)
class Cells:
    """R cells of views of B images, and the target of the field's mean over each."""

    shares: Tensor
    """(B, R, N) float32, at least 0: how much each of the student's locations counts in a cell; rows add up to 1."""
    features: Tensor
    """(B, R, D) float32."""

    def __getitem__(self, some: slice) -> Cells:
        """Those of some of the images."""
        return Cells(self.shares[some], self.features[some])

    def padded(self, spare: int) -> Cells:
        """These, and the first image's again, `spare` times."""
        shares, features = (torch.cat((one, one[:1].expand(spare, -1, -1))) for one in (self.shares, self.features))
        return Cells(shares, features)

    def spread(self) -> Tensor:
        """(B,): error above which views count as disagreeing, `DISAGREEMENT` of the features' variance.

        For features that are all alike, a small share of their square: always above 0.
        """
        found = []
        for one in self.features.float():
            variance = (one - one.mean(dim=0)).square().mean()
            found.append(torch.maximum(variance, one.square().mean() / 1000).clamp_min(1e-12))
        return DISAGREEMENT * torch.stack(found)


def shares_of(box: Box, height: int, width: int, side: int, *, flipped: bool = False) -> Tensor:
    """How much each location of a student counts in each cell of a grid that covers a part of its square.

    Args:
        box: the part.
        height: cells of the grid from top to bottom.
        width: cells from left to right.
        side: of the student's grid, in cells.
        flipped: the grid is of the part's mirror image: its first column is the rightmost.

    Returns:
        (height * width, side * side) float32, both in reading order; each row adds up to 1.
    """
    top, left, bottom, right = box
    down, across = _overlaps(top, bottom, height, side), _overlaps(left, right, width, side)
    if flipped:
        across = across.flip(0)
    return torch.einsum("ik,jl->ijkl", down, across).reshape(height * width, side * side).float()


def robust_loss(read: Tensor, wanted: Tensor, spread: Tensor) -> Tensor:
    """Loss of one image's cells: ``mean_r 2 s (sqrt(1 + e_r / s) - 1)``, e_r the mean square error in cell r.

    Where the error is small beside s it is e_r, and where it is large it grows as its root: of views that disagree
    about a place the field takes the side of most, and not their mean (pseudo-Huber, Charbonnier et al. 1997).

    Args:
        read: (R, D) the field's means over the cells.
        wanted: (R, D).
        spread: s, a number above 0.
    """
    error = (read - wanted).square().mean(dim=1)  # (R,)
    return (2 * error / (1 + (1 + error / spread).sqrt())).mean()  # the same, without the difference of near numbers


def _overlaps(start: float, end: float, count: int, side: int) -> Tensor:
    """Share of each of `count` equal parts of [start, end] that lies in each of `side` equal parts of [0, 1]."""
    edges = torch.linspace(start, end, count + 1, dtype=torch.float64)
    own = torch.linspace(0, 1, side + 1, dtype=torch.float64)
    common = torch.minimum(edges[1:, None], own[1:]) - torch.maximum(edges[:-1, None], own[:-1])
    common = common.clamp_min(0)  # (count, side)
    return common / common.sum(dim=1, keepdim=True)
