"""Rows of a stream method that were run in several seeded orders, as one row: mean and standard deviation over them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import fmean, stdev

from .table import Score, TableRow

_AVERAGED = ("accuracy", "agreement", "right_to_wrong", "wrong_to_right", "ece", "nll", "images_per_second")


def joined_orders(rows: Sequence[TableRow]) -> list[TableRow]:
    """Join rows that differ in nothing but the order of the stream; others stay as they are.

    The answers that belong to a joined row are those of its first order.
    """
    groups: dict[str, list[TableRow]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(_key(row) or str(number), []).append(row)
    return [one for group in groups.values() for one in _joined(group)]


def _key(row: TableRow) -> str | None:
    """What the rows of one method have in common over its orders; None where there is no order to speak of."""
    if not row.settings.get("stream") or row.kind == "published":
        return None
    settings = {name: value for name, value in row.settings.items() if name != "order"}
    counts = {column: (score.n, score.failed) for column, score in row.cells.items()}
    return json.dumps([row.kind, row.method, row.teacher, row.prompts, settings, counts], sort_keys=True)


def _joined(group: Sequence[TableRow]) -> Iterator[TableRow]:
    orders = {row.settings.get("order", row.settings["seed"]) for row in group} if len(group) > 1 else set()
    if len(orders) < max(len(group), 2):  # one, or the same order twice: nothing to average
        yield from group
        return
    ranked = sorted(group, key=lambda row: row.settings.get("order", row.settings["seed"]))
    first = ranked[0]
    averages = [row.average for row in ranked if row.average is not None]
    ood = [row.ood_average for row in ranked if row.ood_average is not None]
    totals = [row.total for row in ranked if row.total is not None]
    yield replace(
        first,
        source=", ".join(dict.fromkeys(row.source for row in ranked)),
        cells={column: _mean([row.cells[column] for row in ranked]) for column in first.cells},
        average=fmean(averages) if averages else None,
        ood_average=fmean(ood) if ood else None,
        total=_mean(totals) if totals else None,
        settings={**first.settings, "order": ", ".join(map(str, sorted(orders)))},
    )


def _mean(scores: Sequence[Score]) -> Score:
    """Means over the orders; the standard error gives way to their standard deviation, and there is no paired test."""
    first = scores[0]
    changes: dict[str, float | None] = {}
    for name in _AVERAGED:
        values = [value for score in scores if (value := getattr(score, name)) is not None]
        changes[name] = fmean(values) if len(values) == len(scores) else None
    for name in ("right_to_wrong", "wrong_to_right"):  # whole images
        if (value := changes[name]) is not None:
            changes[name] = round(value)
    accuracies = [score.accuracy for score in scores if score.accuracy is not None]
    spread = stdev(accuracies) if len(accuracies) == len(scores) else None
    marks = tuple(dict.fromkeys(mark for score in scores for mark in score.marks))
    if spread is not None:
        marks = (*marks, "orders")
    return replace(first, **changes, stderr=spread, mcnemar_p=None, marks=marks)  # type: ignore[arg-type]
