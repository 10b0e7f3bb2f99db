"""What all studies share: arguments, record headers, progress, markdown tables, and their blocks in documents.

A study is one question: a module with `measure`, `table` and the `STUDY` that holds them. `python -m
apm.benchmarks.studies.NAME --root DIR --record FILE` measures, writes the record and prints its table; without
``--record`` the record goes to standard output. ``--table FILE…`` prints existing records. ``--document``, in a
clone, writes the record and fills its table into the study's page; with ``--table`` nothing is measured again.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from apm.errors import ApmError, UsageError
from apm.images.files import write_atomically
from apm.student.config import PRESETS

from ..runs.environment import describe, write_record

ROOT = Path(__file__).resolve().parents[2]
"""Of a clone; an installed package has no documents."""
RESULTS = ROOT / "benchmarks" / "results"

Options = argparse.Namespace
Record = dict[str, Any]
Item = TypeVar("Item")
Result = TypeVar("Result")

SHARED: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "root": (("--root", "--data"), {"type": Path, "help": "the images (default: as in apm bench)"}),
    "teacher": (("--teacher", "--teacher-grid"), {"help": "as in apm classify (default: %(default)s)"}),
    "preset": (("--preset",), {"choices": PRESETS, "help": "size of the student (default: %(default)s)"}),
    "steps": (("--steps",), {"type": int, "help": "optimisation steps per image (default: %(default)s)"}),
    "precision": (("--precision",), {"choices": ("auto", "fp32", "bf16")}),
    "limit": (("--limit", "--images"), {"type": int, "help": "number of images (default: %(default)s)"}),
    "seed": (("--seed",), {"type": int, "help": "random seed (default: %(default)s)"}),
    "device": (("--device",), {"help": "cpu or cuda (default: %(default)s)"}),
    "rows": (
        ("--rows",),
        {"type": Path, "metavar": "FILE", "help": "file for rows (.jsonl); an existing one is continued"},
    ),
}
"""Name → flags, and keywords for argparse. A study says which of them it takes, and their defaults."""
USUAL: dict[str, Any] = {"root": None, "teacher": "embedded", "seed": 0, "device": "cpu"}
"""Those that nearly all take."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study, as its command line.

    Args:
        name: of its module.
        question: its docstring.
        measure: arguments → what was found; ``command``, ``date`` and ``environment`` are put beside it.
        table: a record → markdown; all records to be compared at once where ``side_by_side`` is set.
        shared: those of the `SHARED` arguments that it takes, with their defaults.
        arguments: adds its own to the parser.
        results: file of its record in benchmarks/results; ``*`` stands for the preset.
        document: the page that shows its table, in a clone.
        marker: name of the table's place there.
        pictures: makes the page's pictures.
        plots: makes those that show its records.
    """

    name: str
    question: str | None
    measure: Callable[[Options], Record]
    table: Callable[[Any], str]
    shared: Mapping[str, Any]
    arguments: Callable[[argparse.ArgumentParser], object] = lambda parser: None
    side_by_side: bool = False
    results: str = ""
    document: Path | None = None
    marker: str = ""
    pictures: Callable[[Options], object] = lambda options: None
    plots: Callable[[Sequence[Record]], object] = lambda records: None

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """Do what the command line says."""
        self.run(self.read(arguments))

    @property
    def module(self) -> str:
        """What ``python -m`` is given."""
        return f"{__package__}.{self.name}"

    def read(self, arguments: Sequence[str] | None = None) -> Options:
        """Read the command line; ``command`` is added to what it says."""
        parser = argument_parser(self.name, self.question)
        parser.prog = f"python -m {self.module}"
        self.arguments(parser)
        for name, default in self.shared.items():
            flags, told = SHARED[name]
            parser.add_argument(*flags, dest=name, default=default, **told)
        self.outputs(parser)
        parser.add_argument(
            "--table", type=Path, nargs="*", metavar="FILE", help="print these records (default: the repository's)"
        )
        if self.document is not None:
            parser.add_argument("--document", action="store_true", help=f"fill {self.document.name}, in a clone")
        given = sys.argv[1:] if arguments is None else arguments
        options = parser.parse_args(given)
        options.command = command(self.module, given)
        return options

    def outputs(self, parser: argparse.ArgumentParser) -> None:
        """Add the argument for where the record goes: ``record``, a path or None."""
        parser.add_argument("--record", "--out", type=Path, metavar="FILE", help="where to write the record")

    def run(self, options: Options) -> None:
        """Measure, or read what was measured; write record, table and document."""
        to_document = self.document is not None and options.document
        if to_document:
            require_clone()
        if options.table is None:
            if to_document:
                options.record = RESULTS / self.results.replace("*", getattr(options, "preset", ""))
                self.pictures(options)
            record = self.measured(options)
            write_record(record, options.record)
            if options.record is not None:
                print(self.tables([record]))
        else:
            print(self.tables([read_record(path) for path in options.table]) if options.table else self.recorded())
        if to_document and self.document is not None:
            fill(self.document, self.marker, self.recorded())
            self.plots(self.records())

    def measured(self, options: Options) -> Record:
        """Measure, and put beside it the command, the date, the commit and the machine."""
        header = {"command": options.command, "date": time.strftime("%Y-%m-%d", time.gmtime())}
        found = self.measure(options)
        return {**header, "environment": describe(getattr(options, "device", "cpu")), **found}

    def tables(self, records: Sequence[Record]) -> str:
        """Markdown of some records."""
        return self.table(records) if self.side_by_side else "\n\n".join(self.table(record) for record in records)

    def recorded(self) -> str:
        """Markdown of the records in the repository; errors as of `records`."""
        return self.tables(self.records())

    def records(self) -> list[Record]:
        """The records in the repository, by name.

        Raises:
            UsageError: there are none.
        """
        paths = sorted(RESULTS.glob(self.results))
        if not paths:
            raise UsageError(f"There is no record {self.results} in {RESULTS}: measure first, with --record FILE.")
        return [read_record(path) for path in paths]


def argument_parser(name: str, question: str | None) -> argparse.ArgumentParser:
    """The parser of a module here, whose docstring is its help."""
    return argparse.ArgumentParser(
        prog=f"python -m {__package__}.{name}",
        description=question,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def numbers(text: str) -> list[int]:
    """For argparse: 1,2,4."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"numbers from 1 on, separated by commas, not {text}")
    return found


def run(main: Callable[[], int | None]) -> int:
    """Call a module's main function and print errors without a traceback; returns the exit code."""
    try:
        return main() or 0
    except (ApmError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def command(module: str, arguments: Sequence[str]) -> str:
    """The command, without the record's own place; of a path that leads out of this folder only the last part."""

    def shown(argument: str) -> str:
        outside = argument.startswith(("/", "~", "../"))
        return shlex.quote(Path(argument).name if outside else argument)

    kept = list(arguments)
    for flag in {"--record", "--out"}.intersection(kept):
        del kept[kept.index(flag) : kept.index(flag) + 2]
    return " ".join([f"python -m {module}", *map(shown, kept)])


def each(items: Sequence[Item], measure: Callable[[Item], Result], what: str, *, minimum: int = 1) -> list[Result]:
    """Measure each item, and report on standard error how many are done.

    Ctrl-C ends it early, and what is done is kept: it may have taken hours. With fewer than `minimum` results it is
    raised again.

    Raises:
        UsageError: there are no items, though there is a `minimum`.
    """
    if minimum and not items:
        raise UsageError(f"There are no {what} to measure.")
    done: list[Result] = []
    try:
        for item in items:
            done.append(measure(item))
            print(f"{len(done)} of {len(items)} {what}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        if len(done) < minimum:
            raise
    return done


def markdown(titles: Iterable[str], rows: Iterable[Iterable[object]], *, text: int | None = 1) -> str:
    """A table in markdown: the first ``text`` columns flush left, the others right; None: none is aligned."""
    titles = list(titles)
    sides = ["---"] * len(titles) if text is None else ["---"] * text + ["---:"] * (len(titles) - text)
    lines = [f"|{'|'.join(sides)}|"]
    return "\n".join([_line(titles), *lines, *map(_line, rows)])


def _line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def plus_minus(value: Sequence[float], digits: int) -> str:
    """A mean and its standard error, where that is known."""
    return " ± ".join(f"{number:.{digits}f}" for number in value)


def mean_and_error(values: ArrayLike) -> list[float]:
    """Mean and its standard error; of one value alone the mean."""
    found = np.asarray(values, dtype=np.float64)
    error = [float(found.std(ddof=1) / np.sqrt(len(found)))] if len(found) > 1 else []
    return [float(found.mean()), *error]


def averaged(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard error of every number in rows of the same shape, nested as they are."""
    by_name = {name: [row[name] for row in rows] for name in rows[0]}
    return {
        name: averaged(values) if isinstance(values[0], Mapping) else mean_and_error(values)
        for name, values in by_name.items()
    }


def signed(value: Sequence[float], digits: int = 3) -> str:
    """A mean difference and its standard error; bold beyond two of these."""
    text = f"{value[0]:+.{digits}f}" + "".join(f" ± {error:.{digits}f}" for error in value[1:])
    return f"**{text}**" if len(value) > 1 and abs(value[0]) > 2 * value[1] else text


def require_clone() -> None:
    """Raise a `UsageError` where there are no documents to write to."""
    if not (ROOT / "docs").is_dir():
        raise UsageError("Documents are written in a clone of the repository; this is an installed package.")


def block(document: Path, name: str) -> str:
    """Return the text between ``<!-- name … -->`` and ``<!-- end -->``, without the line breaks about it."""
    return _find(document.read_text(encoding="utf-8"), document, name)[2].strip("\n")


def fill(document: Path, name: str, text: str) -> None:
    """Replace that text."""
    require_clone()
    old = document.read_text(encoding="utf-8")
    found = _find(old, document, name)
    new = f"{old[: found.start(2)]}{text.rstrip()}\n{old[found.end(2) :]}".encode()
    write_atomically(document, new)


def _find(text: str, document: Path, name: str) -> re.Match[str]:
    found = re.search(rf"(<!-- {re.escape(name)}(?:: [^\n]*)? -->\n)(.*?)<!-- end -->", text, re.DOTALL)
    if found is None:
        raise UsageError(f"{document} has no place for {name}: <!-- {name} --> and <!-- end --> are missing.")
    return found


def read_record(path: Path) -> Record:
    """A record.

    Raises:
        UsageError: there is none.
    """
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f'No record can be read from "{path}": {error}') from None
    return record
