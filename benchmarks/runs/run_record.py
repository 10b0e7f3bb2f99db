"""What run.json says: the configuration of a run, its cells, its sessions; and whether a run may be continued."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apm.errors import ApmError, UsageError
from apm.processes import Group
from apm.teachers.base import Teacher

from ..corruptions import VERSION
from ..methods.base import HasOwnPrompt, Method
from ..methods.published import AsPublished
from .environment import describe
from .file_state import FileState
from .records import RunFolder
from .run_json import SCHEMA_VERSION, changed_configuration, describe_differences, differences
from .source import Features

if TYPE_CHECKING:
    from ..datasets import Dataset

FLUSH_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What a run is besides its cells, methods and teacher.

    Fields up to `record_steps` are part of its configuration.
    """

    seed: int = 0
    limit: int | None = None
    prompts: str | None = None
    """Name of the prompt set that replaces the data sets' own; None for their own."""
    templates: tuple[str, ...] | None = None
    """Its templates; given together with `prompts`."""
    order: int | None = None
    """Seed of the stream order; None: `seed`."""
    protocol: str = "common"
    """What the methods were made for, see `apm.benchmarks.methods.published`."""
    record_steps: bool = False
    record_logits: bool = False
    """Whether rows hold the logit of every class; no part of the configuration, since it changes no answer."""
    batch_size: int = 8
    workers: int = 4
    """Threads that read and decode images while the teacher and the students compute."""
    flush_seconds: float = FLUSH_SECONDS
    fresh: bool = False
    command: tuple[str, ...] = ()

    @property
    def order_seed(self) -> int:
        """Seed of the stream order."""
        return self.seed if self.order is None else self.order


def prompted(dataset: Dataset, options: RunOptions) -> Dataset:
    """The data set with the run's prompts, where the run has its own."""
    if options.templates is None:
        return dataset
    return replace(dataset, templates=options.templates, prompts_name=options.prompts or "custom")


def _title(dataset: Dataset) -> str:
    """What tables call it: for a folder of the user's its own name, with the folder above where that says more."""
    return dataset.title if dataset.name != "folder" else "/".join(Path(dataset.source).resolve().parts[-2:])


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def describe_cells(
    cells: Sequence[Callable[[], Dataset]], options: RunOptions, *, look: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, list[str]]], dict[str, FileState]]:
    """Open every cell once.

    Args:
        cells: open their data sets.
        options: of the run.
        look: whether to look at the files.

    Returns:
        What run.json says of each cell, by key; the label and prompt sets, once each, by digest; the state of the files
        of each cell, where they were looked at.
    """
    states: dict[str, FileState] = {}
    headers: dict[str, dict[str, Any]] = {}
    sets: dict[str, dict[str, list[str]]] = {"label_sets": {}, "prompt_sets": {}}
    for open_cell in cells:
        dataset = prompted(open_cell(), options)
        if dataset.cell in headers:
            raise UsageError(f"{dataset.cell} is requested twice in one run.")
        if look:
            states[dataset.cell] = FileState.of(dataset.samples)
        labels, prompts = _digest(dataset.class_names), _digest(dataset.templates)
        sets["label_sets"][labels] = list(dataset.class_names)
        sets["prompt_sets"][prompts] = list(dataset.templates)
        headers[dataset.cell] = {
            "identity": {
                "fingerprint": dataset.fingerprint,
                "label_set": labels,
                "prompt_set": prompts,
                "generated": f"corruptions version {VERSION}" if dataset.generated else None,
            },
            "dataset": dataset.name,
            "title": _title(dataset),
            "variant": dataset.variant,
            "corruption": dataset.corruption,
            "level": dataset.level,
            "generated": dataset.generated,
            "layout": dataset.layout,
            "source": dataset.source,
            "split": dataset.split,
            "fingerprint": dataset.fingerprint,
            "classes": len(dataset.class_names),
            "label_set": labels,
            "prompts": dataset.prompts_name,
            "prompt_set": prompts,
            "images": len(dataset.samples),
            "total": dataset.total,
            "notes": list(dataset.notes),
            "warnings": list(dataset.warnings),
        }
    return headers, sets, states


def add_own_prompts(
    headers: Mapping[str, dict[str, Any]], sets: Mapping[str, Mapping[str, list[str]]], methods: Sequence[Method]
) -> None:
    """Note with each cell the methods that do not use its prompts, and what they use instead; and what is published.

    Raises:
        UsageError: descriptors that a method is given say nothing of some of a cell's classes.
    """
    for header in headers.values():
        templates = sets["prompt_sets"][header["prompt_set"]]
        published = [method for method in methods if isinstance(method, AsPublished)]
        for method in published:
            method.begin(header["dataset"], sets["label_sets"][header["label_set"]])
            if method.described is not None:
                header["identity"]["descriptors"] = method.described.digest
        if published:
            header["published"] = {method.name: method.used for method in published}
        own = {method.name: method.own_prompt(templates) for method in methods if isinstance(method, HasOwnPrompt)}
        if own := {name: prompt for name, prompt in own.items() if prompt is not None and [prompt] != templates}:
            header["own_prompts"] = own


def configuration(
    methods: Sequence[Method], teacher: Teacher, headers: Mapping[str, Mapping[str, Any]], options: RunOptions
) -> dict[str, Any]:
    """What fixes a run's answers: another session continues it only when all of this is the same."""
    return {
        "teacher": teacher.identity,
        "methods": {method.name: {"stream": method.stream, **method.settings} for method in methods},
        "cells": {key: header["identity"] for key, header in headers.items()},
        "seed": options.seed,
        "limit": options.limit,
        "prompts": options.prompts,
        "record_steps": options.record_steps,
        "protocol": options.protocol,
        "order": options.order_seed,
    }


def prepare(
    folder: RunFolder,
    config: dict[str, Any],
    headers: dict[str, dict[str, Any]],
    sets: dict[str, dict[str, list[str]]],
    files: Callable[[], None],
    teacher: Teacher,
    options: RunOptions,
    group: Group,
    features: Features | None = None,
) -> dict[str, Any]:
    """Begin or continue the run: check the configuration, then the `files`, and write run.json."""
    session = folder.begin()  # before anything is read: what an earlier session writes from now on would be missed
    if options.fresh:
        folder.clear()
    record = folder.read_run()
    if record is None:
        if folder.all_shards():
            raise UsageError(f"{folder.path} holds rows but no run.json. Give another folder with --out, or --fresh.")
        record = {
            "schema": SCHEMA_VERSION,
            "config": config,
            "teacher": {
                "name": teacher.name,
                "identity": teacher.identity,
                "notes": list(teacher.notes),
                "settings": dict(getattr(teacher, "settings", {})),
            },
            "stream_order": {"generator": "numpy PCG64 permutation", "seed": options.order_seed},
            "cells": {key: {k: v for k, v in header.items() if k != "identity"} for key, header in headers.items()},
            **sets,
            "sessions": [],
            "counts": {},
            "wall_seconds": 0.0,
        }
    elif found := changed_configuration(record, {"config": config, **sets}):
        raise UsageError(
            f"{folder.path} holds a run of another configuration. {found}. "
            "Give another folder with --out, or start over with --fresh."
        )
    files()
    record["sessions"].append(
        {
            "id": session,
            "command": list(options.command),
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": 0.0,
            "processes": group.world,
            "batch_size": options.batch_size,
            "workers": options.workers,
            **({"features": features.record} if features is not None else {}),
            **describe(teacher.device),
        }
    )
    folder.write_run(record)
    return record


def check_same_data(first: Mapping[str, Any], mine: Mapping[str, Any], group: Group) -> None:
    """Check that this machine sees the same files and weights as the first process."""
    if found := differences(first, mine):
        raise UsageError(f"Process {group.rank} does not see the same as process 0. {describe_differences(found)}.")


def count_rows(folder: RunFolder, cells: Iterable[str]) -> dict[str, dict[str, int]]:
    """By cell, how many images have rows, how many rows there are, and how many images failed by some method."""
    counts = {}
    for cell in cells:
        rows = folder.read(cell, ["position", "error"])
        failed = rows.filter(rows["error"].is_valid())
        counts[cell] = {
            "images": len(set(rows["position"].to_pylist())),
            "rows": rows.num_rows,
            "failed_images": len(set(failed["position"].to_pylist())),
        }
    return counts


def check_complete(
    folder: RunFolder, counts: Mapping[str, Mapping[str, int]], headers: Mapping[str, Mapping[str, Any]], methods: int
) -> None:
    """Check at the end of a run that every image has a row by every method.

    Raises:
        ApmError: rows have gone that were there, since somebody removed files.
    """
    short = [
        f"{cell} ({counts[cell]['rows']} of {header['images'] * methods})"
        for cell, header in headers.items()
        if counts[cell]["rows"] < header["images"] * methods
    ]
    if short:
        raise ApmError(
            f"{folder.path}: rows of {', '.join(short)} were removed during the run. Run the same command again: what "
            "is missing will be computed again."
        )
