"""Tables in the layouts of the paper, made from run folders alone, with the published numbers beside ours.

Every number is in percent, but for p-values, calibration and speed. Formatting is in `table_formats`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from statistics import fmean
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..corruptions import CORRUPTIONS, MARK
from ..datasets.specs import SUITES
from ..runs.records import MethodRows, Records
from ..runs.run_json import differences
from .stats import expected_calibration_error, mcnemar, near_chance, standard_error

NATURAL_SHIFTS, CROSS_DATASET = SUITES["natural-shifts"], SUITES["cross-dataset"]

MARKS = {
    "subset": ("†", "subset: not all images of the data set, see the counts (seeded, class-balanced by --limit)"),
    "generated": ("‡", "generated: not comparable with the official files"),
    "hub split": ("§", "split of the hub's copy, which is not CoOp's split: not comparable with the published row"),
    "incomplete": ("…", "incomplete: the run is not finished"),
    "failed": ("*", "some images have no answer; they are left out of the accuracy and counted in the details"),
    "own prompt": ("¶", "another prompt than the run's, which the method cannot use: see the column of prompts"),
    "near chance": ("!", "within two standard errors of chance"),
}

Kind = Literal["ours", "published", "oracle"]


@dataclass(frozen=True)
class Score:
    """One method on one cell, or on several together."""

    n: int
    """Images answered."""
    failed: int
    """Images without an answer."""
    accuracy: float | None
    """Percent; None when n is 0, and so are those below."""
    stderr: float | None = None
    agreement: float | None = None
    """Percent of images on which the method answers as its teacher."""
    right_to_wrong: int | None = None
    """Images that the teacher gets right and the method wrong."""
    wrong_to_right: int | None = None
    mcnemar_p: float | None = None
    ece: float | None = None
    nll: float | None = None
    images_per_second: float | None = None
    marks: tuple[str, ...] = ()
    """Names in `MARKS`."""


@dataclass(frozen=True)
class Answers:
    """What one score was computed from."""

    run: Records
    cell: Mapping[str, Any]
    """What run.json says of the cell."""
    rows: MethodRows


@dataclass(frozen=True)
class TableRow:
    """One line of a table."""

    kind: Kind
    method: str
    teacher: str
    prompts: str
    source: str
    """Run folder of our own numbers; who printed the published ones."""
    cells: Mapping[str, Score]
    """By column key; absent where there is no number."""
    average: float | None = None
    """Mean of the accuracies of the columns that are averaged; None unless all are there."""
    printed_average: float | None = None
    """As printed by the source."""
    ood_average: float | None = None
    printed_ood_average: float | None = None
    total: Score | None = None
    """All cells together: agreement, flips, calibration, speed."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    uses_training_data: str = "no"
    answers: Mapping[str, Answers] = field(default_factory=dict, repr=False)
    """By column key, what our own scores were computed from; empty in published and ORACLE rows."""


@dataclass(frozen=True)
class Table:
    """One table, ready to be formatted."""

    title: str
    columns: tuple[str, ...]
    averaged: tuple[str, ...]
    """Columns whose mean is the average."""
    has_ood: bool
    """Whether a second average leaves out the first column, as in the paper's Table 1."""
    rows: tuple[TableRow, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    """What must not be overlooked: accuracy near chance."""


@dataclass(frozen=True)
class _Layout:
    title: str
    columns: tuple[str, ...]
    column_of: Callable[[Mapping[str, Any]], str | None]
    """The column of a cell of a run, None where the cell is no part of the table."""
    published: str | None = None
    averaged: tuple[str, ...] | None = None
    has_ood: bool = False


def make_tables(runs: Sequence[Records], *, published: bool = True, oracle: bool = False) -> list[Table]:
    """Make all tables that the cells of `runs` fill.

    Args:
        runs: run folders; cells of the same method with the same settings come together in one row.
        published: whether published rows stand beside ours, where the layout has any.
        oracle: whether to add the accuracy at the best step, chosen with labels.

    Returns:
        Table 1 (natural shifts), 2 (ImageNet-C) and 3 (cross-dataset) where they have a cell, a table for each other
        data set with corruptions, and one for what is left.
    """
    tables = []
    for layout in _layouts(runs):
        rows, notes, warnings = _own_rows(layout, runs, oracle=oracle)
        if not rows:
            continue
        if published and layout.published:
            rows = [*_published_rows(layout), *rows]
        used = {mark for row in rows for score in row.cells.values() for mark in score.marks}
        legend = [f"{sign} {text}" for mark, (sign, text) in MARKS.items() if mark in used]
        tables.append(
            Table(
                layout.title,
                layout.columns,
                layout.averaged or layout.columns,
                layout.has_ood,
                tuple(rows),
                (*legend, *dict.fromkeys(notes)),
                tuple(dict.fromkeys(warnings)),
            )
        )
    return tables


def _layouts(runs: Sequence[Records]) -> Iterator[_Layout]:
    """The paper's three layouts, then one for each corrupted data set and level, then what is left."""
    cells = [cell for run in runs for cell in run.cells.values()]

    def clean(titles: Sequence[str]) -> Callable[[Mapping[str, Any]], str | None]:
        return lambda cell: cell["title"] if cell["corruption"] is None and cell["title"] in titles else None

    def corrupted(title: str, level: int) -> Callable[[Mapping[str, Any]], str | None]:
        def column(cell: Mapping[str, Any]) -> str | None:
            if cell["title"] != title or cell["level"] not in (None, level):
                return None
            return cell["corruption"] or "clean"

        return column

    first = "Table 1: natural distribution shifts"
    yield _Layout(first, NATURAL_SHIFTS, clean(NATURAL_SHIFTS), "natural_shifts.csv", has_ood=True)
    for level in sorted({cell["level"] for cell in cells if cell["title"] == "imagenet-c"}):
        yield _Layout(
            f"Table 2: ImageNet-C, level {level}",
            tuple(sorted(CORRUPTIONS)),  # the paper's order
            corrupted("imagenet-c", level),
            "imagenet_c_level5.csv" if level == 5 else None,
        )
    yield _Layout("Table 3: cross-dataset", CROSS_DATASET, clean(CROSS_DATASET), "cross_dataset.csv")
    done = {*NATURAL_SHIFTS, *CROSS_DATASET}
    shifted = dict.fromkeys(
        (cell["title"], cell["level"]) for cell in cells if cell["corruption"] and cell["title"] != "imagenet-c"
    )
    for title, level in shifted:
        mine = [cell for cell in cells if cell["title"] == title and cell["level"] in (None, level)]
        present = {cell["corruption"] for cell in mine}
        averaged = tuple(name for name in sorted(CORRUPTIONS) if name in present)
        columns = ("clean", *averaged) if None in present else averaged
        yield _Layout(f"{title}: corruptions at level {level}", columns, corrupted(title, level), averaged=averaged)
        done.add(title)
    rest = tuple(dict.fromkeys(cell["title"] for cell in cells if not cell["corruption"] and cell["title"] not in done))
    yield _Layout("Other data sets", rest, clean(rest))


def _own_rows(layout: _Layout, runs: Sequence[Records], *, oracle: bool) -> tuple[list[TableRow], list[str], list[str]]:
    """Our rows of one table, with notes and warnings."""
    found: dict[tuple[str, ...], dict[str, Answers]] = {}
    for run in runs:
        mine: dict[tuple[str, ...], dict[str, Answers]] = {}
        for key, cell in run.cells.items():
            column = layout.column_of(cell)
            if column is None:
                continue
            for method, rows in run.rows(key):
                identity: tuple[str, ...] = (
                    method,
                    json.dumps(_settings(run, method), sort_keys=True),
                    cell["prompt_set"] if run.run["config"]["prompts"] else "",  # else each data set's own
                )
                mine.setdefault(identity, {})[column] = Answers(run, cell, rows)
        for identity, entries in mine.items():
            twice = found.get(identity, {}).keys() & entries.keys()  # then this run has a row of its own
            found.setdefault((*identity, str(run.path)) if twice else identity, {}).update(entries)
    table_rows: list[TableRow] = []
    for (method, settings, *_), entries in found.items():
        run = next(iter(entries.values())).run
        cells = {column: _score(one.rows, one.cell, method) for column, one in entries.items()}
        row = TableRow(
            kind="ours",
            method=method,
            teacher=run.run["teacher"]["name"],
            prompts=", ".join(dict.fromkeys(_prompts(one.cell, method) for one in entries.values())),
            source=", ".join(dict.fromkeys(str(one.run.path) for one in entries.values())),
            cells=cells,
            total=_summary([one.rows for one in entries.values()]),
            settings=json.loads(settings),
            answers=entries,
        )
        table_rows.append(_averaged(row, layout))
        if oracle:
            table_rows += _oracle_rows(layout, row, {column: one.rows for column, one in entries.items()})
    notes = [*_cell_notes(layout, found.values()), *_other_images(layout, found.values())]
    table_rows = _told_apart(table_rows)
    if any(row.total is not None and len(row.cells) > 1 for row in table_rows):
        notes.append("p of several cells together takes their images as independent; corruptions of one image are not.")
    used = [one.run for entries in found.values() for one in entries.values()]
    if used:
        notes.append(
            f"images/s: each method as if run alone, with teacher and views, without decoding; {_machines(used)}."
        )
    if any(row.settings.get("stream") for row in table_rows):
        orders = sorted({str(run.run["stream_order"]["seed"]) for run in used})
        notes.append(f"Stream methods see the images in the order of seed {', '.join(orders)}.")
    if any(row.kind == "oracle" for row in table_rows):
        notes.append("ORACLE: labels peeked at, an upper bound.")
    elif oracle and table_rows:
        notes.append("No ORACLE row: no run of this table recorded per-step predictions (--record-steps).")
    warnings = [*_data_warnings(layout, found.values()), *_chance_warnings(layout, table_rows, found.values())]
    return table_rows, notes, warnings


def _settings(run: Records, method: str) -> dict[str, Any]:
    """What shapes a row's numbers besides its cells and prompts: settings, seed, and the teacher with its weights."""
    settings = {"teacher": run.run["teacher"]["identity"], "seed": run.run["config"]["seed"], **run.methods[method]}
    if settings["seed"] != run.run["config"]["seed"]:  # a method with a seed of its own
        settings["run_seed"] = run.run["config"]["seed"]
    return settings


def _prompts(cell: Mapping[str, Any], method: str) -> str:
    """The prompts that a method used: the name of the cell's set, or its own prompt."""
    own = cell.get("own_prompts", {}).get(method)
    return str(cell["prompts"]) if own is None else f'"{own}"'


def _score(rows: MethodRows, cell: Mapping[str, Any], method: str) -> Score:
    """Score one method on one cell."""
    score = _summary([rows])
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


def _summary(parts: Sequence[MethodRows]) -> Score:
    """Score the images of one or more cells together."""

    def joined(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(part, name) for part in parts])

    answered = joined("error") == None  # noqa: E711 - elementwise, on objects
    n, failed = int(answered.sum()), int((~answered).sum())
    if n == 0:
        return Score(0, failed, None)
    label = joined("label")[answered]
    prediction = joined("prediction")[answered]
    teacher = joined("teacher_prediction")[answered]
    right, teacher_right = prediction == label, teacher == label
    lost, gained = int((teacher_right & ~right).sum()), int((~teacher_right & right).sum())
    accuracy = float(right.mean())
    seconds = float(joined("seconds")[answered].sum())
    return Score(
        n=n,
        failed=failed,
        accuracy=100 * accuracy,
        stderr=100 * standard_error(accuracy, n),
        agreement=100 * float((prediction == teacher).mean()),
        right_to_wrong=lost,
        wrong_to_right=gained,
        mcnemar_p=mcnemar(lost, gained),
        ece=expected_calibration_error(joined("probability")[answered], right),
        nll=float(joined("nll")[answered].mean()),
        images_per_second=n / seconds if seconds > 0 else None,
    )


def _averaged(row: TableRow, layout: _Layout) -> TableRow:
    """Add the averages over the layout's columns, where all of them are there."""

    def mean(columns: Sequence[str]) -> float | None:
        values = [row.cells[column].accuracy for column in columns if column in row.cells]
        there = [value for value in values if value is not None]
        return fmean(there) if len(there) == len(columns) > 1 else None

    return replace(
        row,
        average=mean(layout.averaged or layout.columns),
        ood_average=mean(layout.columns[1:]) if layout.has_ood else None,
    )


def _oracle_rows(layout: _Layout, row: TableRow, entries: Mapping[str, MethodRows]) -> list[TableRow]:
    """The accuracy at the best step, chosen with labels: of each cell, and of each image.

    The prediction before the first step is that of an untrained student and no candidate.
    """
    best_of_cell: dict[str, Score] = {}
    best_of_image: dict[str, Score] = {}
    for column, rows in entries.items():
        if rows.step_predictions is None:
            continue
        answered = rows.error == None  # noqa: E711 - elementwise, on objects
        right = rows.step_predictions[answered, 1:] == rows.label[answered, None]  # (n, K)
        n = len(right)
        if n == 0:
            continue
        for cells, accuracy in ((best_of_cell, right.mean(0).max()), (best_of_image, right.any(1).mean())):
            error = 100 * standard_error(float(accuracy), n)
            cells[column] = Score(
                n, int((~answered).sum()), 100 * float(accuracy), error, marks=row.cells[column].marks
            )
    return [
        _averaged(
            replace(
                row,
                kind="oracle",
                method=f"ORACLE {row.method}, best step of each {what}",
                cells=cells,
                total=None,
                answers={},
            ),
            layout,
        )
        for what, cells in (("cell", best_of_cell), ("image", best_of_image))
        if cells
    ]


def _told_apart(rows: list[TableRow]) -> list[TableRow]:
    """Add to the names of rows of one method what their settings differ in."""
    result = []
    for row in rows:
        others = [
            other for other in rows if other.method == row.method and other.teacher == row.teacher and other is not row
        ]
        parts = {
            name: row.settings.get(name) for other in others for name, _, _ in differences(other.settings, row.settings)
        }
        named = ", ".join(f"{name}={value}" for name, value in sorted(parts.items()))
        result.append(replace(row, method=f"{row.method} ({named})") if named else row)
    return result


def _machines(runs: Iterable[Records]) -> str:
    """What the runs were computed on."""
    sessions = [session for run in runs for session in run.run["sessions"]]
    return "; ".join(
        dict.fromkeys(
            f"{session['device_name']}, {session['threads']} threads, processes: {session['processes']}"
            for session in sessions
        )
    )


def _cell_notes(layout: _Layout, rows: Iterable[Mapping[str, Answers]]) -> list[str]:
    """What the data sets' records say, each note once with the columns that it is about.

    That corruptions were generated is left to the mark.
    """
    columns: dict[str, list[str]] = {}
    for column in layout.columns:
        for entries in rows:
            for note in entries[column].cell["notes"] if column in entries else ():
                if MARK not in note and column not in columns.setdefault(note, []):
                    columns[note].append(column)
    return [f"{', '.join(about)}: {note}" for note, about in columns.items()]


def _other_images(layout: _Layout, rows: Iterable[Mapping[str, Answers]]) -> Iterator[str]:
    """A note for each column whose rows are of different images: the difference of two of them may come from that."""
    for column in layout.columns:
        if len({entries[column].cell["fingerprint"] for entries in rows if column in entries}) > 1:
            yield f"{column}: not all rows are of the same images; compare them with care."


def _data_warnings(layout: _Layout, rows: Iterable[Mapping[str, Answers]]) -> Iterator[str]:
    """What the data sets' records warn of: pictures that are not what the column says."""
    entries = list(rows)
    for column in layout.columns:
        told = (entry[column].cell.get("warnings", ()) for entry in entries if column in entry)
        yield from dict.fromkeys(f"{column}: {warning}" for warnings in told for warning in warnings)


def _chance_warnings(layout: _Layout, rows: Sequence[TableRow], entries: Iterable[Mapping[str, Answers]]) -> list[str]:
    """One warning for each column in which a method is no better than guessing."""
    headers = {column: one.cell for row in entries for column, one in row.items()}
    warnings = []
    for column in layout.columns:
        scores = [
            f"{row.method} {row.cells[column].accuracy:.1f} % of {row.cells[column].n}"
            for row in rows
            if row.kind == "ours" and column in row.cells and "near chance" in row.cells[column].marks
        ]
        if scores:
            classes = headers[column]["classes"]
            warnings.append(
                f"{column}: {', '.join(scores)}: within two standard errors of chance ({100 / classes:.1f} % for "
                f"{classes} classes). Likely causes: the wrong parent folder; classes sorted in another order than the "
                "class names; the label set of another data set; openai weights without their QuickGELU config; too "
                "few images to tell."
            )
    return warnings


def published_rows(name: str) -> list[dict[str, str]]:
    """Read one file of published numbers, as strings by column."""
    text = (resources.files("apm.benchmarks") / "published" / name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def _published_rows(layout: _Layout) -> Iterable[TableRow]:
    assert layout.published is not None
    for line in published_rows(layout.published):
        cells = {column: Score(0, 0, float(line[column])) for column in layout.columns if line[column]}
        row = TableRow(
            kind="published",
            method=line["method"],
            teacher=line["teacher"],
            prompts=line["prompts"],
            source=line["source"],
            cells=cells,
            printed_average=_number(line.get("printed_average")),
            printed_ood_average=_number(line.get("printed_ood_average")),
            uses_training_data=line["uses_training_data"],
        )
        yield _averaged(row, layout)


def _number(text: str | None) -> float | None:
    return float(text) if text else None
