"""What methods do with the teacher's features of one image's views, and with features that are broken."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from apm.test_time.targets import entropies, kept_count


def usable(features: Tensor) -> list[bool]:
    """Of each image's views (B, V, D), whether all have a direction: none zero, all finite."""
    lengths = torch.linalg.vector_norm(features.float(), dim=2)
    return (lengths.isfinite() & (lengths > 0)).all(dim=1).tolist()


def answer_each(features: Tensor, classes: int, step: Callable[[Tensor], Tensor]) -> Tensor:
    """Answer images one by one, in their order.

    An image with a feature that is zero or not finite has no direction to compare: its answer is NaN, which a run
    records as a failure, and `step` never sees it, so that nothing of it stays in a method that remembers.

    Args:
        features: (B, V, D) of the views, of any length.
        classes: C.
        step: from an image's views, (V, D) of unit length, to its logits (C,).

    Returns:
        (B, C) float32.
    """
    answers = features.new_full((len(features), classes), math.nan, dtype=torch.float32)
    for answer, views, good in zip(answers, features, usable(features), strict=True):
        if good:
            answer.copy_(step(normalize(views.float(), dim=1)))
    return answers


def most_confident(logits: Tensor, keep: float) -> Tensor:
    """Indices of the views of lowest entropy, lowest first.

    Args:
        logits: (V, C).
        keep: their share, rounded down to a whole number; at least one view is kept.
    """
    return entropies(logits.softmax(dim=1)).argsort(stable=True)[: kept_count(len(logits), keep)]


def marginal_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of the mean prediction of several views: (V, C) logits → scalar."""
    mean = logits.log_softmax(dim=1).logsumexp(dim=0) - torch.tensor(float(len(logits)), device=logits.device).log()
    return -(mean.exp() * mean).sum()


def entropy_share(probabilities: Tensor) -> float:
    """Entropy of a prediction (C,) in nats over log2 of the classes, a mixture of units as published."""
    return float(entropies(probabilities)) / math.log2(max(len(probabilities), 2))
