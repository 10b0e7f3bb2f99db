"""The mode of an adapted student's field as its token: what most locations agree on, instead of the mean of all."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

from apm.student.position import grid_locations
from apm.test_time.mean_shift import mean_shift_mode
from apm.test_time.trainer import AdaptResult
from apm.text.zeroshot import ZeroShotHead


@torch.no_grad()
def mode_of(field: Tensor, head: ZeroShotHead) -> Tensor:
    """The mode of a field's features, by mean shift over its locations from the one nearest to their mean.

    Args:
        field: (N, D) features at N places, of any length.
        head: its predictions weigh the places, as MTA weighs views (`mean_shift_mode`).

    Returns:
        (D,) float32, as long as the mean of the features.
    """
    mean = field.float().mean(dim=0)
    places = functional.normalize(field.float(), dim=1)
    first = int((places @ mean).argmax())
    places = torch.cat((places[first : first + 1], places[:first], places[first + 1 :]))
    mode = mean_shift_mode(places, head.probabilities(places))
    return mode.vector * torch.linalg.vector_norm(mean)


@torch.no_grad()
def read_modes(result: AdaptResult, head: ZeroShotHead, side: int, targets: Tensor) -> AdaptResult:
    """The same result with the modes of its fields for tokens, and their cosines to the targets.

    Args:
        result: with its fields kept.
        head: as in `mode_of`.
        side: of the student's grid, in cells: its own locations are the places.
        targets: (B, D).
    """
    fields = result.features(*grid_locations(side))  # (B, N, D)
    found = zip(fields, result.finite.tolist(), result.tokens, strict=True)
    tokens = torch.stack([mode_of(field, head) if finite else token for field, finite, token in found])
    cosines = functional.cosine_similarity(tokens, targets.to(tokens), dim=1)
    return dataclasses.replace(result, tokens=tokens, final_cosines=cosines)
