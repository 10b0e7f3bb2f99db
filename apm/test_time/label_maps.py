"""Maps of labels on the image: the student's field, read at any resolution, compared with the text features.

At each location the field's feature is classified as a token would be: cosine with every label's text feature × the
teacher's logit scale, softmax over the labels. The map of a label is its probability from place to place. It says
something about the place only if the student was fitted to a target that does: the teacher's grid (Modi & Rawat 2024,
section 3, the grid loss), not its one token alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from apm.student.position import dense_locations
from apm.text.zeroshot import ZeroShotHead

STEPS, LR = 150, 1e-3
"""For a student whose field is shown. A grid is harder to fit than one token: at 1e-4 there is little in the field
after 50 steps."""
VIEWS = 16
"""Views of the image whose grids are its target: the grid of the whole image is coarse."""
CHUNK = 4096
"""Locations classified at a time; beside the maps, memory does not depend on their number."""


@dataclass(frozen=True, kw_only=True)
class LabelMaps:
    """The maps of K labels over a square of H × W locations, in reading order from the top left."""

    labels: tuple[str, ...]
    """The K labels."""
    log_odds: Tensor
    """(K, H, W) float32: log p/(1-p), p the probability of the label there. It does not saturate as p does."""
    best: Tensor
    """(H, W) int64: number, among all labels of the head, of the most probable one."""

    @property
    def probabilities(self) -> Tensor:
        """(K, H, W) float32 in [0, 1]."""
        return self.log_odds.sigmoid()


def label_maps(features: Tensor, head: ZeroShotHead, chosen: Sequence[int]) -> LabelMaps:
    """Classify the features of a grid.

    Args:
        features: (H, W, D), of any length.
        head: the labels' text features.
        chosen: numbers of the K labels whose maps are wanted.
    """
    height, width, dim = features.shape
    return _maps(lambda some: features.reshape(-1, dim)[some], (height, width), head, chosen)


def field_maps(
    field: Callable[[Tensor, Tensor], Tensor], grid: int, size: int, head: ZeroShotHead, chosen: Sequence[int]
) -> LabelMaps:
    """Query a field at size × size locations and classify what it answers.

    Args:
        field: rows and columns (Q,) → features (Q, D).
        grid: the student's cells a side.
        size: locations a side.
        head: the labels' text features.
        chosen: numbers of the K labels whose maps are wanted.
    """
    rows, cols = dense_locations(grid, size)
    return _maps(lambda some: field(rows[some], cols[some]), (size, size), head, chosen)


def peak(values: Tensor) -> tuple[float, float]:
    """Where a map (H, W) is largest: (y, x), the middle of that cell, as shares of height and width in (0, 1).

    Of several equal maxima the first in reading order is taken.
    """
    height, width = values.shape
    row, col = divmod(int(values.flatten().argmax()), width)
    return (row + 0.5) / height, (col + 0.5) / width


def _maps(
    features: Callable[[slice], Tensor], shape: tuple[int, int], head: ZeroShotHead, chosen: Sequence[int]
) -> LabelMaps:
    count = shape[0] * shape[1]
    index = torch.tensor(list(chosen), dtype=torch.long)
    log_odds = torch.empty(len(index), count)
    best = torch.empty(count, dtype=torch.long)
    text = head.features.double().cpu()
    for start in range(0, count, CHUNK):
        some = slice(start, min(start + CHUNK, count))
        tokens = functional.normalize(features(some).double().cpu(), dim=-1)  # (Q, D)
        logits = head.logit_scale * (tokens @ text.T)  # (Q, C)
        best[some] = logits.argmax(dim=-1)
        for row, label in enumerate(index.tolist()):
            rest = logits.clone()
            rest[:, label] = -torch.inf
            log_odds[row, some] = (logits[:, label] - rest.logsumexp(dim=-1)).float()
    return LabelMaps(
        labels=tuple(head.labels[label] for label in index.tolist()),
        log_odds=log_odds.unflatten(1, shape),
        best=best.unflatten(0, shape),
    )
