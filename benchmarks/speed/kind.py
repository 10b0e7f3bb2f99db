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

from ..studies.study import SHARED, Study, read_record
from .options import Options, Record

RESULTS = Path("benchmarks/results")


@dataclass(frozen=True, kw_only=True)
class Kind(Study):
    """One kind of measurement: its command line, and its section of docs/speed.md.

    Args:
        title: of the section.
        plot: draws a record into a figure; None: the section is a table only.
        rounds: repetitions, where ``--rounds`` does not say otherwise.
        on_cpu: whether it is of the CPU, whatever other device there is.
    """

    title: str
    measure: Callable[[Any], Record]
    shared: Mapping[str, Any] = field(default_factory=dict)
    plot: Callable[[Any, Record], None] | None = None
    rounds: int = 9
    on_cpu: bool = False

    def __post_init__(self) -> None:
        """Find the records by their names."""
        object.__setattr__(self, "results", self.results or file_name(self.name, "*", "*"))

    @property
    def module(self) -> str:
        """What ``python -m`` is given."""
        return f"{__package__} {self.name}"

    def read(self, arguments: Sequence[str] | None = None) -> Options:
        """Read the command line, and settle what depends on the device."""
        options = Options(**vars(super().read(arguments)))
        for name, flag in {"images": "limit", **{name: name for name in ("rounds", "batch", "dim", "steps")}}.items():
            if (value := vars(options).get(flag)) is not None and value < 1:
                raise UsageError(f"--{name} must be 1 or more, not {value}.")
        options.device = pick_device("cpu" if self.on_cpu else str(options.device))
        options.rounds = options.rounds or (2 if options.quick else self.rounds)
        options.batch = options.batch or (16 if options.device.type == "cuda" and not options.quick else 1)
        options.record = options.out / file_name(self.name, options.shown_preset, options.device.type)
        return options

    def outputs(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments of all kinds: the student's sizes, device, repetitions, folder of the records."""
        for name, default in {"preset": "paper", "precision": "auto", "device": "auto"}.items():
            flags, told = SHARED[name]
            parser.add_argument(*flags, dest=name, default=default, **told)
        parser.add_argument("--dim", type=int, default=512, help="D, the token's width, where no teacher gives it")
        parser.add_argument("--readout", default="query", choices=("query", "mean"))
        parser.add_argument("--rounds", type=int, help=f"repetitions (default: {self.rounds})")
        parser.add_argument("--batch", type=int, help="students side by side (default: 1 on a CPU, 16 on a GPU)")
        parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs; times mean nothing")
        parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records (default: %(default)s)")

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


def file_name(kind: str, preset: str, device: str) -> str:
    """The name says what was measured, of which student, and on what kind of device."""
    return f"speed-{kind}-{preset}-{device}.json"


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
