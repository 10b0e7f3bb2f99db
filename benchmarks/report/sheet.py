"""A table of a page, whatever it holds."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from apm.images.paths import printable


@dataclass(frozen=True)
class Sheet:
    """Text by rows and columns; the first column names the row."""

    caption: str
    headings: tuple[str, ...]
    numeric: tuple[bool, ...]
    """Whether a column is sorted by its numbers."""
    rows: tuple[tuple[str, ...], ...]
    kinds: tuple[str, ...] = ()
    """Style of each row, or none at all."""


def sheet(
    caption: str,
    headings: Iterable[str],
    rows: Iterable[Iterable[object]],
    *,
    text: Collection[str | int],
    kinds: Iterable[str] = (),
) -> Sheet:
    """Make a table of printable text; `text` holds the headings or numbers of the columns that are not numeric."""
    names = tuple(map(printable, headings))
    numeric = tuple(name not in text and place not in text for place, name in enumerate(names))
    lines = tuple(tuple(printable(str(cell)) for cell in row) for row in rows)
    return Sheet(printable(caption), names, numeric, lines, tuple(kinds))
