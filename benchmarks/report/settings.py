"""How each run was made, and on which machine: run.json in words."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apm.images.paths import printable

from ..runs.records import Records
from .sheet import Sheet, sheet

FAILURES_SHOWN = 20


@dataclass(frozen=True)
class Session:
    """One call of apm bench."""

    command: str
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class LabelSet:
    """The classes of some cells, by the hash that the record gives them."""

    key: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """One run folder."""

    path: str
    facts: tuple[tuple[str, str], ...]
    sessions: tuple[Session, ...]
    cells: Sheet
    methods: Sheet
    prompts: tuple[LabelSet, ...]
    labels: tuple[LabelSet, ...]
    failures: Sheet | None
    """Images without an answer, the first few."""
    failures_left_out: int


CELL_HEADINGS = ("cell", "images", "of", "failed", "classes", "split", "layout", "source", "prompts", "fingerprint")


def describe_run(records: Records) -> Run:
    """Put a run's record into words. Paths, labels and errors come out as one printable line each."""
    run = records.run
    teacher, config = run["teacher"], run["config"]
    failures = _failures(records)
    return Run(
        path=printable(str(records.path)),
        facts=_facts(
            {
                "teacher": f"{teacher['name']}, weights {teacher['identity']}",
                "teacher's notes": " ".join(teacher["notes"]),
                "seed": config["seed"],
                "order of images": f"{run['stream_order']['generator']}, seed {run['stream_order']['seed']}",
                "limit": "none" if config["limit"] is None else f"{config['limit']} images a cell",
                "prompt set": config["prompts"] or "each data set's own",
                "per-step predictions": "recorded" if config["record_steps"] else "not recorded",
                "wall time": f"{run['wall_seconds']:,.0f} s",
            }
        ),
        sessions=tuple(_session(session) for session in run["sessions"]),
        cells=sheet(
            "Cells",
            CELL_HEADINGS,
            [_cell(key, cell, run["counts"].get(key, {})) for key, cell in records.cells.items()],
            text=("cell", "split", "layout", "source", "prompts", "fingerprint"),
        ),
        methods=sheet(
            "Methods",
            ("method", "settings"),
            [(name, _flat(settings)) for name, settings in records.methods.items()],
            text=("method", "settings"),
        ),
        prompts=_sets(run["prompt_sets"]),
        labels=_sets(run["label_sets"]),
        failures=sheet(
            "Images without an answer", ("image", "cell", "error"), failures[:FAILURES_SHOWN], text=(0, 1, 2)
        )
        if failures
        else None,
        failures_left_out=max(0, len(failures) - FAILURES_SHOWN),
    )


def _session(session: Mapping[str, Any]) -> Session:
    versions = ", ".join(f"{name} {version}" for name, version in session["versions"].items())
    facts = {
        "started": session["started"],
        "took": f"{session['seconds']:,.1f} s",
        "commit": session["git_commit"] or "unknown",
        "device": f"{session['device_name']} ({session['device']})",
        "processes": session["processes"],
        "threads": session["threads"],
        "cores": session["cores"],
        "batch size": session["batch_size"],
        "system": session["system"],
        "versions": versions,
    }
    return Session(printable(shlex.join(session["command"])), _facts(facts))


def _cell(key: str, cell: Mapping[str, Any], counts: Mapping[str, Any]) -> tuple[object, ...]:
    return (
        key,
        counts.get("images", 0),
        cell["total"],
        counts.get("failed_images", 0),
        cell["classes"],
        cell["split"],
        cell["layout"],
        cell["source"],
        cell["prompts"],
        str(cell["fingerprint"])[:16],
    )


def _failures(records: Records) -> list[tuple[str, str, str]]:
    """Images without an answer, once for each reason that some method has."""
    found = {
        (str(identity), key, str(error))
        for key in records.cells
        for _, rows in records.rows(key)
        for identity, error in zip(rows.id, rows.error, strict=True)
        if error is not None
    }
    return sorted(found)


def _facts(facts: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    return tuple((name, printable(str(value))) for name, value in facts.items() if value not in ("", None))


def _flat(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in settings.items())


def _sets(sets: Mapping[str, Sequence[str]]) -> tuple[LabelSet, ...]:
    return tuple(LabelSet(printable(key), tuple(map(printable, names))) for key, names in sets.items())
