"""What a table is: its rows, their scores, and the marks of scores that cannot be compared.

Every number is in percent, but for p-values, calibration and speed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..runs.records import Records
from ..runs.rows import MethodRows

MARKS = {
    "subset": ("†", "a seeded, class-balanced subset of the data set (--limit); its size is given below"),
    "generated": ("‡", "generated: not comparable with the official files"),
    "hub split": ("§", "the hub's own split, not CoOp's: not comparable with the published row"),
    "incomplete": ("…", "incomplete: the run is not finished"),
    "failed": ("*", "some images have no answer; they are left out of the accuracy and counted in the details"),
    "own prompt": ("¶", "not the run's prompt; see the column of prompts"),
    "orders": ("∘", "mean ± standard deviation over seeded orders of the stream; tests and --trust use the first"),
    "near chance": ("!", "within two standard errors of chance"),
    "training data": ("ᴾ", "trained on labelled images"),
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


def row_names(tables: Sequence[Table]) -> list[list[str]]:
    """Name the rows of each table: by method, with the teacher where there are several; our own that would still be
    called the same with their prompts, or with their run where these are the same too.
    """
    several = len({row.teacher for table in tables for row in table.rows if row.kind == "ours"}) > 1
    named = []
    for table in tables:
        names = [f"{row.method} · {row.teacher}" if several else row.method for row in table.rows]
        for part in ("prompts", "source"):
            shared = Counter(name for name, row in zip(names, table.rows, strict=True) if row.kind == "ours")
            distinct = {(name, getattr(row, part)) for name, row in zip(names, table.rows, strict=True)}
            told = Counter(name for name, _ in distinct)
            names = [
                f"{name} · {getattr(row, part)}" if shared[name] > 1 and told[name] > 1 and row.kind == "ours" else name
                for name, row in zip(names, table.rows, strict=True)
            ]
        named.append(names)
    return named
