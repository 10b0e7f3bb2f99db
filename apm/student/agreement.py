"""Agreement between columns: each location's feature is pulled towards its neighbours' consensus.

In GLOM (Hinton 2021, section 1.1) every location attends to the same level at nearby locations and moves towards their
mean, weighted by similarity: similar locations become more similar, and islands form. Here this is an additional loss
on a field f at the N locations of the student's grid::

    m_i = sum_j a_ij f_j,  a_i = softmax over the neighbours j of f_i . f_j / sqrt(D)      the consensus
    loss = mean over places and numbers of (f_i - m_i)²

No gradient flows through the consensus, which is a target, as in co-distillation (Anil et al. 2018). With such a
gradient a location would also change its neighbours' attention and features to reduce its own loss, and each pull would
be counted twice.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from apm.student.config import APMConfig
from apm.student.matmul import mean_square, product
from apm.student.position import grid_locations

RADIUS = 2.0
"""Radius of the neighbourhood in cells of the student's grid: 12 neighbours, fewer at the edges. Small enough that
objects are larger, and large enough that a location at an object's edge has neighbours on its own side."""


def neighbours(grid: int) -> Tensor:
    """Which locations of a square grid attend to which: (N, N) bool, N = grid²; none to itself."""
    where = torch.stack(grid_locations(grid), dim=1)  # (N, 2)
    squares = (where[:, None] - where).square().sum(dim=2)
    return (squares > 0) & (squares <= RADIUS**2)


class AgreementLoss:
    """``weight`` times the loss above of B fields in float32, with its gradient by hand.

    It takes 4 N² bytes, and 4 N (N + D) a sample: 1 MB in all with the small preset and one sample, 10 MB with the
    paper's.
    """

    def __init__(self, config: APMConfig, batch: int, *, weight: float, device: torch.device) -> None:
        """Make the buffers."""
        self.weight, count = weight, config.cells
        far = torch.zeros(count, count).masked_fill_(~neighbours(config.grid), -torch.inf)
        self._far = far.to(device)
        self._attention = torch.zeros(batch, count, count, device=device)
        self._off = torch.zeros(batch, count, config.dim, device=device)

    def forward(self, field: Tensor, d_field: Tensor) -> Tensor:
        """Losses (B,) of fields (B, N, D), all N locations; their gradient is added to ``d_field`` (B, N, D)."""
        _, count, dim = field.shape
        attention, off = self._attention, self._off
        product(field, field.mT, out=attention)
        attention /= math.sqrt(dim)
        attention += self._far
        attention -= attention.amax(dim=2, keepdim=True)  # the softmax, in its own memory
        attention.exp_()
        attention /= attention.sum(dim=2, keepdim=True)
        product(attention, field, out=off)
        torch.sub(field, off, out=off)
        d_field.add_(off, alpha=self.weight * 2 / (count * dim))
        return self.weight * mean_square(off)
