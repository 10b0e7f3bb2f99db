"""The robust mode of a set of view features: MeanShift for Test-time Augmentation (Zanella & Ben Ayed, CVPR 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CONVERGED = 1e-6
"""Euclidean change of an iterate below which an inner loop stops early."""
SMALLEST_BANDWIDTH = 1e-4
"""Bandwidth of views that (nearly) coincide, which would otherwise divide by zero; distances lie in [0, 2]."""


@dataclass(frozen=True)
class Mode:
    """Where the views of one image are densest, and how much each of them counts for it."""

    vector: Tensor
    """(D,) float32 of unit length."""
    inlierness: Tensor
    """(V,) float32, ≥ 0, summing to 1."""


def bandwidths(features: Tensor, neighbours: float = 0.3) -> Tensor:
    """One Gaussian bandwidth a view: the root of half its mean squared distance to its nearest views.

    Args:
        features: (V, D) unit vectors.
        neighbours: the share of the other views, in (0, 1], that count as near.

    Returns:
        (V,) float32, in units of distance between unit vectors, at least `SMALLEST_BANDWIDTH`.
    """
    others = len(features) - 1
    nearest = max(1, int(neighbours * others))
    squared = _squared_distances(features, features).sort(dim=1).values[:, 1 : nearest + 1]  # (V, nearest), self cut
    if others < 1:  # a lone view has no neighbour: any width gives the same mode
        return features.new_ones(1)
    return (squared.mean(dim=1) / 2).sqrt().clamp_min(SMALLEST_BANDWIDTH)  # (V,)


@torch.no_grad()
def mean_shift_mode(
    features: Tensor,
    probabilities: Tensor,
    *,
    lambda_y: float = 0.2,
    lambda_q: float = 4.0,
    iterations: int = 5,
    neighbours: float = 0.3,
) -> Mode:
    """Find the mode of one image's view features, weighing each view by an inlierness score.

    Alternates two inner loops, as in algorithm 1 of the paper: the inlierness scores, a softmax of each view's kernel
    density at the mode and of its affinity (agreement of predictions) with the views that count; and mean-shift steps
    of the mode under those scores. The mode starts at view 0, the image itself.

    Args:
        features: (V, D) unit vectors, view 0 the image itself.
        probabilities: (V, C) predictions of the same views; they give the affinities. No ground truth is involved.
        lambda_y: weight of the entropy that keeps the scores spread, > 0.
        lambda_q: weight of the affinities against the density, ≥ 0.
        iterations: number of alternations, and the most steps of each inner loop.
        neighbours: see `bandwidths`.

    Returns:
        The mode and the inlierness scores.
    """
    features = features.float()
    width = bandwidths(features, neighbours)  # (V,)
    affinity = probabilities.float() @ probabilities.float().T  # (V, V)
    scores = features.new_full((len(features),), 1 / len(features))  # (V,)
    mode = features[0]  # (D,)
    for _ in range(iterations):
        density = _kernel(features, mode, width)
        for _ in range(iterations):
            previous, scores = scores, ((density + lambda_q * (affinity @ scores)) / lambda_y).softmax(dim=0)
            if torch.linalg.vector_norm(scores - previous) < CONVERGED:
                break
        for _ in range(iterations):
            shifted = (scores * _kernel(features, mode, width)) @ features  # the normalisation absorbs the divisor
            previous, mode = mode, torch.nn.functional.normalize(shifted, dim=0)
            if torch.linalg.vector_norm(mode - previous) < CONVERGED:
                break
    return Mode(mode, scores)


def _squared_distances(left: Tensor, right: Tensor) -> Tensor:
    """(V, D) and (W, D) → (V, W), by differences: the dot-product form loses the small distances to rounding."""
    return torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist").square()


def _kernel(features: Tensor, mode: Tensor, width: Tensor) -> Tensor:
    """Gaussian kernel of each view, with that view's own bandwidth, at the mode: (V,)."""
    return torch.exp(-(features - mode).square().sum(dim=1) / (2 * width.square()))
