"""Does reading fewer locations change an answer? `python -m apm.benchmarks.studies.queries run FOLDER… --rows FILE`.

Adapts a student to each photograph, clean and corrupted, once reading all locations at each step and once fewer, as
`apm classify` would without options, and compares the first labels. No label of a photograph is needed. Every
adaptation is one line of the rows file: run again, the command goes on from there; with ``--offset`` and ``--limit``
parts go to several machines. `record` makes the record of one or more rows files:

    python -m apm.benchmarks.studies.queries run photos --preset paper --rows paper.jsonl
    python -m apm.benchmarks.studies.queries run photos --preset small --rows small.jsonl
    python -m apm.benchmarks.studies.queries record paper.jsonl small.jsonl --out queries-agreement.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image
from torch import Tensor

from apm.errors import ApmError, ImageError, UsageError
from apm.images.files import write_atomically
from apm.images.load import load_image, student_input
from apm.images.paths import images_below
from apm.labels import label_set, prompt_templates
from apm.student.config import PRESETS, APMConfig
from apm.teachers import load_teacher
from apm.teachers.base import Teacher
from apm.test_time.options import AdaptConfig
from apm.test_time.trainer import TestTimeTrainer
from apm.text.zeroshot import ZeroShotHead

from ..corruptions import CORRUPTIONS, CROP, VERSION, corrupt_image
from ..runs.environment import describe, write_record

ALL = "all"
LEVEL = 5
"""Severity of the corruptions."""


def photographs(folders: Sequence[Path], seed: int) -> list[tuple[str, Path]]:
    """Every image below the folders, named ``parent/folder/path`` and shuffled by a hash: any part is a sample."""
    found = [
        ("/".join((*folder.resolve().parts[-2:], str(path.relative_to(folder)))), path)
        for folder in folders
        for path in images_below(folder)
    ]

    def rank(one: tuple[str, Path]) -> bytes:
        return hashlib.sha256(f"{seed}\0{one[0]}".encode("utf-8", "surrogateescape")).digest()

    return sorted(found, key=rank)


def states(number: int, name: str, image: Image.Image, seed: int) -> Iterator[tuple[str, Image.Image]]:
    """The photograph as it is, and with one of the 15 corruptions, which take turns over the photographs."""
    yield "clean", image
    corruption = list(CORRUPTIONS)[number % len(CORRUPTIONS)]
    yield f"{corruption}/{LEVEL}", corrupt_image(image, corruption, LEVEL, seed=seed, image_id=name, resize=CROP)


class Study:
    """The adaptations that are still to be made, and the file they go to.

    Args:
        rows: the file; continued when it is there.
        settings: what the answers depend on; its first line.

    Raises:
        UsageError: the file holds rows of other settings.
    """

    def __init__(self, rows: Path, settings: dict[str, Any]) -> None:
        earlier = read_rows(rows) if rows.exists() and rows.stat().st_size else None
        if earlier is not None and earlier[0]["settings"] != settings:
            raise UsageError(f"{rows} holds rows of other settings; name another file.\n{earlier[0]['settings']}")
        self._made = {_key(row) for row in earlier[1]} if earlier else set()
        command = shlex.join(["python", "-m", "apm.benchmarks.studies.queries", *sys.argv[1:]])
        head = earlier[0] if earlier else {"command": command, "settings": settings, "environment": describe()}
        lines = [head, *earlier[1]] if earlier else [head]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(rows, lambda file: file.write(text.encode()))  # without a last line that was cut off
        self._file = rows.open("a", encoding="utf-8")

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def wants(self, name: str, state: str, queries: int | str) -> bool:
        """Whether there is no row of it yet."""
        return (name, state.partition("/")[0] == "clean", queries) not in self._made

    def add(self, row: dict[str, Any]) -> None:
        """Write one row; it is with the system before this returns."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._made.add(_key(row))


def _key(row: dict[str, Any]) -> tuple[str, bool, int | str]:
    return row["photograph"], row["state"] == "clean", row["queries"]


def read_rows(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The first line of a rows file, and its rows but for a last one that was cut off.

    Raises:
        ApmError: it is none.
    """
    text = path.read_text(encoding="utf-8")
    try:
        head, *rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return {name: head[name] for name in ("command", "settings", "environment")}, rows
    except (ValueError, KeyError, TypeError) as error:
        raise ApmError(f"{path} is no file of rows of this study: {error}") from error


def run(
    found: Sequence[tuple[int, str, Path]],
    teacher: Teacher,
    rows: Path,
    *,
    preset: str,
    counts: Sequence[int],
    steps: int,
    precision: str,
    seed: int,
) -> None:
    """Make every adaptation that has no row yet: of each photograph and state, all locations and each of `counts`."""
    head = ZeroShotHead.build(teacher, *_default_texts(teacher))
    config = APMConfig.preset(preset, dim=teacher.dim)
    compared: list[int | str] = [ALL, *counts]
    trainers = {
        count: TestTimeTrainer(
            config,
            AdaptConfig(
                steps=steps,
                precision=precision,  # type: ignore[arg-type]
                seed=seed,
                queries=count if isinstance(count, int) else None,
            ),
        )
        for count in compared
    }
    settings: dict[str, Any] = {
        "preset": preset,
        "steps": steps,
        "seed": seed,
        "teacher": teacher.identity,
        "level": LEVEL,
        "corruptions": VERSION,
        "labels": len(head.labels),
        "templates": list(head.templates),
        "precision": trainers[ALL].precision,
    }
    began = time.monotonic()
    with Study(rows, settings) as study:
        for turn, (number, name, path) in enumerate(found, 1):
            try:
                picture = load_image(path).image
            except ImageError as error:
                print(f"error: {error}", file=sys.stderr)
                continue
            for state, image in states(number, name, picture, seed):
                wanted = [count for count in compared if study.wants(name, state, count)]
                if wanted:
                    _adapt(study, teacher, head, {count: trainers[count] for count in wanted}, name, state, image)
            passed = time.monotonic() - began
            print(f"{turn} of {len(found)} photographs, {passed:.0f} s", file=sys.stderr, flush=True)


def _adapt(
    study: Study,
    teacher: Teacher,
    head: ZeroShotHead,
    trainers: dict[int | str, TestTimeTrainer],
    name: str,
    state: str,
    image: Image.Image,
) -> None:
    """Write a row for each trainer's answer to one image."""
    target = teacher.encode_image(teacher.preprocess(image)[None])  # (1, D)
    theirs = int(head.logits(target)[0].argmax())
    for count, trainer in trainers.items():
        result = trainer.adapt(student_input(image, trainer.model.image_size)[None], target)
        told = {"cosine": float(result.final_cosines[0]), "seconds": result.seconds}
        first = _first_two(head, result.tokens)
        study.add({"photograph": name, "state": state, "queries": count, "teacher": theirs, **first, **told})


def _default_texts(teacher: Teacher) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What `apm classify` takes where neither labels nor prompts are named."""
    return teacher.default_labels or label_set("imagenet"), teacher.default_templates or prompt_templates("single")


def _first_two(head: ZeroShotHead, token: Tensor) -> dict[str, Any]:
    best = head.probabilities(token)[0].topk(2)
    (first, _), (p, q) = best.indices.tolist(), best.values.tolist()
    return {"first": first, "probability": p, "margin": p - q}


def record(files: Sequence[Path], command: str) -> dict[str, Any]:
    """Count, for each preset, state and number of locations, the first labels that are not those of all locations.

    Raises:
        ApmError: a file is damaged, or files of one preset were made with different settings.
    """
    by_preset: dict[str, list[dict[str, Any]]] = defaultdict(list)
    heads: dict[str, dict[str, Any]] = {}
    commands = []
    for path in files:
        head, rows = read_rows(path)
        preset = head["settings"]["preset"]
        if heads.setdefault(preset, head)["settings"] != head["settings"]:
            raise ApmError(f"{path} was made with other settings than the files before it.")
        by_preset[preset] += rows
        commands.append(head["command"])
    cells = [cell for preset, rows in by_preset.items() for cell in _cells(preset, rows)]
    return {
        "command": command,
        "commands_of_the_rows": commands,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "settings": {preset: head["settings"] for preset, head in heads.items()},
        "environment": {preset: head["environment"] for preset, head in heads.items()},
        "cells": cells,
        "fewest_without_a_change": {preset: _fewest(preset, cells) for preset in by_preset},
    }


def _cells(preset: str, rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    table = {_key(row): row for row in rows}
    counts = sorted({row["queries"] for row in rows if row["queries"] != ALL})
    for clean in (True, False):
        for count in counts:
            pairs = [
                (row, table[name, is_clean, count])
                for (name, is_clean, queries), row in table.items()
                if queries == ALL and is_clean == clean and (name, is_clean, count) in table
            ]
            changed = [
                {"photograph": full["photograph"], "state": full["state"], "margin": full["margin"]}
                for full, few in pairs
                if full["first"] != few["first"]
            ]
            yield {
                "preset": preset,
                "state": "clean" if clean else "corrupted",
                "queries": count,
                "photographs": len(pairs),
                "changed": changed,
                "largest_change_of_probability": max(
                    (abs(full["probability"] - few["probability"]) for full, few in pairs), default=None
                ),
                "smallest_margin": min((full["margin"] for full, _ in pairs), default=None),
                "agree_with_teacher": {
                    "all": sum(full["first"] == full["teacher"] for full, _ in pairs),
                    "fewer": sum(few["first"] == few["teacher"] for _, few in pairs),
                },
                "seconds": {
                    "all": median(full["seconds"] for full, _ in pairs) if pairs else None,
                    "fewer": median(few["seconds"] for _, few in pairs) if pairs else None,
                },
            }


def _fewest(preset: str, cells: Sequence[dict[str, Any]]) -> int | None:
    """The least number of locations with which no first label changed, clean or corrupted; None: there is none."""
    by_count: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for cell in cells:
        if cell["preset"] == preset:
            by_count[cell["queries"]].append(cell)
    held = (all(cell["photographs"] and not cell["changed"] for cell in some) for some in by_count.values())
    return min((count for count, good in zip(by_count, held, strict=True) if good), default=None)


def main(arguments: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m apm.benchmarks.studies.queries", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    go = commands.add_parser("run", help="adapt, and write a row for each adaptation")
    go.add_argument("folders", type=Path, nargs="+", help="photographs in and below them")
    go.add_argument("--rows", type=Path, required=True, help="the file of rows; continued when it is there")
    go.add_argument("--teacher", default="embedded")
    go.add_argument("--preset", choices=PRESETS, default="paper")
    go.add_argument("--counts", default="64", help="numbers of locations to compare with all: 64,128")
    go.add_argument("--offset", type=int, default=0, help="first photograph of this part")
    go.add_argument("--limit", type=int, default=300, help="photographs of this part")
    go.add_argument("--steps", type=int, default=AdaptConfig().steps)
    go.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    go.add_argument("--seed", type=int, default=0)
    summing = commands.add_parser("record", help="sum rows files up")
    summing.add_argument("rows", type=Path, nargs="+")
    summing.add_argument("--out", type=Path, help="where to write the record; standard output without it")
    options = parser.parse_args(arguments)
    if options.command == "record":
        command = "python -m apm.benchmarks.studies.queries record " + " ".join(path.name for path in options.rows)
        write_record(record(options.rows, command), options.out)
        return
    found = [(number, *one) for number, one in enumerate(photographs(options.folders, options.seed))]
    part = found[options.offset : options.offset + options.limit]
    if not part:
        parser.error(f"{len(found)} photographs were found, and none from {options.offset} on.")
    run(
        part,
        load_teacher(options.teacher),
        options.rows,
        preset=options.preset,
        counts=[int(count) for count in options.counts.split(",")],
        steps=options.steps,
        precision=options.precision,
        seed=options.seed,
    )


if __name__ == "__main__":
    main()
