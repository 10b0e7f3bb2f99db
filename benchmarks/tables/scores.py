"""Rows of one method become a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ..runs.rows import MethodRows, joined
from .layouts import CROSS_DATASET
from .stats import expected_calibration_error, mcnemar, near_chance, standard_error
from .table import Score


def score_cell(rows: MethodRows, cell: Mapping[str, Any], method: str) -> Score:
    """Score one method on one cell."""
    score = summary([rows])
    marks = []
    if cell["images"] < cell["total"]:
        marks.append("subset")
    if cell["generated"]:
        marks.append("generated")
    if cell["dataset"] in CROSS_DATASET and str(cell["source"]).startswith("hf:"):
        marks.append("hub split")
    if len(rows) < cell["images"]:
        marks.append("incomplete")
    if score.failed:
        marks.append("failed")
    if method in cell.get("own_prompts", {}):
        marks.append("own prompt")
    if score.n and near_chance(int((rows.rank == 1).sum()), score.n, cell["classes"]):
        marks.append("near chance")
    return replace(score, marks=tuple(marks))


def summary(parts: Sequence[MethodRows]) -> Score:
    """Score the images of one or more cells together."""
    column = partial(joined, parts)
    answered = column("error") == None  # noqa: E711 - elementwise, on objects
    n, failed = int(answered.sum()), int((~answered).sum())
    if n == 0:
        return Score(0, failed, None)
    label = column("label")[answered]
    prediction = column("prediction")[answered]
    teacher = column("teacher_prediction")[answered]
    correct, teacher_correct = prediction == label, teacher == label
    lost, gained = int((teacher_correct & ~correct).sum()), int((~teacher_correct & correct).sum())
    accuracy = float(correct.mean())
    seconds = float((column("seconds") + column("shared_seconds"))[answered].sum())
    return Score(
        n=n,
        failed=failed,
        accuracy=100 * accuracy,
        stderr=100 * standard_error(accuracy, n),
        agreement=100 * float((prediction == teacher).mean()),
        right_to_wrong=lost,
        wrong_to_right=gained,
        mcnemar_p=mcnemar(lost, gained),
        ece=expected_calibration_error(column("probability")[answered], correct),
        nll=float(column("nll")[answered].mean()),
        images_per_second=n / seconds if seconds > 0 else None,
    )


def best_steps(rows: MethodRows) -> tuple[Score, Score] | None:
    """The scores at the best step, chosen with labels: the best of the cell, and the best of each image.

    The prediction before the first step is that of an untrained student and no candidate. None where no predictions of
    steps were recorded, or no image has an answer.
    """
    answered = rows.error == None  # noqa: E711 - elementwise, on objects
    if rows.step_predictions is None or not answered.any():
        return None
    correct = rows.step_predictions[answered, 1:] == rows.label[answered, None]  # (n, K)
    n, failed = len(correct), int((~answered).sum())
    of_cell, of_image = (
        Score(n, failed, 100 * accuracy, 100 * standard_error(accuracy, n))
        for accuracy in (float(correct.mean(0).max()), float(correct.any(1).mean()))
    )
    return of_cell, of_image
