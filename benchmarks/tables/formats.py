"""Tables as text: markdown, LaTeX, CSV and JSON. Those of `trust` have their own file, `trust_formats`.

The terminal's form is made by the command line from `grid` and `details`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, NamedTuple

import pandas

from .table import MARKS, Kind, Score, Table, TableRow

NOTHING = "–"

DETAIL_HEADINGS = ("method", "n", "failed", "agree %", "right→wrong", "wrong→right", "p", "ECE", "NLL", "images/s")


class Grid(NamedTuple):
    """A table as text. What is the same in every cell or row is said once, in a note."""

    headings: list[str]
    rows: list[list[str]]
    notes: tuple[str, ...]
    """To be read below the table: what it says of all cells and rows, then the table's own notes."""


def grid(table: Table) -> Grid:
    """The table as text: headings, a list of cells for each row, and the notes below."""
    averages = ["average", "OOD average"] if table.has_ood else ["average"]
    if len(table.averaged) < 2:
        averages = []
    counts = _counts(table)
    sources = {row.source for row in table.rows}
    headings = ["method", "teacher", "prompts", *table.columns, *averages]
    lines = []
    for row in table.rows:
        cells = [_cell(row.cells.get(column), counted=column not in counts) for column in table.columns]
        means = [_average(row.average, row.printed_average), _average(row.ood_average, row.printed_ood_average)]
        lines.append([_name(row), row.teacher, row.prompts, *cells, *means[: len(averages)]])
    notes = [_count_note(counts)] if counts else []
    if len(sources) == 1:
        notes.append(f"source: {sources.pop()}")
    else:
        headings.append("source")
        for line, row in zip(lines, table.rows, strict=True):
            line.append(row.source)
    return Grid(headings, lines, (*notes, *table.notes))


def _counts(table: Table) -> dict[str, int]:
    """The number of images of each column in which all of our rows have as many."""
    found = {
        column: {row.cells[column].n for row in table.rows if row.kind != "published" and column in row.cells}
        for column in table.columns
    }
    return {column: counts.pop() for column, counts in found.items() if len(counts) == 1}


def _count_note(counts: Mapping[str, int]) -> str:
    columns: dict[int, list[str]] = {}
    for column, n in counts.items():
        columns.setdefault(n, []).append(column)
    return "images: " + "; ".join(f"n={n} in {', '.join(names)}" for n, names in columns.items())


def details(table: Table) -> list[list[str]]:
    """Under `DETAIL_HEADINGS`, a list of cells for each of our rows, all its cells together."""
    return [_detail(_name(row), row.total) for row in table.rows if row.total is not None]


def markdown(tables: Sequence[Table]) -> str:
    """All tables in GitHub's markdown."""
    out: list[str] = []
    for table in tables:
        headings, rows, notes = grid(table)
        out += [f"### {in_markdown(table.title)}", "", *markdown_block(headings, rows)]
        if detailed := details(table):
            out += ["All cells together, against the teacher:", "", *markdown_block(DETAIL_HEADINGS, detailed)]
        out += [f"> **Warning.** {in_markdown(warning)}\n" for warning in table.warnings]
        out += [*(f"- {in_markdown(note)}" for note in notes), ""]
    return "\n".join(out)


def markdown_block(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of one table in markdown, and an empty one."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(in_markdown(cell).replace("|", "\\|") for cell in cells) + " |"

    return [line(headings), line(["---"] * len(headings)), *(line(row) for row in rows), ""]


def in_markdown(text: str) -> str:
    """Text on one line in which no name of a user's can start a tag or an escape."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", " ".join(text.split("\n")).replace("\\", r"\\"))


LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "→": r"$\rightarrow$",
        "†": r"\dag{}",
        "‡": r"\ddag{}",
        "§": r"\S{}",
        "¶": r"\P{}",
        "ᴾ": r"\textsuperscript{P}",
        "…": r"\ldots{}",
        "∘": r"$\circ$",
        "–": "--",
        "<": r"$<$",
        ">": r"$>$",
        "|": r"\textbar{}",
        "\n": " ",
    }
)


def latex(tables: Sequence[Table]) -> str:
    """All tables as LaTeX floats, ready to paste: with booktabs, the best of our own rows in each column in bold."""
    out: list[str] = [r"% needs \usepackage{booktabs}"]
    for table in tables:
        headings, rows, notes = grid(table)
        best = _best(table, headings)
        shown = [
            [_bold(cell.translate(LATEX), (number, place) in best) for place, cell in enumerate(row)]
            for number, row in enumerate(rows)
        ]
        out += [
            "",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{table.title.translate(LATEX)}}}",
            latex_block(headings, shown),
        ]
        if detailed := details(table):
            plain = [[cell.translate(LATEX) for cell in row] for row in detailed]
            out += [
                "",
                r"\medskip",
                "All cells together, against the teacher:",
                "",
                latex_block(DETAIL_HEADINGS, plain),
            ]
        out += [rf"\par\footnotesize {note.translate(LATEX)}" for note in (*table.warnings, *notes)]
        out.append(r"\end{table}")
    return "\n".join(out) + "\n"


def latex_block(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A tabular with booktabs; the cells are LaTeX already, the headings are not."""
    sides = "".join("l" if heading in ("method", "teacher", "prompts", "source") else "r" for heading in headings)
    frame = pandas.DataFrame(rows, columns=[heading.translate(LATEX) for heading in headings])
    return str(frame.to_latex(index=False, escape=False, column_format=sides)).rstrip()


def _best(table: Table, headings: Sequence[str]) -> set[tuple[int, int]]:
    """Row and column, in `grid`, of the highest accuracy among our own rows; none where there is one row alone."""
    ours = [(number, row) for number, row in enumerate(table.rows) if row.kind == "ours"]
    found: set[tuple[int, int]] = set()
    for place, heading in enumerate(headings):
        values = {
            number: row.average if heading == "average" else row.ood_average if heading == "OOD average" else value
            for number, row in ours
            for value in [row.cells[heading].accuracy if heading in row.cells else None]
        }
        known = {number: value for number, value in values.items() if value is not None}
        if len(known) > 1:
            top = max(known.values())
            found |= {(number, place) for number, value in known.items() if value == top}
    return found


def _bold(text: str, wanted: bool) -> str:
    return rf"\textbf{{{text}}}" if wanted else text


_ROW_COLUMNS = ("kind", "method", "teacher", "prompts", "uses_training_data", "source")
"""Fields of `TableRow` that are the same in all its cells."""

CSV_COLUMNS = (
    "table",
    *_ROW_COLUMNS,
    "column",
    "accuracy",
    "stderr",
    *(field.name for field in fields(Score) if field.name not in ("accuracy", "stderr")),
)


def comma_separated(tables: Sequence[Table]) -> str:
    """All tables in one long CSV: a line for each cell and each average, `CSV_COLUMNS` as header."""
    lines: list[dict[str, Any]] = []
    for table in tables:
        for row in table.rows:
            shared = {"table": table.title, **{name: getattr(row, name) for name in _ROW_COLUMNS}}
            for column in table.columns:
                if column in row.cells:
                    values = _values(row.cells[column], published=row.kind == "published")
                    lines.append({**shared, "column": column, **values})
            if row.total is not None:
                lines.append({**shared, "column": "all cells", **_values(row.total)})
            for name, value in _averages(row).items():
                if value is not None:
                    lines.append({**shared, "column": name, "accuracy": round(value, 6)})
    frame = pandas.DataFrame(lines, columns=list(CSV_COLUMNS), dtype=object)  # counts stay whole where some are missing
    return str(frame.to_csv(index=False, lineterminator="\n"))


def as_json(tables: Sequence[Table]) -> str:
    """All tables as one JSON document, every figure unrounded (schema: schemas/table.schema.json)."""
    document = {"schema": 1, "unit": "percent", "tables": [_table_record(table) for table in tables]}
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


FORMATS: Mapping[str, Callable[[Sequence[Table]], str]] = {
    "markdown": markdown,
    "csv": comma_separated,
    "json": as_json,
    "latex": latex,
}


def _name(row: TableRow) -> str:
    words = ["published"] if row.kind == "published" else []
    if row.uses_training_data != "no":
        words.append("with training data" if row.uses_training_data == "yes" else f"uses {row.uses_training_data}")
    return f"{row.method} ({', '.join(words)})" if words else row.method


def _cell(score: Score | None, *, counted: bool) -> str:
    """Accuracy, its standard error, where `counted` the number of images, and marks."""
    if score is None or (score.accuracy is None and not score.failed):
        return NOTHING
    signs = "".join(MARKS[mark][0] for mark in score.marks)
    if score.accuracy is None:
        return f"{NOTHING} (n=0){signs}"
    if score.stderr is None:  # published: with the decimals that were printed, one or two
        return f"{score.accuracy:.2f}".removesuffix("0")
    count = f" (n={score.n})" if counted else ""
    return f"{score.accuracy:.1f} ± {score.stderr:.1f}{count}{signs}"


def _average(own: float | None, printed: float | None) -> str:
    if own is None:
        return NOTHING if printed is None else f"printed {printed:.1f}"
    text = f"{own:.1f}"
    return text if printed is None or text == f"{printed:.1f}" else f"{text} (printed {printed:.1f})"


def number(value: float | None, form: str) -> str:
    """A number in a cell, `NOTHING` where there is none."""
    return NOTHING if value is None else format(value, form)


def _detail(name: str, score: Score) -> list[str]:
    p = score.mcnemar_p
    return [
        name,
        str(score.n),
        str(score.failed),
        number(score.agreement, ".1f"),
        number(score.right_to_wrong, "d"),
        number(score.wrong_to_right, "d"),
        "<0.001" if p is not None and p < 0.001 else number(p, ".3f"),
        number(score.ece, ".3f"),
        number(score.nll, ".3f"),
        number(score.images_per_second, ".3g"),
    ]


def _averages(row: TableRow) -> dict[str, float | None]:
    return {
        "average": row.average,
        "printed average": row.printed_average,
        "OOD average": row.ood_average,
        "printed OOD average": row.printed_ood_average,
    }


def _values(score: Score, *, published: bool = False) -> dict[str, Any]:
    rounded = {name: round(value, 6) if isinstance(value, float) else value for name, value in asdict(score).items()}
    values = {**rounded, "marks": " ".join(mark.replace(" ", "-") for mark in score.marks)}
    return {**values, "n": "", "failed": ""} if published else values


def _table_record(table: Table) -> dict[str, Any]:
    return {
        "title": table.title,
        "columns": list(table.columns),
        "averaged": list(table.averaged),
        "rows": [
            {
                **{name: getattr(row, name) for name in _ROW_COLUMNS},
                "settings": dict(row.settings),
                "cells": {column: _score_record(score, row.kind) for column, score in row.cells.items()},
                "total": None if row.total is None else _score_record(row.total, row.kind),
                "averages": {name.replace(" ", "_").lower(): value for name, value in _averages(row).items()},
            }
            for row in table.rows
        ],
        "notes": list(table.notes),
        "warnings": list(table.warnings),
    }


def _score_record(score: Score, kind: Kind) -> dict[str, Any]:
    if kind == "published":
        return {"accuracy": score.accuracy}
    return {**asdict(score), "marks": list(score.marks)}
