"""The parse tree in the columns: islands of agreement at every level, each inside one of the level above."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from apm.errors import UsageError
from apm.settings import cosine
from apm.student.islands import Labels, regions


@dataclass(frozen=True, kw_only=True)
class Island:
    """Connected locations whose embeddings at one level agree.

    Attributes:
        level: from 0, the lowest.
        places: (row, column) of each, in reading order.
        parts: the islands of the next lower level that lie in it; together they have all its places.
    """

    level: int
    places: tuple[tuple[int, int], ...]
    parts: tuple[Island, ...]

    def as_json(self) -> dict[str, Any]:
        """Nested plain values."""
        return {
            "level": self.level,
            "places": [list(place) for place in self.places],
            "parts": [part.as_json() for part in self.parts],
        }


def island_labels(levels: ArrayLike, threshold: float) -> Labels:
    """Number the islands of each level: embeddings (H, W, L, D) → (L, H, W), each level from 0 in reading order.

    Neighbours are in one island where their embeddings have a cosine ≥ threshold, and where the level above has them in
    one island too: so a part never is in two wholes.

    Raises:
        UsageError: another shape, numbers that are not finite, or a threshold that is no cosine.
    """
    values = np.asarray(levels, dtype=np.float64)
    if values.ndim != 4 or not values.size:
        raise UsageError(f"Columns have shape (H, W, L, D), not {values.shape}.")
    cosine("The threshold", threshold)
    found: list[Labels] = []
    for level in reversed(range(values.shape[2])):
        labels = regions(values[:, :, level], threshold, within=found[-1] if found else None)
        found.append(_in_reading_order(labels))
    return np.stack(found[::-1])


def parse_tree(labels: NDArray[np.int64]) -> tuple[Island, ...]:
    """Islands of the highest level with all their parts, from the numbers (L, H, W) that `island_labels` gives."""

    def islands(level: int, inside: NDArray[np.bool_]) -> tuple[Island, ...]:
        if level < 0:
            return ()
        found = []
        for number in np.unique(labels[level][inside]):
            here = labels[level] == number
            places = tuple((int(row), int(column)) for row, column in np.argwhere(here))
            found.append(Island(level=level, places=places, parts=islands(level - 1, here)))
        return tuple(found)

    return islands(len(labels) - 1, np.ones(labels.shape[1:], dtype=bool))


def _in_reading_order(labels: Labels) -> Labels:
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].reshape(labels.shape).astype(np.int64)
