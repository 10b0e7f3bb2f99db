"""What can be trusted, as text: markdown, LaTeX, CSV and JSON.

The terminal's form is made by the command line from `HEADINGS` and `lines`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields

import pandas

from .formats import LATEX, NOTHING, in_markdown, latex_block, markdown_block, number
from .table import MARKS
from .trust import TrustRow, TrustTable

HEADINGS = (
    "method",
    "rank",
    "accuracy %",
    "95 %",
    "gain",
    "p",
    "right→wrong",
    "wrong→right",
    "ECE",
    "NLL",
    "AUROC",
    "ms given features",
    "ms",
    "peak MB",
    "episodic",
    "needs order",
    "needs gradients",
)

LEGEND = (
    "95 %: Wilson's interval; answers to several cells of one image are correlated and count as fewer.",
    "gain: points over zero-shot, the teacher's own answers to the same images with the run's prompts.",
    "AUROC: how well confidence separates right answers from wrong ones; 1 is perfect, 0.5 is chance.",
    "ms: per image, as if the method ran alone, with the teacher and the views it uses, without reading the file; "
    "given features: without what the methods of a run share. peak MB: of the process, with all methods of its run.",
    "needs order: the answer depends on the images before it. needs gradients: answering requires back-propagation.",
)
"""What the columns mean, said once below all tables."""


def lines(table: TrustTable) -> list[list[str]]:
    """Under `HEADINGS`, a list of cells for each row."""
    return [_line(row) for row in table.rows]


def _line(row: TrustRow) -> list[str]:
    return [
        row.method,
        str(row.rank),
        f"{row.accuracy:.1f}{''.join(MARKS[mark][0] for mark in row.marks)}",
        f"{row.low:.1f}–{row.high:.1f}",
        f"{row.gain:+.1f}",
        "<0.001" if row.p is not None and row.p < 0.001 else number(row.p, ".3f"),
        str(row.right_to_wrong),
        str(row.wrong_to_right),
        number(row.ece, ".3f"),
        number(row.nll, ".3f"),
        number(row.auroc, ".3f"),
        number(row.ms_given_features, ".3g"),
        number(row.ms, ".3g"),
        NOTHING if row.peak_memory is None else f"{row.peak_memory / 1e6:.0f}",
        _yes(row.episodic),
        _yes(None if row.episodic is None else not row.episodic),
        _yes(row.gradients),
    ]


def _yes(value: bool | None) -> str:
    return NOTHING if value is None else "yes" if value else "no"


def markdown(tables: Sequence[TrustTable]) -> str:
    """All tables in GitHub's markdown."""
    out: list[str] = []
    for table in tables:
        out += [f"### {in_markdown(table.title)}", "", *markdown_block(HEADINGS, lines(table))]
        out += [*(f"- {in_markdown(note)}" for note in table.notes), ""]
    return "\n".join([*out, *(f"- {text}" for text in LEGEND), ""])


def latex(tables: Sequence[TrustTable]) -> str:
    """All tables as LaTeX floats, with booktabs."""
    out = [r"% needs \usepackage{booktabs}"]
    for table in tables:
        cells = [[cell.translate(LATEX) for cell in line] for line in lines(table)]
        caption = rf"\caption{{{table.title.translate(LATEX)}}}"
        notes = [rf"\par\footnotesize {note.translate(LATEX)}" for note in (*table.notes, *LEGEND)]
        out += ["", r"\begin{table}", r"\centering", caption, latex_block(HEADINGS, cells), *notes, r"\end{table}"]
    return "\n".join(out) + "\n"


CSV_COLUMNS = ("table", "cells", "n", "images", *(field.name for field in fields(TrustRow)))


def comma_separated(tables: Sequence[TrustTable]) -> str:
    """All tables in one CSV: a line for each method of each table, `CSV_COLUMNS` as header, figures unrounded."""
    records = [
        {
            "table": table.title,
            "cells": " ".join(table.cells),
            "n": table.n,
            "images": table.images,
            **asdict(row),
            "marks": " ".join(mark.replace(" ", "-") for mark in row.marks),
        }
        for table in tables
        for row in table.rows
    ]
    frame = pandas.DataFrame(records, columns=list(CSV_COLUMNS), dtype=object)
    return str(frame.to_csv(index=False, lineterminator="\n"))


def as_json(tables: Sequence[TrustTable]) -> str:
    """All tables as one JSON document, every figure unrounded (schema: schemas/trust.schema.json)."""
    records = [
        {
            "title": table.title,
            "cells": list(table.cells),
            "n": table.n,
            "images": table.images,
            "rows": [{**asdict(row), "marks": list(row.marks)} for row in table.rows],
            "notes": list(table.notes),
        }
        for table in tables
    ]
    document = {"schema": 1, "legend": list(LEGEND), "tables": records}
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


FORMATS: Mapping[str, Callable[[Sequence[TrustTable]], str]] = {
    "markdown": markdown,
    "csv": comma_separated,
    "json": as_json,
    "latex": latex,
}
