"""Two runs of one configuration, image by image: has anything become worse, or merely different?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from apm.errors import UsageError

from .records import MethodRows, Records, describe_differences, differences
from .stats import mcnemar


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is still accepted, in each cell and for each method."""

    tolerance: float = 0.5
    """Percentage points by which accuracy may fall."""
    max_changed: float = 1.0
    """Percent of the predictions that may differ; an answer gained or lost counts as a difference."""

    def __post_init__(self) -> None:
        for name, value in (("tolerance", self.tolerance), ("max-changed", self.max_changed)):
            if not 0 <= value <= 100:
                raise UsageError(f"--{name} is {value}; it must be between 0 and 100 (percent).")


@dataclass(frozen=True)
class Comparison:
    """One method on one cell in both runs."""

    cell: str
    method: str
    n: int
    """Images in both runs."""
    accuracy: float
    """Percent, of the new run; an image without an answer counts as wrong here, as it would be in use."""
    baseline_accuracy: float
    changed: tuple[str, ...]
    """Ids of the images whose prediction differs, or that one run has no answer for."""
    right_to_wrong: tuple[str, ...]
    """Ids of the images that the baseline gets right and the new run wrong."""
    wrong_to_right: tuple[str, ...]
    failures: tuple[str, ...]
    """Why this does not pass, one sentence each; empty when it does."""

    @property
    def mcnemar_p(self) -> float:
        """Exact p-value of the flips."""
        return mcnemar(len(self.right_to_wrong), len(self.wrong_to_right))

    @property
    def passed(self) -> bool:
        return not self.failures


def compare(new: Records, baseline: Records, limits: Limits) -> list[Comparison]:
    """Compare two runs, paired by sample id.

    Returns:
        One comparison for each cell and method, in the run's order.

    Raises:
        UsageError: the configurations differ (the fields are named), or a run is not complete.
    """
    if found := differences(baseline.run["config"], new.run["config"]):
        raise UsageError(
            f"{new.path} and {baseline.path} are runs of different configurations, and cannot be compared. "
            f"Baseline before, new run now: {describe_differences(found)}."
        )
    return [
        _compare_rows(cell, method, rows, old, limits)
        for cell in baseline.cells
        for method, rows, old in _paired(new, baseline, cell)
    ]


def _paired(new: Records, baseline: Records, cell: str) -> Sequence[tuple[str, MethodRows, MethodRows]]:
    images = baseline.cells[cell]["images"]
    both = []
    for records in (new, baseline):
        rows = dict(records.rows(cell))
        for method in records.methods:
            have = len(rows[method]) if method in rows else 0
            if have != images:
                raise UsageError(
                    f"{records.path} has {have} of {images} images of {cell} by {method}. "
                    "Finish it by running its command again."
                )
        both.append(rows)
    return [(method, both[0][method], both[1][method]) for method in baseline.methods]


def _compare_rows(cell: str, method: str, new: MethodRows, old: MethodRows, limits: Limits) -> Comparison:
    by_id = {name: index for index, name in enumerate(new.ids)}
    try:
        order = np.array([by_id[name] for name in old.ids])
    except KeyError as error:
        raise UsageError(f"{cell}: {error.args[0]} is in the baseline and not in the new run.") from None
    prediction = new.prediction[order]  # -1 where there is no answer
    right, was_right = prediction == old.label, old.prediction == old.label
    differs = prediction != old.prediction
    accuracy, before = 100 * float(right.mean()), 100 * float(was_right.mean())
    failures = []
    if before - accuracy > limits.tolerance + 1e-9:
        failures.append(f"accuracy fell from {before:.2f} to {accuracy:.2f} % (tolerance {limits.tolerance:g} points)")
    if 100 * float(differs.mean()) > limits.max_changed + 1e-9:
        share = f"{int(differs.sum())} of {len(old)} predictions changed"
        failures.append(f"{share} ({limits.max_changed:g} % allowed)")
    return Comparison(
        cell,
        method,
        len(old),
        accuracy,
        before,
        tuple(old.ids[differs]),
        tuple(old.ids[was_right & ~right]),
        tuple(old.ids[~was_right & right]),
        tuple(failures),
    )
