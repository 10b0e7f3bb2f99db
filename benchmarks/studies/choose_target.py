"""How `--target best` is chosen: `python -m apm.benchmarks.studies.choose_target folder --root DIR --label-set NAME`.

Encodes the views of images that no published table of this project uses (those outside the tables' own subset), clean
and corrupted, and measures how often each candidate target, read out directly, gives the right class. A converged
student answers as its target does, so no student is needed here; the tables then measure the whole method, with
students, on other images. Labels choose between policies, once, on these images; no target sees one.
"""

from __future__ import annotations

import itertools
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from apm.teachers import load_teacher
from apm.teachers.base import Teacher
from apm.test_time.targets import TargetPolicy, aggregate
from apm.test_time.views import views
from apm.text.zeroshot import ZeroShotHead

from ..corruptions import CORRUPTIONS
from ..datasets import Dataset, open_dataset
from ..datasets.dataset import balanced_subset
from ..tables.stats import mcnemar
from .study import Options, Record, Study, each, markdown, run

VIEWS = (16, 64)
MIN_AREAS = (0.08, 0.5)
KEPT = (0.1, 0.3)
BLENDS = (0.0, 0.5)


def candidates() -> Iterator[TargetPolicy]:
    """Every policy that is compared, the paper's own first."""
    yield TargetPolicy(kind="cls", views=1)
    for count, area, blend in itertools.product(VIEWS, MIN_AREAS, BLENDS):
        for kind in ("mean", "mta"):
            yield TargetPolicy(kind=kind, views=count, min_area=area, cls_weight=blend)
        for keep in KEPT:
            yield TargetPolicy(kind="confident", views=count, min_area=area, keep=keep, cls_weight=blend)


def held_out(data: Dataset, held: int, images: int, seed: int) -> Dataset:
    """Take ``images`` samples, class-balanced, none of them among those that a limit of ``held`` takes."""
    taken = {sample.id for sample in balanced_subset(data.samples, held, seed)}
    rest = [sample for sample in data.samples if sample.id not in taken]
    return replace(data, samples=balanced_subset(rest, images, seed))


@torch.no_grad()
def correct(teacher: Teacher, head: ZeroShotHead, data: Dataset, seed: int) -> Tensor:
    """Which candidates name the right class: (images, candidates) bool."""
    policies = list(candidates())
    rows = []
    for sample in data.samples:
        image = sample.load()
        features = {
            area: teacher.encode_image(views(image, max(VIEWS), teacher, seed=seed, sample_id=sample.id, min_area=area))
            for area in MIN_AREAS
        }
        targets = [
            aggregate(p, features[p.min_area if p.views > 1 else MIN_AREAS[0]][: p.views], head) for p in policies
        ]
        rows.append(head.logits(torch.stack(targets)).argmax(dim=1) == sample.label)
    return torch.stack(rows)


def measure(options: Options) -> Record:
    """Compare all candidates on the clean images and on the 15 corruptions at level 5, a fifth as many of each.

    Returns:
        Settings, and per candidate the accuracy on clean and on corrupted images, and the flips against the paper's own
        target with McNemar's p.
    """
    teacher = load_teacher(options.teacher)
    seed = options.seed

    def answered(corruption: str | None) -> tuple[Dataset, ZeroShotHead, Tensor]:
        data = open_dataset(
            options.dataset, options.root, corruption=corruption, seed=seed, label_set=options.label_set
        )
        data = held_out(data, options.held, options.limit if corruption is None else options.limit // 5, seed)
        head = ZeroShotHead.build(teacher, data.class_names, data.templates)
        return data, head, correct(teacher, head, data, seed)

    states = [None, *CORRUPTIONS]
    found = each(states, answered, "states (clean, then each corruption)", minimum=len(states))
    data, head, clean = found[0]
    hits = {"clean": clean, "corrupted": torch.cat([answers for *_, answers in found[1:]])}
    rows = []
    for index, policy in enumerate(candidates()):
        row: dict[str, Any] = asdict(policy)
        for name, answers in hits.items():
            lost = int((answers[:, 0] & ~answers[:, index]).sum())
            won = int((~answers[:, 0] & answers[:, index]).sum())
            row[name] = {"correct": int(answers[:, index].sum()), "lost": lost, "won": won, "p": mcnemar(lost, won)}
        rows.append(row)
    return {
        "dataset": options.dataset,
        "classes": len(head.labels),
        "templates": list(data.templates),
        "images": {name: len(answers) for name, answers in hits.items()},
        "left_out": options.held,
        "teacher": teacher.identity,
        "seed": seed,
        "candidates": rows,
    }


def chosen(record: Record) -> dict[str, Any]:
    """The candidate with the most right answers among those with no fewer than the paper's target on either part."""
    first, *others = record["candidates"]
    sound = [row for row in others if all(row[name]["correct"] >= first[name]["correct"] for name in record["images"])]
    return max(sound or [first], key=lambda row: _share(record, row))


def _share(record: Record, row: dict[str, Any]) -> float:
    """Share of right answers on the clean images plus that on the corrupted ones."""
    return sum(row[name]["correct"] / n for name, n in record["images"].items())


def table(record: Record) -> str:
    """The paper's target and the 12 best others, by right answers on clean and corrupted images, as markdown."""
    n = record["images"]
    first, *others = record["candidates"]
    shown = [first, *sorted(others, key=lambda row: -_share(record, row))[:12]]
    titles = ["target", "views", "smallest crop", "kept", "weight of the token"]
    for name, images in n.items():
        titles += [f"{name}, n = {images:,}", "won, lost", "p"]
    best = chosen(record)
    words = ", ".join(f"{name} {best[name]}" for name in ("kind", "views", "min_area", "keep", "cls_weight"))
    rows = markdown(titles, (_cells(row, n) for row in shown))
    return f"{rows}\n\nChosen, as the best that is behind the paper's target on neither part: {words}."


def _cells(row: dict[str, Any], images: dict[str, int]) -> list[str]:
    """One candidate's line; the paper's own target has neither settings nor flips."""
    own = row["kind"] == "cls"
    cells = [row["kind"], row["views"], "" if own else row["min_area"]]
    cells += [row["keep"] if row["kind"] == "confident" else "", "" if own else row["cls_weight"]]
    for name, n in images.items():
        cell = row[name]
        flips = ["", ""] if own else [f"{cell['won']}, {cell['lost']}", f"{cell['p']:.2g}"]
        cells += [f"{100 * cell['correct'] / n:.1f} %", *flips]
    return cells


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("dataset", nargs="?", default="folder")
    parser.add_argument("--label-set", help="label set for the data set folder")
    parser.add_argument("--held", type=int, default=1000, help="size of the table's own subset, which is left out")


STUDY = Study(
    name="choose_target",
    question=__doc__,
    measure=measure,
    table=table,
    arguments=_arguments,
    shared={"root": None, "teacher": "embedded", "seed": 0, "limit": 1000},  # clean images; each corruption has a fifth
    results="choose-target.json",
)

if __name__ == "__main__":
    sys.exit(run(STUDY.main))
