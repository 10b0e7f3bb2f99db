"""What do methods gain and cost on the same images, clean and corrupted? From the records of finished runs.

The rows of such runs are too many to keep; the record contains the output of `apm table --trust`, and for stream
methods the spread over the orders.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from apm.errors import UsageError

from ..corruptions import CORRUPTIONS
from ..runs.records import Records
from ..tables.build import make_tables
from ..tables.table import Table, TableRow, row_names
from ..tables.trust import TrustRow, TrustTable, make_trust
from ..tables.trust_formats import markdown
from .study import Options, Record, Study, plus_minus, run


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add those of this study."""
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="folders of runs, on the same images")
    parser.add_argument("--cells", action="store_true", help="also show each corruption and each data set by itself")


def measure(options: Options) -> Record:
    """Put together what the runs say."""
    runs, tables = opened(options.runs)
    once = [_once(table) for table in tables]
    return {
        "runs": [described(one) for one in runs],
        "tables": [asdict(group) for group in make_trust(once, cells=options.cells)],
        "orders": _orders(once),
    }


def opened(paths: Sequence[Path]) -> tuple[list[Records], list[Table]]:
    """Open runs, and make their tables.

    Raises:
        UsageError: no runs.
    """
    if not paths:
        raise UsageError("No runs were given: name their folders.")
    runs = [Records.open(path) for path in paths]
    return runs, make_tables(runs, published=False)


def one_table(paths: Sequence[Path]) -> tuple[list[Records], Table]:
    """Open runs of one data set, and make their table.

    Raises:
        UsageError: no runs, or of several data sets.
    """
    runs, tables = opened(paths)
    if len(tables) != 1:
        raise UsageError(f"The runs make {len(tables)} tables, not one: {', '.join(table.title for table in tables)}.")
    return runs, tables[0]


def _once(table: Table) -> Table:
    """With one row of a method that several runs had with the same settings, as zero-shot: the one of most cells."""
    kept: dict[tuple[str, str], TableRow] = {}
    for row in table.rows:
        key = row.method, json.dumps(row.settings, sort_keys=True)
        if key not in kept or len(row.cells) > len(kept[key].cells):
            kept[key] = row
    return replace(table, rows=tuple(kept.values()))


def described(one: Records) -> dict[str, Any]:
    """How a run was made: by which command, of which commit, on what."""
    session, config = one.run["sessions"][0], one.run["config"]
    kept = ("command", "git_commit", "processor", "threads", "versions", "features")
    return {
        **{name: session[name] for name in kept if name in session},
        "teacher": config["teacher"],
        "seed": config["seed"],
    }


def made_by(runs: Sequence[Mapping[str, Any]]) -> str:
    """The commands that made runs, of which commits, and what they ran on; each as `described`."""
    commands = dict.fromkeys(f"    {' '.join(one['command'])}" for one in runs)  # one may make a run for each order
    commits: dict[str, dict[str, None]] = {}
    for one in runs:
        versions = ", ".join(f"{name} {one['versions'][name]}" for name in ("torch", "open_clip_torch"))
        where = f"{one['processor']}, {one['threads']} thread each, {versions}; teacher `{one['teacher']}`"
        commits.setdefault(f"{where}, seed {one['seed']}.", {})[one["git_commit"]] = None
    return "\n".join(
        [
            *commands,
            "",
            *(f"Commit{'s' * (len(names) > 1)} {', '.join(names)}, {where}" for where, names in commits.items()),
        ]
    )


def _orders(tables: Sequence[Table]) -> dict[str, dict[str, list[float]]]:
    """Of methods that were run in several orders: by column, mean accuracy and its standard deviation, percent."""
    found: dict[str, dict[str, list[float]]] = {}
    for table, names in zip(tables, row_names(tables), strict=True):
        for name, row in zip(names, table.rows, strict=True):
            for column, score in row.cells.items():
                if "orders" in score.marks and score.accuracy is not None and score.stderr is not None:
                    found.setdefault(name, {})[column] = [score.accuracy, score.stderr]
    return found


def table(record: Record) -> str:
    """The commands, what can be trusted, and a list of what the order does."""
    shown = [made_by(record["runs"]), "", markdown([_trust_table(one) for one in record["tables"]])]
    if record["orders"]:
        shown += ["Mean and standard deviation over seeded orders of the stream:", ""]
        shown += [f"- {name}: {_spread(columns)}" for name, columns in record["orders"].items()]
    return "\n".join(shown).rstrip() + "\n"


def _spread(columns: dict[str, Sequence[float]]) -> str:
    """Mean and deviation of each column; of corruptions together, the means of both."""
    parts = [f"{name} {plus_minus(value, 2)}" for name, value in columns.items() if name not in CORRUPTIONS]
    if corrupted := [value for name, value in columns.items() if name in CORRUPTIONS]:
        means = [fmean(value[part] for value in corrupted) for part in (0, 1)]
        parts.append(f"{len(corrupted)} corruptions {plus_minus(means, 2)}")
    return "; ".join(parts)


def _trust_table(found: dict[str, Any]) -> TrustTable:
    rows = tuple(TrustRow(**{**row, "marks": tuple(row["marks"])}) for row in found["rows"])
    return TrustTable(**{**found, "cells": tuple(found["cells"]), "rows": rows, "notes": tuple(found["notes"])})


STUDY = Study(name="evidence", question=__doc__, measure=measure, table=table, shared={}, arguments=arguments)

if __name__ == "__main__":
    sys.exit(run(STUDY.main))
