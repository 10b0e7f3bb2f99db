"""What all measurements of speed share: a study's command line and record, with the machine's load in it."""

from __future__ import annotations

import argparse
import json
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

from ..studies.study import SHARED, Study

SCHEMA = 1
RESULTS = Path("benchmarks/results")

Given = argparse.Namespace
Record = dict[str, Any]


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

    def read(self, arguments: Sequence[str] | None = None) -> Given:
        """Read the command line, and settle what depends on the device."""
        given = super().read(arguments)
        for name in ("rounds", "batch", "dim", "steps", "limit"):
            value = getattr(given, name, None)
            if value is not None and value < 1:
                raise UsageError(f"--{name if name != 'limit' else 'images'} must be 1 or more, not {value}.")
        given.device = pick_device("cpu" if self.on_cpu else given.device)
        given.rounds = given.rounds or (2 if given.quick else self.rounds)
        given.batch = given.batch or (16 if given.device.type == "cuda" and not given.quick else 1)
        given.record = given.out / file_name(self.name, "tiny" if given.quick else given.preset, given.device.type)
        return given

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

    def run(self, options: Given) -> None:
        """Measure and write the record, or read one; print its table."""
        super().run(options)
        if options.table is None:
            print(options.record, file=sys.stderr)

    def measured(self, options: Given) -> Record:
        """Measure, and put beside it command, time, commit, machine and its load."""
        begun, clock, before = datetime.now(timezone.utc), time.perf_counter(), load_average()
        record = super().measured(options)
        record["environment"]["load_average"] = {"before": before, "after": load_average()}
        about = {"date": begun.isoformat(timespec="seconds"), "wall_seconds": time.perf_counter() - clock}
        return {"schema": SCHEMA, "kind": self.name, **record, **about}


def file_name(kind: str, preset: str, device: str) -> str:
    """The name says what was measured, of which student, and on what kind of device."""
    return f"speed-{kind}-{preset}-{device}.json"


def some(given: Given, values: Sequence[int]) -> Sequence[int]:
    """Points of a sweep: all of them, or two if it is to be quick."""
    return values[:2] if given.quick else values


def read_all(folder: Path) -> list[Record]:
    """All speed records of a folder, in the order of their names.

    Raises:
        UsageError: there are none, or one is of another schema.
    """
    records = []
    for path in sorted(folder.glob("speed-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.get("schema") != SCHEMA:
            raise UsageError(f"{path} has schema {record.get('schema')}, not {SCHEMA}: measure it again.")
        records.append({**record, "file": path.name})
    if not records:
        raise UsageError(
            f"There are no records in {folder}: run `python -m apm.benchmarks.speed --out {folder}` first."
        )
    return records


def load_average() -> list[float] | None:
    """Processes that wanted to run, on average over 1, 5 and 15 minutes; None where the system does not tell."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None
