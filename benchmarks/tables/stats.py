"""The few statistics that a table of accuracies needs, each on plain numbers or arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest


def standard_error(accuracy: float, n: int) -> float:
    """Binomial standard error of an accuracy in [0, 1] measured on `n` ≥ 1 images: √(a(1-a)/n)."""
    return math.sqrt(accuracy * (1 - accuracy) / n)


def mcnemar(right_to_wrong: int, wrong_to_right: int) -> float:
    """Exact two-sided p-value of McNemar's paired test (1947; the exact binomial form).

    Args:
        right_to_wrong: images that the first classifier gets right and the second wrong.
        wrong_to_right: images the other way round. Images on which both agree carry no information.

    Returns:
        p in (0, 1]; 1 when there are no flips at all.
    """
    flips = right_to_wrong + wrong_to_right
    if flips == 0:
        return 1.0
    return float(binomtest(right_to_wrong, flips).pvalue)


PER_BIN, MOST_BINS = 25, 10
"""Of a reliability diagram: answers that a bin holds at least (a standard error of 0.1 at most), and bins at most."""


@dataclass(frozen=True, kw_only=True)
class ReliabilityBin:
    """Answers of neighbouring confidence."""

    count: int
    least: float
    """Confidence of the least confident of them."""
    greatest: float
    """Confidence of the most confident of them."""
    confidence: float
    """Mean confidence: the accuracy that they claim."""
    accuracy: float
    low: float
    """Lower end of the accuracy's 95 % interval (Wilson 1927)."""
    high: float
    """Its upper end."""


def reliability_bins(
    confidence: NDArray[np.floating], correct: NDArray[np.bool_], *, per_bin: int = PER_BIN, most: int = MOST_BINS
) -> list[ReliabilityBin]:
    """Sort answers into bins of as many answers each, as many bins as there are answers for.

    Args:
        confidence: (n,) probability given to the predicted class, in [0, 1].
        correct: (n,) whether the prediction was right.
        per_bin: answers that a bin holds at least.
        most: bins at most.

    Returns:
        The bins from the least confident; none where there are too few answers for two.
    """
    count = min(most, len(confidence) // per_bin)
    if count < 2:
        return []
    order = np.argsort(confidence, kind="stable")
    bins = []
    for part in np.array_split(order, count):
        right = int(correct[part].sum())
        interval = binomtest(right, len(part)).proportion_ci(0.95, method="wilson")
        bins.append(
            ReliabilityBin(
                count=len(part),
                least=float(confidence[part[0]]),
                greatest=float(confidence[part[-1]]),
                confidence=float(confidence[part].mean()),
                accuracy=right / len(part),
                low=float(interval.low),
                high=float(interval.high),
            )
        )
    return bins


BINS = 15
"""Of the expected calibration error, as it is usually published."""


def expected_calibration_error(
    confidence: NDArray[np.floating], correct: NDArray[np.bool_], *, bins: int = BINS
) -> float:
    """Expected calibration error over `bins` equally wide bins of confidence (Guo et al. 2017).

    Args:
        confidence: (n,) probability given to the predicted class, in [0, 1].
        correct: (n,) whether the prediction was right.
        bins: number of bins.

    Returns:
        Σ over bins of (share of images) · |accuracy - mean confidence|, in [0, 1].
    """
    # Bins are closed on the right, as in the paper: (0, 1/M], (1/M, 2/M], …
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return float(np.abs(np.bincount(index, weights=correct - confidence)).sum() / len(confidence))


def near_chance(correct: int, n: int, classes: int) -> bool:
    """Whether `correct` of `n` is at most two standard errors (of a guesser's accuracy) above 1/`classes`."""
    chance = 1 / classes
    return correct / n <= chance + 2 * standard_error(chance, n)
