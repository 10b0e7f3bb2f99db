"""`apm table`: tables in the paper's layouts from run folders, what can be trusted of them, and results that leave."""

# ruff: noqa: RUF009  (`setting` makes fields)
from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apm.errors import UsageError
from apm.images.files import write_atomically
from apm.images.paths import printable
from apm.settings import check_values, setting

from .options import Debug, options_of
from .render import notice, say, say_json, warning

if TYPE_CHECKING:
    from apm.benchmarks.runs.records import Records
    from apm.benchmarks.tables.table import Table
    from apm.benchmarks.tables.trust import TrustTable

FORMAT_NAMES = ("rich", "markdown", "csv", "json", "latex", "parquet", "eval-results")
_ROWS = ("csv", "parquet")
_WIDE = 4000  # columns: a table is never cut, whatever the terminal's width


@dataclass(frozen=True, kw_only=True)
class Form:
    """What is made of the records, and where it goes.

    Raises:
        UsageError: there is no format of this name, or options do not go together.
    """

    format: str = setting(
        "rich",
        f"One of {', '.join(FORMAT_NAMES)}. parquet holds rows; eval-results are files for a model card.",
        choices=FORMAT_NAMES,
    )
    as_json: bool = setting(False, "The same as --format json.")
    trust: bool = setting(
        False, "Show instead what can be trusted: intervals, tests against zero-shot, ranks, calibration and cost."
    )
    cells: bool = setting(True, "With --trust: also show each cell by itself.")
    rows: bool = setting(False, "Print every row of the records instead, with label names: csv or parquet.")
    out: Path | None = setting(
        None, "Write to this file instead of stdout; eval-results: to .eval_results in this folder."
    )
    task: str = setting("default", "For eval-results: id of the task in the data set's eval.yaml on the hub.")
    published: bool = setting(True, "Include the published rows, marked as such.")
    oracle: bool = setting(
        False, "Include the best step, chosen with the test labels and marked as such; needs bench --record-steps."
    )

    @property
    def name(self) -> str:
        """The format to write."""
        return "json" if self.as_json else "csv" if self.rows and self.format == "rich" else self.format

    def __post_init__(self) -> None:
        """Check what goes with what."""
        check_values(self)
        if self.trust and (self.rows or self.name in ("parquet", "eval-results")):
            raise UsageError("--trust works with the formats rich, markdown, csv, json and latex, and without --rows.")
        if self.rows and self.name not in _ROWS:
            raise UsageError(f"--rows works with the formats {' and '.join(_ROWS)}, not with {self.name}.")
        if self.out is None and self.name == "parquet":
            raise UsageError("Parquet is not printed to a terminal: name a file with --out FILE.")
        if self.out is not None and self.name == "rich":
            raise UsageError("--out is for the other formats: choose one with --format.")


@options_of(Form, "form", spelled={"as_json": "--json"})
def table(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run folders of apm bench.")],
    form: Form,
    debug: Debug = False,
) -> None:
    """Print tables from the records of runs: the paper's Tables 1, 2 and 3, and one for each other data set.

    Shows accuracy ± standard error and count for each cell, and for each method its agreement with the teacher, flips
    each way with McNemar's p, calibration and speed. Several runs are combined into one table. With --trust the methods
    are ranked by what the data show, over all cells together and in each.

    Examples:

        apm table runs/digits runs/fog

        apm table runs/digits --trust --format markdown

        apm table runs/digits --format parquet --out rows.parquet
    """
    from apm.benchmarks.runs.records import Records
    from apm.benchmarks.tables.build import make_tables

    opened = [Records.open(path) for path in runs]
    published, oracle = form.published and not form.trust, form.oracle and not form.trust
    tables = make_tables(opened, published=published, oracle=oracle)
    if not tables:
        raise UsageError(f"No rows yet in {', '.join(map(str, runs))}.")
    if form.rows or form.name == "parquet":
        _give_rows(opened, form.name, form.out)
    elif form.name == "eval-results":
        _give_eval_results(tables, form.task, form.out)
    elif form.trust:
        _give_trust(tables, form)
        warn(tables)
    elif form.name == "rich":
        show(tables)
    else:
        from apm.benchmarks.tables.formats import FORMATS

        _give(FORMATS[form.name](tables), form.name, form.out)
        warn(tables)


def _give_trust(tables: Sequence[Table], form: Form) -> None:
    from apm.benchmarks.tables.trust import make_trust
    from apm.benchmarks.tables.trust_formats import FORMATS

    found = make_trust(tables, cells=form.cells)
    if form.name == "rich":
        show_trust(found)
    else:
        _give(FORMATS[form.name](found), form.name, form.out)


def _give(text: str, name: str, out: Path | None) -> None:
    """Print a text, or write it into a file."""
    if out is None:
        (say_json if name == "json" else say)(text, end="")
    else:
        write_atomically(out, text.encode("utf-8", "backslashreplace"))


def _give_rows(runs: Sequence[Records], name: str, out: Path | None) -> None:
    from apm.benchmarks.tables.leaving import rows_csv, rows_parquet, rows_table

    found = rows_table(runs)
    if out is None:
        say(rows_csv(found).decode(), end="")
    else:
        write_atomically(out, rows_parquet(found) if name == "parquet" else rows_csv(found))


def _give_eval_results(tables: Sequence[Table], task: str, out: Path | None) -> None:
    from apm.benchmarks.tables.leaving import eval_results

    files, left_out = eval_results(tables, task=task)
    if not files:
        raise UsageError(f"No score of these runs can go on a model card. {'; '.join(left_out)}.")
    for reason in left_out:
        notice(f"left out: {reason}")
    for name, text in files.items():
        if out is None:
            say(f"# {name}\n{text}", end="")
        else:
            write_atomically(out / ".eval_results" / name, text.encode())


def show_trust(tables: Sequence[TrustTable]) -> None:
    """Print on stdout, for people, what can be trusted."""
    from apm.benchmarks.tables.trust_formats import HEADINGS, LEGEND, lines

    for one in tables:
        print_table(HEADINGS, lines(one), title=one.title)
        say("".join(f"\n  {' '.join(note.splitlines())}" for note in one.notes) + "\n")
    say("\n".join(f"  {text}" for text in LEGEND))


def show(tables: Sequence[Table]) -> None:
    """Print tables on stdout, for people; warnings go to stderr."""
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
    """Print the tables' warnings on stderr."""
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
        numeric = all(row[number][:1] in "0123456789–<+-" for row in rows)
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
