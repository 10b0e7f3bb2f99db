"""Names and colours of the rows of all tables of a page: one method is one name and one colour throughout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from apm.images.paths import printable

from ..tables.table import Answers, Score, Table, TableRow, row_names


@dataclass(frozen=True)
class NamedRow:
    """One of our own rows."""

    name: str
    series: int
    """Number of its colour and shape."""
    row: TableRow

    def cells(self) -> Iterator[tuple[str, Score, Answers]]:
        """Its columns that hold answers, in the table's order: column, score, what the score was computed from."""
        for column, score in self.row.cells.items():
            if score.n:
                yield column, score, self.row.answers[column]


@dataclass(frozen=True)
class Part:
    """A table and our own rows of it."""

    table: Table
    rows: tuple[NamedRow, ...]

    @property
    def columns(self) -> list[str]:
        """Columns in which any of our rows has an answer."""
        filled = {column for named in self.rows for column, _, _ in named.cells()}
        return [column for column in self.table.columns if column in filled]

    def chance(self, columns: Sequence[str] | None = None) -> float | None:
        """Accuracy of guessing in percent, where it is the same in all `columns`."""
        wanted = self.columns if columns is None else columns
        classes = {a.cell["classes"] for named in self.rows for column, _, a in named.cells() if column in wanted}
        return 100 / classes.pop() if len(classes) == 1 else None


def name_rows(tables: Sequence[Table]) -> list[Part]:
    """Name our own rows, as `row_names` does, and give each name its number."""
    numbers: dict[str, int] = {}
    parts = []
    for table, names in zip(tables, row_names(tables), strict=True):
        named = []
        for row, name in zip(table.rows, map(printable, names), strict=True):
            if row.kind == "ours":
                named.append(NamedRow(name, numbers.setdefault(name, len(numbers)), row))
        parts.append(Part(table, tuple(named)))
    return parts
