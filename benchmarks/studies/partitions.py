"""Cuts fields into parts, and scores how close their edges lie to those of the truth.

Precision, recall and F are those of Martin et al. 2004. An edge lies between two locations, not on one: with S × S
locations, edges are cells of a lattice of 2S - 1, so that neither side of a border is preferred. Edges are not matched
one to one: two found beside one true edge both count as right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from apm.student import islands
from apm.student.islands import Labels


def cut_into_islands(field: NDArray[np.floating], parts: int) -> Labels:
    """Islands of a field less its mean, at the threshold that gives nearest to `parts` of them."""
    right, below = islands.neighbour_cosines(field - field.mean(axis=(0, 1)))
    cosines = np.append(np.unique(np.concatenate([right.ravel(), below.ravel()])), 2)  # at 2 no two places agree

    def cut(number: int) -> Labels:
        least = cosines[number] - 1e-9  # as `islands.regions` has it
        return islands.connected(right >= least, below >= least)

    low, high = 0, len(cosines) - 1
    while low < high:  # the number of islands grows with the threshold
        middle = (low + high) // 2
        if cut(middle).max() + 1 < parts:
            low = middle + 1
        else:
            high = middle
    return min(map(cut, {max(0, low - 1), low}), key=lambda labels: abs(int(labels.max()) + 1 - parts))


@dataclass(frozen=True)
class Edges:
    """How well found edges fit true ones; each in [0, 1]."""

    precision: float
    """Share of the found edges near a true one; 0 where none is found."""
    recall: float
    """Share of the true edges near a found one; 0 where there is none."""

    @property
    def f(self) -> float:
        """Harmonic mean of both."""
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / both if both else 0.0


def edges(labels: Labels) -> NDArray[np.bool_]:
    """Where (2S - 1, 2S - 1) neighbours to the right or below have other labels (S, S); those below 0 are not known."""
    rows, cols = labels.shape
    found = np.zeros((2 * rows - 1, 2 * cols - 1), dtype=bool)
    for at, one, other in (
        ((slice(0, None, 2), slice(1, None, 2)), labels[:, :-1], labels[:, 1:]),
        ((slice(1, None, 2), slice(0, None, 2)), labels[:-1], labels[1:]),
    ):
        found[at] = (one != other) & (one >= 0) & (other >= 0)
    return found


def fit(found: Labels, truth: Labels, tolerance: float) -> Edges:
    """Compare the edges of two labellings (S, S) of the same places.

    Args:
        found: a partition.
        truth: the right one; below 0 where nothing is known: edges there are neither right nor wrong.
        tolerance: distance up to which an edge is near another, as a share of the square's diagonal.
    """
    reach = tolerance * math.sqrt(2) * 2 * len(truth) + 1e-9  # in cells of the lattice of edges, half a place wide
    true = edges(truth)
    drawn = edges(found)
    judged = edges(np.where(truth < 0, -1, found))
    return Edges(precision=_near(judged, true, reach), recall=_near(true, drawn, reach))


def _near(some: NDArray[np.bool_], others: NDArray[np.bool_], reach: float) -> float:
    """Share of some edges that have one of the others within reach."""
    if not some.any() or not others.any():
        return 0.0
    return float((distance_transform_edt(~others)[some] <= reach).mean())
