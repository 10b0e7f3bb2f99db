"""One kind of measurement: a study's command line and record, with the machine's load in it, and how it is shown."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from apm.devices import pick_device
from apm.errors import UsageError

from ..studies.study import Study, read_record
from .options import Options, Record
from .plots import Panel
from .tables import Row, Rows, shown

Arguments = dict[str, dict[str, Any]]
"""Flag → what argparse is told."""


def argument(flag: str, text: str, **told: Any) -> Arguments:
    """One argument and its help; several are joined with ``|``."""
    return {flag: {"help": text, **told}}


STUDENT = {"preset": "paper", "precision": "auto", "device": "auto"}
QUICK = argument("--quick", "tiny sizes, to see that it runs; times mean nothing", action="store_true")
OUT = argument("--out", "folder of the records (default: %(default)s)", type=Path, default=Path("benchmarks/results"))
DOCS = argument("--docs", "folder of the page (default: %(default)s)", type=Path, default=Path("docs"))
PHOTOGRAPH = argument("--photograph", "the file (default: scikit-image's cat)", type=Path)


@dataclass(frozen=True, kw_only=True)
class Kind(Study):
    """One kind of measurement: its command line, and its section of docs/speed.md.

    Args:
        title: of the section.
        own: arguments that it alone takes.
        panels: of its plot; none: the section is a table only.
        rounds: repetitions, where ``--rounds`` does not say otherwise.
        on_cpu: whether it is of the CPU, whatever other device there is.
    """

    title: str
    measure: Callable[[Any], Record]
    table: Callable[[Row], str]
    shared: Mapping[str, Any] = field(default_factory=dict)
    own: Arguments = field(default_factory=dict)
    panels: Sequence[Panel] = ()
    rounds: int = 9
    on_cpu: bool = False

    def __post_init__(self) -> None:
        """Find the records by their names; take what all kinds are told of the student."""
        object.__setattr__(self, "results", self.results or file_name(self.name, "*", "*"))
        object.__setattr__(self, "shared", {**self.shared, **STUDENT})

    @property
    def module(self) -> str:
        """What ``python -m`` is given."""
        return f"{__package__} {self.name}"

    def read(self, arguments: Sequence[str] | None = None) -> Options:
        """Read the command line, and settle what depends on the device."""
        options = Options(**vars(super().read(arguments)))
        for name in {"limit", "rounds", "batch", "steps"} & vars(options).keys():
            if (value := getattr(options, name)) is not None and value < 1:
                raise UsageError(f"--{name} must be 1 or more, not {value}.")
        options.device = pick_device("cpu" if self.on_cpu else str(options.device))
        options.rounds = options.rounds or (2 if options.quick else self.rounds)
        name = file_name(self.name, options.shown_preset, options.device.type, options.precision)
        options.record = options.out / name
        return options

    def outputs(self, parser: argparse.ArgumentParser) -> None:
        """Add its own arguments, and those of all kinds: repetitions, folder of the records."""
        add(parser, self.own | argument("--rounds", f"repetitions (default: {self.rounds})", type=int) | QUICK | OUT)

    def run(self, options: argparse.Namespace) -> None:
        """Measure and write the record, or read one; print its table."""
        super().run(options)
        if options.table is None:
            print(options.record, file=sys.stderr)

    def measured(self, options: argparse.Namespace) -> Record:
        """Measure, and put beside it command, time, commit, machine and its load."""
        begun, clock, before = datetime.now(timezone.utc), time.perf_counter(), load_average()
        record = super().measured(options)
        record["environment"]["load_average"] = {"before": before, "after": load_average()}
        about = {"date": begun.isoformat(timespec="seconds"), "wall_seconds": time.perf_counter() - clock}
        return {"kind": self.name, **record, **about}


def kind(
    *parts: str | tuple[Rows, str], of: type[Kind] = Kind, **more: Any
) -> Callable[[Callable[[Any], Record]], Kind]:
    """Make a kind of a function that measures: its name, its first line the question, its records `shown` so."""

    def make(measure: Callable[[Any], Record]) -> Kind:
        question = (measure.__doc__ or "").partition("\n")[0]
        return of(
            **{"name": measure.__name__, "question": question, "measure": measure, "table": shown(*parts), **more}
        )

    return make


def add(parser: argparse.ArgumentParser, arguments: Arguments) -> argparse.ArgumentParser:
    """Add these arguments."""
    for flag, told in arguments.items():
        parser.add_argument(flag, **told)
    return parser


def file_name(kind: str, preset: str, device: str, precision: str = "auto") -> str:
    """The name says what was measured, of which student, on what kind of device, and the precision asked for."""
    return "-".join(["speed", kind, preset, device, *([] if precision == "auto" else [precision])]) + ".json"


def read_all(folder: Path, pattern: str = "speed-*.json") -> list[Record]:
    """All speed records of a folder, in the order of their names; ``file`` says these.

    Raises:
        UsageError: there are none.
    """
    records = [{**read_record(path), "file": path.name} for path in sorted(folder.glob(pattern))]
    if not records:
        raise UsageError(
            f"There are no records in {folder}: run `python -m apm.benchmarks.speed --out {folder}` first."
        )
    return records


def load_average() -> list[float] | None:
    """Processes that wanted to run, on average over 1, 5 and 15 minutes; None where the system does not tell."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def photograph_of(options: Options) -> Path:
    """The file that was named, or scikit-image's cat."""
    if options.photograph is not None:
        return Path(options.photograph)
    import skimage

    return Path(skimage.__file__).parent / "data" / "chelsea.png"
