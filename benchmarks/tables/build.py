"""Tables in the layouts of the paper, made from run folders alone, with the published numbers beside ours."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from statistics import fmean
from typing import Any

from ..runs.records import Records
from ..runs.run_json import differences
from .layouts import Layout, layouts
from .notes import notes, warnings
from .orders import joined_orders
from .scores import best_steps, score_cell, summary
from .table import Answers, Score, Table, TableRow


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
    for layout in layouts(runs):
        found = _gathered(layout, runs)
        if not found:
            continue
        entries = list(found.values())
        separate = [row for key, one in found.items() for row in _own_rows(layout, key, one, oracle=oracle)]
        rows = _told_apart(joined_orders(separate))
        beside = _published_rows(layout) if published else ()
        tables.append(
            Table(
                layout.title,
                layout.columns,
                layout.averaged or layout.columns,
                layout.has_ood,
                (*beside, *rows),
                tuple(dict.fromkeys(notes(layout, rows, entries, oracle=oracle))),
                tuple(dict.fromkeys(warnings(layout, rows, entries))),
            )
        )
    return tables


_RowKey = tuple[str, ...]
"""What makes a row: method, its settings as JSON, and prompts; and the run, where that row is there already."""


def _gathered(layout: Layout, runs: Sequence[Records]) -> dict[_RowKey, dict[str, Answers]]:
    """The answers of all runs: row, then column."""
    found: dict[_RowKey, dict[str, Answers]] = {}
    for run in runs:
        mine: dict[_RowKey, dict[str, Answers]] = {}
        for cell_key, cell in run.cells.items():
            column = layout.column_of(cell)
            if column is None:
                continue
            for method, rows in run.rows(cell_key):
                key: _RowKey = (
                    method,
                    json.dumps(_settings(run, method), sort_keys=True),
                    cell["prompt_set"] if run.run["config"]["prompts"] else "",  # else each data set's own
                )
                mine.setdefault(key, {})[column] = Answers(run, cell, rows)
        for key, entries in mine.items():
            twice = found.get(key, {}).keys() & entries.keys()  # then this run has a row of its own
            found.setdefault((*key, str(run.path)) if twice else key, {}).update(entries)
    return found


def _own_rows(layout: Layout, key: _RowKey, entries: Mapping[str, Answers], *, oracle: bool) -> Iterator[TableRow]:
    """One of our rows, and its ORACLE rows."""
    method, settings, *_ = key
    row = TableRow(
        kind="ours",
        method=method,
        teacher=next(iter(entries.values())).run.run["teacher"]["name"],
        prompts=", ".join(dict.fromkeys(_prompts(one.cell, method) for one in entries.values())),
        source=", ".join(dict.fromkeys(str(one.run.path) for one in entries.values())),
        cells={column: score_cell(one.rows, one.cell, method) for column, one in entries.items()},
        total=summary([one.rows for one in entries.values()]),
        settings=json.loads(settings),
        uses_training_data=json.loads(settings).get("uses_training_data", "no"),
        answers=entries,
    )
    yield _averaged(row, layout)
    best = {column: scores for column, one in entries.items() if (scores := best_steps(one.rows))} if oracle else {}
    chosen = "alpha" if row.settings.get("alpha") == "oracle" else "step"
    for place, what in enumerate(("cell", "image") if best else ()):
        name = f"ORACLE {method}, best {chosen} of each {what}"
        cells = {column: replace(scores[place], marks=row.cells[column].marks) for column, scores in best.items()}
        yield _averaged(replace(row, kind="oracle", method=name, cells=cells, total=None, answers={}), layout)


def _settings(run: Records, method: str) -> dict[str, Any]:
    """What shapes a row's numbers besides its cells and prompts: settings, seed, and the teacher with its weights."""
    settings = {"teacher": run.run["teacher"]["identity"], "seed": run.run["config"]["seed"], **run.methods[method]}
    if settings["seed"] != run.run["config"]["seed"]:  # a method with a seed of its own
        settings["run_seed"] = run.run["config"]["seed"]
    if (order := run.run["config"]["order"]) != run.run["config"]["seed"] and settings.get("stream"):
        settings["order"] = order
    if (protocol := run.run["config"]["protocol"]) != "common":
        settings["protocol"] = protocol
    return settings


def _prompts(cell: Mapping[str, Any], method: str) -> str:
    """The prompts that a method used: the name of the cell's set, or its own prompt."""
    own = cell.get("own_prompts", {}).get(method)
    return str(cell["prompts"]) if own is None else f'"{own}"'


def _averaged(row: TableRow, layout: Layout) -> TableRow:
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


def _told_apart(rows: list[TableRow]) -> list[TableRow]:
    """Add to the names of rows of one method what their settings differ in."""
    result = []
    for row in rows:
        others = [
            other for other in rows if other.method == row.method and other.teacher == row.teacher and other is not row
        ]
        parts = {
            name: row.settings.get(name)
            for other in others
            for name, _, _ in differences(other.settings, row.settings)
            if name != "published"  # prose about the protocol, which has a name
        }
        named = ", ".join(f"{name}={value}" for name, value in sorted(parts.items()))
        result.append(replace(row, method=f"{row.method} ({named})") if named else row)
    return result


def published_rows(name: str) -> list[dict[str, str]]:
    """Read one file of published numbers, as strings by column."""
    text = (resources.files("apm.benchmarks") / "published" / name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def _published_rows(layout: Layout) -> Iterator[TableRow]:
    for line in published_rows(layout.published) if layout.published else ():
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
