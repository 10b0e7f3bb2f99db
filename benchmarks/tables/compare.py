"""Two runs of one configuration, image by image: has anything become worse, or merely different?

Answers alone are a weak check: a student that has converged answers as its teacher does, however it came there. So what
it was computed from is compared too: loss and cosine of the student, negative log-likelihood, logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from apm.errors import UsageError

from ..runs.records import Records
from ..runs.rows import MethodRows
from ..runs.run_json import changed_configuration
from .stats import mcnemar


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is still accepted, in each cell and for each method.

    The last four are of paired changes over the images that both runs answer (see `Comparison.moved`). They lie between
    what processors, their threads and libraries change and what small faults change; measured in regression.md.
    """

    tolerance: float = 0.5
    """Percentage points by which accuracy may fall."""
    max_changed: float = 1.0
    """Percent of the predictions that may differ; an answer gained or lost counts as a difference."""
    loss: float = 0.01
    """Relative change of the loss."""
    cosine: float = 0.001
    """Change of the cosine."""
    nll: float = 0.01
    """Change of the negative log-likelihood, in nats."""
    logits: float = 0.01
    """Change of the logits."""

    def __post_init__(self) -> None:
        for name, value in (("tolerance", self.tolerance), ("max-changed", self.max_changed)):
            if not 0 <= value <= 100:
                raise UsageError(f"--{name} is {value}; it must be between 0 and 100 (percent).")
        for name in MEASURES:
            if not (value := getattr(self, name)) >= 0:
                raise UsageError(f"--max-{name}-change is {value}; it must be 0 or more.")


MEASURES = tuple(field.name for field in fields(Limits))[2:]
"""What is compared beside the predictions: names of fields of the rows."""


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
    moved: Mapping[str, float]
    """By name in `MEASURES`, how far it moved: the root mean square of the paired change (over images, and of logits
    over classes), for the loss divided by that of the baseline. Absent where either run did not record it."""
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
    if found := changed_configuration(baseline.run, new.run):
        raise UsageError(
            f"{new.path} and {baseline.path} are runs of different configurations and cannot be compared. Baseline "
            f"first, then new run: {found}."
        )
    return [
        _compare_rows(cell, method, rows, old, limits)
        for cell in baseline.cells
        for method, rows, old in _paired(new, baseline, cell)
    ]


def unchecked(results: Sequence[Comparison]) -> dict[str, tuple[str, ...]]:
    """By measure, the methods of which some cell could not be compared in it: it is not in both records."""
    return {
        name: methods
        for name in MEASURES
        if (methods := tuple(dict.fromkeys(result.method for result in results if name not in result.moved)))
    }


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
    by_id = {name: index for index, name in enumerate(new.id)}
    try:
        order = np.array([by_id[name] for name in old.id])
    except KeyError as error:
        raise UsageError(f"{cell}: {error.args[0]} is in the baseline and not in the new run.") from None
    prediction = new.prediction[order]  # -1 where there is no answer
    correct, was_correct = prediction == new.label[order], old.prediction == old.label
    differs = prediction != old.prediction
    accuracy, before = 100 * float(correct.mean()), 100 * float(was_correct.mean())
    moved = {name: change for name in MEASURES if (change := _change(name, new, old, order)) is not None}
    failures = []
    if relabelled := int((new.label[order] != old.label).sum()):
        failures.append(f"{relabelled} of {len(old)} true classes changed")
    if before - accuracy > limits.tolerance + 1e-9:
        failures.append(f"accuracy fell from {before:.2f} to {accuracy:.2f} % (tolerance {limits.tolerance:g} points)")
    if 100 * float(differs.mean()) > limits.max_changed + 1e-9:
        share = f"{int(differs.sum())} of {len(old)} predictions changed"
        failures.append(f"{share} ({limits.max_changed:g} % allowed)")
    failures += [*_gone(new, old, order), *_moved_too_far(moved, limits)]
    return Comparison(
        cell,
        method,
        len(old),
        accuracy,
        before,
        tuple(old.id[differs]),
        tuple(old.id[was_correct & ~correct]),
        tuple(old.id[~was_correct & correct]),
        moved,
        tuple(failures),
    )


def _change(name: str, new: MethodRows, old: MethodRows, order: NDArray[np.int64]) -> float | None:
    """How far a measure moved, None where no image has it in both runs."""
    now, was = getattr(new, name), getattr(old, name)
    if now is None or was is None:
        return None
    now = now[order]
    both = np.isfinite(now) & np.isfinite(was)
    if not both.any():
        return None
    size = _rms(was[both]) if name == "loss" else 1.0
    change = _rms(now[both] - was[both])
    return change / size if size else float("inf") if change else 0.0


def _gone(new: MethodRows, old: MethodRows, order: NDArray[np.int64]) -> Iterator[str]:
    """Name measures that a method no longer gives; logits are the user's choice, and no answer is a change already."""
    for name in MEASURES:
        if name != "logits":
            now, was = getattr(new, name)[order], getattr(old, name)
            if gone := int((np.isfinite(was) & ~np.isfinite(now) & (new.prediction[order] >= 0)).sum()):
                yield f"{name} is no longer recorded for {gone} of {len(old)} images"


def _rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _moved_too_far(moved: Mapping[str, float], limits: Limits) -> Iterator[str]:
    for name, change in moved.items():
        allowed = getattr(limits, name)
        if change > allowed:
            amount = f"{100 * change:.3g} % ({100 * allowed:g} %" if name == "loss" else f"{change:.3g} ({allowed:g}"
            yield f"{name} moved by {amount} allowed)"
