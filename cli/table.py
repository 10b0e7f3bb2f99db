"""`apm table`: tables in the paper's layouts from run folders, beside the published numbers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apm.errors import UsageError, unknown
from apm.images.paths import printable

from .options import Debug
from .render import say, say_json, warning

if TYPE_CHECKING:
    from apm.benchmarks.tables.table import Table

FORMAT_NAMES = ("rich", "markdown", "csv", "json", "latex")
_WIDE = 4000  # columns: a table is never cut, whatever the terminal's width


def table(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run folders of apm bench.")],
    format: Annotated[str, typer.Option(help=f"One of {', '.join(FORMAT_NAMES)}.")] = "rich",
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    published: Annotated[
        bool, typer.Option("--published/--no-published", help="With the published rows, marked as such.")
    ] = True,
    oracle: Annotated[
        bool,
        typer.Option(
            "--oracle", help="With the best step chosen by peeking at labels, marked; needs bench --record-steps."
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    """Print tables from the records of runs: the paper's Tables 1, 2 and 3, and one for each other data set.

    Per cell accuracy ± standard error and count; per method agreement with its teacher, flips each way with McNemar's
    p, calibration and speed. Several runs come together in one table.
    """
    if format not in FORMAT_NAMES:
        raise unknown("format", format, FORMAT_NAMES)

    from apm.benchmarks.runs.records import Records
    from apm.benchmarks.tables.build import make_tables
    from apm.benchmarks.tables.formats import FORMATS

    tables = make_tables([Records.open(path) for path in runs], published=published, oracle=oracle)
    if not tables:
        raise UsageError(f"No rows yet in {', '.join(map(str, runs))}.")
    if as_json or format != "rich":
        name = "json" if as_json else format
        (say_json if name == "json" else say)(FORMATS[name](tables), end="")
        warn(tables)
    else:
        show(tables)


def show(tables: Sequence[Table]) -> None:
    """Print tables to stdout for people; warnings go to stderr."""
    from apm.benchmarks.tables.formats import DETAIL_HEADINGS, details, grid

    for one in tables:
        headings, rows, notes = grid(one)
        kinds = ["" if row.kind == "ours" else "dim" if row.kind == "published" else "yellow" for row in one.rows]
        print_table(headings, rows, title=one.title, styles=kinds)
        if detailed := details(one):
            say("")
            print_table(DETAIL_HEADINGS, detailed, title="all cells together, against the teacher")
        say("".join(f"\n  {' '.join(note.splitlines())}" for note in notes) + "\n")
    warn(tables)


def warn(tables: Sequence[Table]) -> None:
    """Say on stderr what must not be overlooked."""
    for one in tables:
        for text in one.warnings:
            warning(text)


def print_table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None, styles: Sequence[str] = ()
) -> None:
    """Print a table on stdout as lines that are never cut; coloured where that is a terminal.

    A table too wide for the terminal is turned, a line for each column, where that fits; else it is printed in blocks
    of columns, each with the first column before it.
    """
    for number, (heads, lines, kinds) in enumerate(_fitted(headings, rows, styles)):
        if number:
            typer.echo("")
        _print_block(heads, lines, title if number == 0 else None, kinds)


def _print_block(
    headings: Sequence[str], rows: Sequence[Sequence[str]], title: str | None, styles: Sequence[str]
) -> None:
    from rich.console import Console
    from rich.table import Table as View
    from rich.text import Text

    heading = Text(printable(title), style="bold") if title else None
    view = View(box=None, pad_edge=False, title=heading, title_justify="left")
    for number, name in enumerate(headings):
        numeric = all(row[number][:1] in "0123456789–<" for row in rows)
        view.add_column(Text(printable(name), style="bold"), justify="right" if numeric else "left", no_wrap=True)
    for number, row in enumerate(rows):
        view.add_row(*(Text(printable(cell)) for cell in row), style=styles[number] if styles else "")
    console = Console(width=_WIDE, highlight=False, force_terminal=sys.stdout.isatty())
    with console.capture() as captured:
        console.print(view)
    typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))  # its cells are clean


_Block = tuple[Sequence[str], Sequence[Sequence[str]], Sequence[str]]
"""Headings, rows and the rows' styles."""


def _fitted(headings: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str]) -> list[_Block]:
    """The table as it fits the terminal: whole, turned, or in blocks; whole where nothing fits, or to a file."""
    from rich.console import Console

    whole = [(headings, rows, styles)]
    widths = _widths(headings, rows)
    if not sys.stdout.isatty() or sum(widths) - _GAP <= (room := Console().width):
        return whole
    names, lines = (
        [headings[0], *(row[0] for row in rows)],
        list(zip(headings[1:], *(row[1:] for row in rows), strict=True)),
    )
    if sum(_widths(names, lines)) - _GAP <= room:
        return [(names, lines, ())]
    first, *others = widths
    if first + max(others, default=0) - _GAP > room:
        return whole
    blocks: list[list[int]] = []
    left = 0
    for number, width in enumerate(others, 1):
        if width - _GAP > left:
            blocks.append([0])
            left = room - first
        blocks[-1].append(number)
        left -= width
    return [([headings[n] for n in block], [[row[n] for n in block] for row in rows], styles) for block in blocks]


_GAP = 2
"""Columns of the terminal between two columns of a table."""


def _widths(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """Columns of the terminal that each column of a table takes, with the gap behind it."""
    from rich.cells import cell_len

    columns = zip(headings, *rows, strict=True)
    return [max(cell_len(printable(cell)) for cell in column) + _GAP for column in columns]
