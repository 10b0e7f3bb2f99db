"""What do softened targets change compared with the token's own loss? From the records of finished runs.

`python -m apm.benchmarks.studies.softened RUN… --record FILE`. The runs are of `apm bench`, with students of several
losses and temperatures on the same images. The record contains the results of `apm table --trust`, without the times,
and for each student its agreement with the teacher, the difference of the true label's probability, and the cosine
between the tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apm.errors import UsageError

from ..runs.rows import MethodRows
from ..tables.table import Table, row_names
from ..tables.trust import TrustRow, TrustTable, make_trust
from .evidence import described, made_by, one_table
from .study import ROOT, Options, Record, Study, markdown, run

TEACHER = "zero-shot"
KEPT = ("accuracy", "low", "high", "gain", "p", "right_to_wrong", "wrong_to_right", "ece", "nll")
TITLES = (
    *("method", "n", "top-1 %", "95 %", "right→wrong", "wrong→right", "p", "ECE", "NLL"),
    *("agreement with the teacher %", "mean absolute NLL difference", "median cosine"),
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add that of this study."""
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="folders of runs on the same images")


def measure(options: Options) -> Record:
    """Put together what the runs say.

    Raises:
        UsageError: no runs, of several data sets, or without the teacher's own answers.
    """
    runs, whole = one_table(options.runs)
    if TEACHER not in (row.method for row in whole.rows):
        raise UsageError(f"The runs lack the method {TEACHER}, which students are compared with.")
    groups = [_group(whole, trust) for trust in make_trust([whole], cells=False)]
    return {"runs": [described(one) for one in runs], "groups": groups}


def _group(table: Table, trust: TrustTable) -> dict[str, Any]:
    """What is said of the methods on the images of one cell, or of several together."""
    (names,) = row_names([table])
    answers = {
        name: [row.answers[column].rows for column in trust.cells]
        for name, row in zip(names, table.rows, strict=True)
        if all(column in row.answers for column in trust.cells)
    }
    teacher = answers[TEACHER]
    order = [name for name in names if name in answers]
    rows = {one.method: one for one in trust.rows}
    return {
        "title": trust.title,
        "n": trust.n,
        "images": trust.images,
        "rows": [_row(rows[name], answers[name], teacher) for name in order],
    }


def _column(parts: Sequence[MethodRows], name: str) -> NDArray[Any]:
    """One column of some cells, in the order of the images' names: runs may have taken them in different orders."""
    return np.concatenate([getattr(part, name)[np.argsort(part.id)] for part in parts])


def _row(trust: TrustRow, own: Sequence[MethodRows], teacher: Sequence[MethodRows]) -> dict[str, Any]:
    cosine, prediction = _column(own, "cosine"), _column(own, "prediction")
    answered = prediction >= 0
    return {
        "method": trust.method,
        **{name: getattr(trust, name) for name in KEPT},
        "agree": 100 * float((prediction == _column(own, "teacher_prediction"))[answered].mean()),
        "apart": float(np.nanmean(np.abs(_column(own, "nll") - _column(teacher, "nll")))),
        "cosine": float(np.nanmedian(cosine)) if np.isfinite(cosine).any() else None,
    }


def table(record: Record) -> str:
    """A table of each group, and what made the runs."""
    parts = [
        f"**{group['title']}** ({group['n']} answers, {group['images']} images)\n\n"
        + markdown(TITLES, [_cells(row, group["n"]) for row in group["rows"]])
        for group in record["groups"]
    ]
    notes = (
        "95 % intervals, and p of the flips against the teacher's own answers, corrected for the number of methods, "
        "are as in `apm table --trust`. NLL difference: of the true label, against the teacher's, in nats."
    )
    return "\n\n".join([*parts, notes, made_by(record["runs"])])


def _cells(row: dict[str, Any], n: int) -> list[str]:
    p = row["p"]
    return [
        row["method"],
        str(n),
        f"{row['accuracy']:.1f}",
        f"{row['low']:.1f}–{row['high']:.1f}",
        str(row["right_to_wrong"]),
        str(row["wrong_to_right"]),
        "" if p is None else f"{p:.2g}",
        *("" if row[name] is None else f"{row[name]:.4f}" for name in ("ece", "nll")),
        f"{row['agree']:.1f}",
        f"{row['apart']:.4f}",
        "" if row["cosine"] is None else f"{row['cosine']:.3f}",
    ]


STUDY = Study(
    name="softened",
    question=__doc__,
    measure=measure,
    table=table,
    shared={},
    arguments=arguments,
    results="softened.json",
    document=ROOT / "docs" / "softened.md",
    marker="softened",
)

if __name__ == "__main__":
    sys.exit(run(STUDY.main))
