"""The few statistics that a table of accuracies needs, each on plain numbers or arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.signal import convolve
from scipy.stats import binom, binomtest, norm, rankdata


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


def changes_by_image(
    before: NDArray[np.bool_], after: NDArray[np.bool_], image: NDArray[np.integer]
) -> NDArray[np.int64]:
    """For each image, in how many more of its cells the second classifier is right than the first: for `paired_test`.

    Args:
        before, after: (n,) whether each answer of the two is right.
        image: (n,) number of the image that each answer is of, from 0.
    """
    return np.rint(np.bincount(image, weights=after.astype(int) - before.astype(int))).astype(np.int64)


def paired_test(changes: NDArray[np.integer]) -> float:
    """Exact two-sided p-value of paired changes, under which each of them might as well have gone the other way.

    Where an image is in one cell its change is -1, 0 or 1, and this is `mcnemar`. Where it is in several (the same
    photograph under many corruptions), the changes of its cells are no independent evidence: they are added up first,
    and flip their sign together.

    Args:
        changes: (k,) for each image, in how many more of its cells the second classifier is right than the first.

    Returns:
        p in [0, 1]: how likely a sum at least as far from 0 is when the signs are tossed; 1 when nothing changed.
    """
    sizes, counts = np.unique(np.abs(changes[changes != 0]), return_counts=True)
    if len(sizes) == 0:
        return 1.0
    if len(sizes) == 1:
        return mcnemar(int((changes < 0).sum()), int((changes > 0).sum()))
    chances = np.ones(1)  # of each sum of the changes that went up
    for size, count in zip(sizes, counts, strict=True):
        steps = np.zeros(int(size * count) + 1)
        steps[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = convolve(chances, steps)
    sums = 2 * np.arange(len(chances)) - (len(chances) - 1)
    return float(np.clip(chances[np.abs(sums) >= abs(int(changes.sum()))].sum(), 0, 1))


def holm(p: Sequence[float]) -> list[float]:
    """Correct p-values of several tests at once by Holm's step-down method (1979), in their order.

    Reject what comes out below α, and the chance of any false rejection is below α, however the tests depend on each
    other.
    """
    order = np.argsort(p, kind="stable")
    left = len(p) - np.arange(len(p))  # tests not yet rejected when this one's turn comes
    stepped = np.maximum.accumulate(np.asarray(p, dtype=float)[order] * left)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(stepped, 1)
    return [float(value) for value in corrected]


def interval(correct: NDArray[np.bool_], image: NDArray[np.integer]) -> tuple[float, float]:
    """95 % interval of an accuracy (Wilson 1927), for answers of which several may be of the same image.

    Answers to one photograph under many corruptions say less than as many to different ones. Their number is replaced
    by that of independent answers of the same variance (Kish's effective sample size); without repetitions it is n.

    Args:
        correct: (n,) whether each answer is, n ≥ 1.
        image: (n,) number of the image that it is of, from 0.

    Returns:
        Lower and upper end, in [0, 1].
    """
    n, accuracy = len(correct), float(correct.mean())
    spread = float(np.square(np.bincount(image, weights=correct - accuracy)).sum())
    images = len(np.unique(image))
    effective = min(n, n * n * accuracy * (1 - accuracy) / spread) if spread > 0 else images
    z = float(norm.ppf(0.975))
    shrink = 1 + z * z / effective
    centre = (accuracy + z * z / (2 * effective)) / shrink
    half = z / shrink * math.sqrt(accuracy * (1 - accuracy) / effective + z * z / (4 * effective**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def auroc(confidence: NDArray[np.floating], correct: NDArray[np.bool_]) -> float | None:
    """How well confidence tells correct answers from wrong ones: area under the ROC curve (Mann & Whitney 1947).

    Args:
        confidence: (n,) of each answer.
        correct: (n,) whether it is.

    Returns:
        The chance that a correct answer is more confident than a wrong one, equal ones counted half: 1 is perfect
        knowledge of one's mistakes, 0.5 none. None where all answers are correct, or all wrong.
    """
    hits = int(correct.sum())
    misses = len(correct) - hits
    if hits == 0 or misses == 0:
        return None
    ranks = rankdata(confidence)  # equal ones share their mean rank
    return float((ranks[correct].sum() - hits * (hits + 1) / 2) / (hits * misses))


PER_BIN, MOST_BINS = 25, 10
"""Of a reliability diagram: answers that a bin holds at least (a standard error of 0.1 at most), and bins at most."""


@dataclass(frozen=True, kw_only=True)
class ReliabilityBin:
    """Answers of neighbouring confidence."""

    count: int
    minimum: float
    """Confidence of the least confident of them."""
    maximum: float
    """Confidence of the most confident of them."""
    confidence: float
    """Mean confidence: the accuracy that they claim."""
    accuracy: float
    low: float
    """Lower end of the accuracy's 95 % interval (Wilson 1927)."""
    high: float
    """Its upper end."""


def reliability_bins(confidence: NDArray[np.floating], correct: NDArray[np.bool_]) -> list[ReliabilityBin]:
    """Sort answers into bins of as many answers each, as many bins as there are answers for.

    Args:
        confidence: (n,) probability given to the predicted class, in [0, 1].
        correct: (n,) whether the prediction was.

    Returns:
        The bins from the least confident; none where there are too few answers for two.
    """
    count = min(MOST_BINS, len(confidence) // PER_BIN)
    if count < 2:
        return []
    order = np.argsort(confidence, kind="stable")
    bins = []
    for part in np.array_split(order, count):
        hits = int(correct[part].sum())
        interval = binomtest(hits, len(part)).proportion_ci(0.95, method="wilson")
        bins.append(
            ReliabilityBin(
                count=len(part),
                minimum=float(confidence[part[0]]),
                maximum=float(confidence[part[-1]]),
                confidence=float(confidence[part].mean()),
                accuracy=hits / len(part),
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
        correct: (n,) whether the prediction was.
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
