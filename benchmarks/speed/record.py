"""The record of one measurement: a JSON file with the machine's description in it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from apm.errors import UsageError
from apm.images.files import write_atomically

from ..runs.environment import describe
from ..studies.study import command

SCHEMA = 1
PREFIX = "speed-"


class Recorder:
    """Begins a record (machine, load, time), and ends it with the rows measured."""

    def __init__(self, kind: str, settings: Mapping[str, Any], device: torch.device) -> None:
        self.kind, self.settings, self.device = kind, dict(settings), device
        self.begun = datetime.now(timezone.utc)
        self.load_before = load_average()

    def finish(self, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the record of ``rows`` (plain JSON values)."""
        environment = describe(self.device)
        environment["memory_bytes"] = _memory()
        environment["load_average"] = {"before": self.load_before, "after": load_average()}
        if self.device.type == "cuda":
            environment["tf32"] = bool(torch.backends.cuda.matmul.allow_tf32)
            environment["cuda"] = torch.version.cuda
        return {
            "schema": SCHEMA,
            "kind": self.kind,
            "command": command("apm.benchmarks.speed", sys.argv[1:]),
            "date": self.begun.isoformat(timespec="seconds"),
            "wall_seconds": (datetime.now(timezone.utc) - self.begun).total_seconds(),
            "environment": environment,
            "settings": self.settings,
            "summary": dict(summary or {}),
            "rows": [dict(row) for row in rows],
        }


def file_name(record: Mapping[str, Any]) -> str:
    """The name says what was measured, of which student, and on what kind of device."""
    device = record["environment"]["device"].partition(":")[0]
    parts = (record["kind"], record["settings"].get("preset"), device)
    return PREFIX + "-".join(part for part in parts if part) + ".json"


def write(record: Mapping[str, Any], folder: Path, name: str | None = None) -> Path:
    """Write a record into ``folder``; an earlier one of the same name is replaced, never half."""
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    return write_atomically(folder / (name or file_name(record)), text.encode())


def read_all(folder: Path) -> list[dict[str, Any]]:
    """All speed records of a folder, in the order of their names.

    Raises:
        UsageError: there are none, or one is of another schema.
    """
    records = []
    for path in sorted(folder.glob(f"{PREFIX}*.json")):
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


def resident_bytes() -> int | None:
    """Memory of this process now; None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
