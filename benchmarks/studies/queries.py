"""Does reading fewer locations change an answer? `python -m apm.benchmarks.studies.queries --root DIR --rows FILE`.

Adapts a student to each photograph, clean and corrupted, once reading all locations at each step and once fewer, as
`apm classify` would without options, and compares the first labels. No label of a photograph is needed. Every
adaptation is one line of the rows file: run again, the command goes on from there; with ``--offset`` and ``--limit``
parts go to several machines. Without ``--root`` rows files are summed up to the record:

    python -m apm.benchmarks.studies.queries --root photos --preset paper --rows paper.jsonl
    python -m apm.benchmarks.studies.queries --root photos --preset small --rows small.jsonl
    python -m apm.benchmarks.studies.queries --rows paper.jsonl small.jsonl --record queries-agreement.json
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from apm.errors import ApmError, ImageError, UsageError
from apm.images.files import read_json_lines, write_atomically
from apm.images.load import load_image
from apm.images.paths import images_below
from apm.labels import label_set, prompt_templates
from apm.teachers import load_teacher
from apm.teachers.base import Teacher
from apm.test_time.inputs import student_inputs
from apm.test_time.options import StudentOptions
from apm.test_time.trainer import TestTimeTrainer
from apm.text.zeroshot import ZeroShotHead

from ..corruptions import CORRUPTIONS, CROP, VERSION, corrupt_image
from ..datasets.dataset import rank
from ..runs.environment import describe
from .study import ROOT, Options, Record, Study, each, markdown, numbers, run

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
    return sorted(found, key=lambda one: rank(seed, one[0]))


def states(number: int, name: str, image: Image.Image, seed: int) -> Iterator[tuple[str, Image.Image]]:
    """The photograph as it is, and with one of the 15 corruptions, which take turns over the photographs."""
    yield "clean", image
    corruption = list(CORRUPTIONS)[number % len(CORRUPTIONS)]
    yield f"{corruption}/{LEVEL}", corrupt_image(image, corruption, LEVEL, seed=seed, image_id=name, resize=CROP)


class Rows:
    """The adaptations that are still to be made, and the file they go to.

    Args:
        rows: the file; continued when it is there.
        settings: what the answers depend on; its first line.
        command: that makes them.

    Raises:
        UsageError: the file holds rows of other settings.
    """

    def __init__(self, rows: Path, settings: dict[str, Any], command: str) -> None:
        earlier = read_rows(rows) if rows.exists() and rows.stat().st_size else None
        if earlier is not None and earlier[0]["settings"] != settings:
            raise UsageError(f"{rows} holds rows of other settings; name another file.\n{earlier[0]['settings']}")
        self._made = {_key(row) for row in earlier[1]} if earlier else set()
        head = earlier[0] if earlier else {"command": command, "settings": settings, "environment": describe()}
        lines = [head, *earlier[1]] if earlier else [head]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(rows, lambda file: file.write(text.encode()))  # without a last line that was cut off
        self._file = rows.open("a", encoding="utf-8")

    def __enter__(self) -> Rows:
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
    try:
        head, *rows = read_json_lines(path)
        return {name: head[name] for name in ("command", "settings", "environment")}, rows
    except (ValueError, KeyError, TypeError) as error:
        raise ApmError(f"{path} is no file of rows of this study: {error}") from error


def adapt(found: Sequence[tuple[int, str, Path]], options: Options) -> None:
    """Make every adaptation that has no row yet: of each photograph and state, all locations and each of the counts."""
    teacher = load_teacher(options.teacher)
    head = ZeroShotHead.build(teacher, *_default_texts(teacher))
    given = {name: getattr(options, name) for name in ("preset", "steps", "precision", "seed")}
    student, place = StudentOptions(**given), torch.device("cpu")
    trainers = {
        count: TestTimeTrainer(student.model(teacher.dim), replace(student, queries=count).training(place))
        for count in (ALL, *options.counts)
    }
    settings: dict[str, Any] = {
        "preset": options.preset,
        "steps": options.steps,
        "seed": options.seed,
        "teacher": teacher.identity,
        "level": LEVEL,
        "corruptions": VERSION,
        "labels": len(head.labels),
        "templates": list(head.templates),
        "precision": trainers[ALL].precision,
    }
    with Rows(options.rows[0], settings, options.command) as rows:

        def one(photograph: tuple[int, str, Path]) -> None:
            number, name, path = photograph
            try:
                picture = load_image(path).image
            except ImageError as error:
                print(f"error: {error}", file=sys.stderr)
                return
            for state, image in states(number, name, picture, options.seed):
                wanted = {count: trainer for count, trainer in trainers.items() if rows.wants(name, state, count)}
                if wanted:
                    _adapt(rows, teacher, head, wanted, name, state, image)

        each(found, one, "photographs")


def _adapt(
    made: Rows,
    teacher: Teacher,
    head: ZeroShotHead,
    trainers: dict[int | str, TestTimeTrainer],
    name: str,
    state: str,
    image: Image.Image,
) -> None:
    """Write a row for each trainer's answer to one image."""
    seen = student_inputs([image], teacher, next(iter(trainers.values())).model)
    target = seen.tokens  # (1, D)
    theirs = int(head.logits(target)[0].argmax())
    for count, trainer in trainers.items():
        result = trainer.adapt(seen.pixels, target)
        told = {"cosine": float(result.final_cosines[0]), "seconds": result.seconds}
        first = _first_two(head, result.tokens)
        made.add({"photograph": name, "state": state, "queries": count, "teacher": theirs, **first, **told})


def _default_texts(teacher: Teacher) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What `apm classify` takes where neither labels nor prompts are named."""
    return teacher.default_labels or label_set("imagenet"), teacher.default_templates or prompt_templates("single")


def _first_two(head: ZeroShotHead, token: Tensor) -> dict[str, Any]:
    best = head.probabilities(token)[0].topk(2)
    (first, _), (p, q) = best.indices.tolist(), best.values.tolist()
    return {"first": first, "probability": p, "margin": p - q}


def summed(files: Sequence[Path]) -> Record:
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
        "commands_of_the_rows": commands,
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


def table(record: Record) -> str:
    """One markdown table: a row for each preset, state and number of locations."""
    titles = ("student", "photographs", "locations", "number", "first label changed", "largest change of probability")
    rows = (
        (
            *(cell[name] for name in ("preset", "state", "queries", "photographs")),
            len(cell["changed"]),
            "" if cell["largest_change_of_probability"] is None else f"{cell['largest_change_of_probability']:.1e}",
        )
        for cell in record["cells"]
    )
    return markdown(titles, rows, text=2)


def measure(options: Options) -> Record:
    """Adapt to the photographs, where there are some, and sum up all rows.

    Raises:
        UsageError: there are no photographs, or not one file to put their rows in.
    """
    if not options.rows or (options.root is not None and len(options.rows) > 1):
        raise UsageError("Name with --rows the file that the rows of one run go into, or those to be summed up.")
    if options.root is not None:
        folders = [options.root, *options.folders]
        found = [(number, *one) for number, one in enumerate(photographs(folders, options.seed))]
        part = found[options.offset : options.offset + options.limit]
        if not part:
            raise UsageError(f"{len(found)} photographs were found, and none from {options.offset} on.")
        adapt(part, options)
    return summed(options.rows)


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folders", type=Path, nargs="*", help="folders with more photographs")
    parser.add_argument("--rows", type=Path, nargs="+", default=[], help="file of rows; continued if it exists")
    parser.add_argument(
        "--counts", type=numbers, default=[64], help="numbers of locations to compare with all, such as 64,128"
    )
    parser.add_argument("--offset", type=int, default=0, help="first photograph of this part")


STUDY = Study(
    name="queries",
    question=__doc__,
    measure=measure,
    table=table,
    arguments=_arguments,
    shared={
        "root": None,
        "teacher": "embedded",
        "preset": "paper",
        "steps": StudentOptions.steps,
        "precision": "auto",
        "limit": 300,
        "seed": 0,
    },
    results="queries-agreement.json",
    document=ROOT / "benchmarks" / "README.md",
    marker="queries",
)

if __name__ == "__main__":
    sys.exit(run(STUDY.main))
