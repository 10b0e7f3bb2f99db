"""What each section of a report shows: from named rows to charts. Scores are those of the tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from apm.images.paths import printable

from ..runs.rows import MethodRows
from ..tables.stats import PER_BIN, reliability_bins
from ..tables.table import Score
from .charts import Chart, Lane, Line, Point, bars, boxes, diverging, dots, lines, reliability_diagram
from .series import NamedRow, Part


@dataclass(frozen=True)
class Group:
    """Charts under one heading, and what must be said of them."""

    heading: str
    """May be empty: then the charts stand under the section's own."""
    charts: tuple[Chart, ...]
    notes: tuple[str, ...] = ()
    open: bool = field(default=True)
    """Whether it is unfolded when the page is opened."""


def accuracy(ids: Iterator[int], parts: Sequence[Part]) -> list[Group]:
    """Accuracy by column; by level where a data set was run at several levels of a corruption."""
    groups: list[Group] = []
    by_level = _by_level(parts)
    several = {
        title
        for title, panels in by_level.items()
        if len({p.x for _, row in panels for line in row for p in line.points if p.x}) > 1
    }
    for title in (title for title in by_level if title in several):
        panels = by_level[title]
        scale = [
            edge for _, row in panels for line in row for p in line.points for edge in (p.y - p.error, p.y + p.error)
        ]
        levels = sorted({p.x for _, row in panels for line in row for p in line.points})
        ticks = [(level, "clean" if level == 0 else f"{level:g}") for level in levels]
        chance = next(
            (part.chance() for part in parts for n in part.rows for _, _, a in n.cells() if a.cell["title"] == title),
            None,
        )
        charts = tuple(
            lines(
                ids,
                printable(corruption),
                row,
                x_label="level",
                y_label="accuracy, %",
                scale=scale,
                x_ticks=ticks,
                chance=chance,
            )
            for corruption, row in panels
        )
        groups.append(Group(printable(f"{title}: accuracy by corruption and level"), charts))
    rest = []
    for part in parts:
        titles = {a.cell["title"] for n in part.rows for _, _, a in n.cells() if a.cell["corruption"]}
        if part.columns and not titles & several:
            lanes = [Lane(printable(column), tuple(_entries(part, column))) for column in part.columns]
            rest.append(dots(ids, printable(part.table.title), lanes, x_label="accuracy, %", chance=part.chance()))
    return groups + _together(rest)


def _by_level(parts: Sequence[Part]) -> dict[str, list[tuple[str, list[Line]]]]:
    """By data set: for each corruption, the line of each method over levels, from clean (0) where it was run."""
    clean: dict[tuple[str, str], Point] = {}
    found: dict[str, dict[str, dict[tuple[str, int], dict[int, Point]]]] = {}
    for named, _, score, cell in _scores(parts):
        if cell["corruption"] is None:
            clean[cell["title"], named.name] = _point(score, 0)
        else:
            panel = found.setdefault(cell["title"], {}).setdefault(cell["corruption"], {})
            panel.setdefault((named.name, named.series), {})[cell["level"]] = _point(score, cell["level"])
    return {
        title: [
            (
                corruption,
                [
                    Line(
                        name,
                        series,
                        tuple(point for _, point in sorted({**_zero(clean.get((title, name))), **points}.items())),
                    )
                    for (name, series), points in panel.items()
                ],
            )
            for corruption, panel in sorted(panels.items())
        ]
        for title, panels in found.items()
    }


def _zero(point: Point | None) -> dict[int, Point]:
    return {} if point is None else {0: point}


def _scores(parts: Sequence[Part]) -> Iterator[tuple[NamedRow, str, Score, dict]]:
    for part in parts:
        for named in part.rows:
            for column, score, answers in named.cells():
                yield named, column, score, dict(answers.cell)


def _point(score: Score, x: float) -> Point:
    assert score.accuracy is not None and score.stderr is not None
    return Point(float(x), score.accuracy, score.n, score.stderr)


def _entries(part: Part, column: str) -> Iterator[tuple[str, int, Point]]:
    for named in part.rows:
        score = named.row.cells.get(column)
        if score is not None and score.accuracy is not None and score.stderr is not None:
            yield named.name, named.series, Point(score.accuracy, 0, score.n, score.stderr)


def flips(ids: Iterator[int], parts: Sequence[Part]) -> list[Group]:
    """How many images each method loses and gains against its teacher, all cells of a table together."""
    charts = []
    for part in parts:
        values = [
            (named.name, named.series, total.right_to_wrong or 0, total.wrong_to_right or 0, total.n)
            for named, total in _totals(part)
        ]
        if values:
            charts.append(diverging(ids, printable(part.table.title), values))
    return _together(charts)


def speed(ids: Iterator[int], parts: Sequence[Part]) -> list[Group]:
    """Images per second of each method, all cells of a table together."""
    charts = []
    for part in parts:
        values = [
            (named.name, named.series, total.images_per_second, total.n)
            for named, total in _totals(part)
            if total.images_per_second is not None
        ]
        if values:
            charts.append(bars(ids, printable(part.table.title), values, x_label="images/s"))
    notes = [note for part in parts for note in part.table.notes if note.startswith("images/s")]
    return _together(charts, notes)


def _together(charts: Sequence[Chart], notes: Sequence[str] = ()) -> list[Group]:
    """One group without a heading, or none where there are no charts."""
    return [Group("", tuple(charts), tuple(map(printable, dict.fromkeys(notes))))] if charts else []


def calibration(ids: Iterator[int], parts: Sequence[Part]) -> list[Group]:
    """A reliability diagram for each row of a table, over all its cells; said in words where there is too little."""
    groups: list[Group] = []
    for part in parts:
        charts, notes = [], []
        for named, total in _totals(part):
            rows = [answers.rows for _, _, answers in named.cells()]
            kept = [_answered(one) for one in rows]
            sure = np.concatenate([one.probability[keep] for one, keep in zip(rows, kept, strict=True)])
            correct = np.concatenate(
                [(one.prediction == one.label)[keep] for one, keep in zip(rows, kept, strict=True)]
            )
            title = f"{named.name}: ECE {total.ece:.3f}, NLL {total.nll:.3f}, n = {total.n}"
            bins = reliability_bins(sure, correct)
            if bins:
                charts.append(reliability_diagram(ids, title, named.name, named.series, bins))
            else:
                notes.append(f"{title}: too few answers for a diagram, which needs {2 * PER_BIN}.")
        if charts or notes:
            told = tuple(map(printable, notes))
            groups.append(Group(printable(part.table.title), tuple(charts), told, open=not groups))
    return groups


def steps(ids: Iterator[int], parts: Sequence[Part]) -> list[Group]:
    """Accuracy and agreement with the teacher after each step, from per-step predictions."""
    groups: list[Group] = []
    for part in parts:
        charts = []
        for column in part.columns:
            curves = [line for named in part.rows for line in _curves(named, column)]
            if curves:
                charts.append(
                    lines(
                        ids, printable(column), curves, x_label="step", y_label="%", markers=False,
                        scale=[p.y for line in curves for p in line.points], chance=part.chance([column]),
                    )
                )  # fmt: skip
        if charts:
            groups.append(Group(printable(part.table.title), tuple(charts), open=not groups))
    return groups


def _curves(named: NamedRow, column: str) -> Iterator[Line]:
    answers = named.row.answers.get(column)
    if answers is None or answers.rows.step_predictions is None:
        return
    rows, keep = answers.rows, _answered(answers.rows)
    n = int(keep.sum())
    trail = rows.step_predictions[keep] if n and rows.step_predictions is not None else None  # (n, K + 1)
    if trail is None:
        return
    for what, reference, dashed in (("accuracy", rows.label, False), ("agreement", rows.teacher_prediction, True)):
        percent = 100 * (trail == reference[keep, None]).mean(0)
        points = tuple(Point(float(step), float(value), n) for step, value in enumerate(percent))
        yield Line(named.name, named.series, points, dashed, what)


def last_step(ids: Iterator[int], parts: Sequence[Part]) -> list[Group]:
    """Distributions of the cosine and the loss that were recorded after the last step."""
    groups: list[Group] = []
    for part in parts:
        charts = []
        for what, label in (("cosine", "cosine of the student's token to its target"), ("loss", "loss, logarithmic")):
            lanes = []
            for column in part.columns:
                found = [(named, _values(named, column, what)) for named in part.rows]
                entries = [(named.name, named.series, values) for named, values in found if len(values)]
                if entries:
                    lanes.append((printable(column), entries))
            if lanes:
                charts.append(boxes(ids, f"{what} after the last step", lanes, x_label=label, log=what == "loss"))
        if charts:
            groups.append(Group(printable(part.table.title), tuple(charts), open=not groups))
    return groups


def _values(named: NamedRow, column: str, what: str) -> NDArray[np.float64]:
    answers = named.row.answers.get(column)
    if answers is None:
        return np.empty(0)
    values: NDArray[np.float64] = getattr(answers.rows, what)
    usable = np.isfinite(values) & ((values > 0) | (what != "loss"))
    return values[usable]


def absent(parts: Sequence[Part]) -> list[str]:
    """What the records do not hold of the adaptation, in sentences."""
    said = ["Not recorded: the loss and the cosine at each step. The records hold both after the last step only."]
    adapting = {
        named.name: named for part in parts for named in part.rows for _, _, a in named.cells() if _adapts(a.rows)
    }
    without = [
        name
        for name, named in adapting.items()
        if all(answers.rows.step_predictions is None for answers in named.row.answers.values())
    ]
    if not adapting:
        return ["No method of these runs adapts a student: there is nothing to show."]
    if without:
        said.append(f"No predictions of each step for {', '.join(without)}: make them with apm bench --record-steps.")
    return said


def _adapts(rows: MethodRows) -> bool:
    return bool(np.isfinite(rows.cosine).any()) or rows.step_predictions is not None


def _totals(part: Part) -> Iterator[tuple[NamedRow, Score]]:
    for named in part.rows:
        if named.row.total is not None and named.row.total.n:
            yield named, named.row.total


def _answered(rows: MethodRows) -> NDArray[np.bool_]:
    return rows.error == None  # noqa: E711 - elementwise, on objects
