"""How `--target best` is chosen: `python -m apm.benchmarks.studies.choose_target folder --root DIR --label-set NAME`.

Encodes the views of images that no published table of this project uses (those left when the table's own subset is
taken out), clean and corrupted, and asks how often each candidate target, read out as it is, names the right class. A
student that has converged answers as its target does, so no student is needed here; the tables then measure the whole
method, with students, on other images. Labels choose between policies, once, on these images; no target sees one.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
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
from ..runs.environment import describe, write_record
from ..tables.stats import mcnemar

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
def right(teacher: Teacher, head: ZeroShotHead, data: Dataset, seed: int) -> Tensor:
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


def measure(
    dataset: str, root: Path | None, label_set: str | None, *, teacher_name: str, held: int, images: int, seed: int
) -> dict[str, Any]:
    """Compare all candidates on the clean images and on the 15 corruptions at level 5, a fifth as many of each.

    Returns:
        The record: settings, machine, and per candidate the accuracy on clean and on corrupted images, and the flips
        against the paper's own target with McNemar's p.
    """
    teacher = load_teacher(teacher_name)
    parts: dict[str, list[Tensor]] = {"clean": [], "corrupted": []}
    for corruption in (None, *CORRUPTIONS):
        data = open_dataset(dataset, root, corruption=corruption, seed=seed, label_set=label_set)
        data = held_out(data, held, images if corruption is None else images // 5, seed)
        head = ZeroShotHead.build(teacher, data.class_names, data.templates)
        parts["corrupted" if corruption else "clean"].append(right(teacher, head, data, seed))
        print(f"{corruption or 'clean'}: {len(data.samples)} images", file=sys.stderr)
    hits = {name: torch.cat(values) for name, values in parts.items()}
    rows = []
    for index, policy in enumerate(candidates()):
        row: dict[str, Any] = asdict(policy)
        for name, table in hits.items():
            lost = int((table[:, 0] & ~table[:, index]).sum())
            won = int((~table[:, 0] & table[:, index]).sum())
            row[name] = {"right": int(table[:, index].sum()), "lost": lost, "won": won, "p": mcnemar(lost, won)}
        rows.append(row)
    return {
        "command": "python -m apm.benchmarks.studies.choose_target " + " ".join(sys.argv[1:]).partition(" --out")[0],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "dataset": dataset,
        "classes": len(head.labels),
        "templates": list(data.templates),
        "images": {name: len(table) for name, table in hits.items()},
        "left_out": held,
        "teacher": teacher.identity,
        "seed": seed,
        "environment": describe(),
        "candidates": rows,
    }


def chosen(record: dict[str, Any]) -> dict[str, Any]:
    """The candidate with the most right answers among those with no fewer than the paper's target on either part."""
    first, *others = record["candidates"]
    sound = [row for row in others if all(row[name]["right"] >= first[name]["right"] for name in record["images"])]
    return max(sound or [first], key=lambda row: _share(record, row))


def _share(record: dict[str, Any], row: dict[str, Any]) -> float:
    """Share of right answers on the clean images plus that on the corrupted ones."""
    return sum(row[name]["right"] / n for name, n in record["images"].items())


def table(record: dict[str, Any], count: int = 12) -> str:
    """The paper's target and the ``count`` best others, by right answers on clean and corrupted images, as markdown."""
    n = record["images"]
    lines = [
        "| target | views | smallest crop | kept | weight of the token | "
        f"clean, n = {n['clean']:,} | won, lost | p | corrupted, n = {n['corrupted']:,} | won, lost | p |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    first, *others = record["candidates"]
    for row in (first, *sorted(others, key=lambda row: -_share(record, row))[:count]):
        own = row["kind"] == "cls"
        cells = [row["kind"], str(row["views"]), "" if own else str(row["min_area"])]
        cells += [str(row["keep"]) if row["kind"] == "confident" else "", "" if own else str(row["cls_weight"])]
        for name in ("clean", "corrupted"):
            cell = row[name]
            cells.append(f"{100 * cell['right'] / n[name]:.1f} %")
            cells += ["", ""] if own else [f"{cell['won']}, {cell['lost']}", f"{cell['p']:.2g}"]
        lines.append("| " + " | ".join(cells) + " |")
    best = chosen(record)
    words = ", ".join(f"{name} {best[name]}" for name in ("kind", "views", "min_area", "keep", "cls_weight"))
    return "\n".join([*lines, "", f"Chosen, as the best that is behind the paper's target on neither part: {words}."])


def main(arguments: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m apm.benchmarks.studies.choose_target", description=__doc__)
    parser.add_argument("dataset", nargs="?", default="folder")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--label-set", help="for the data set folder: its label space")
    parser.add_argument("--teacher", default="embedded")
    parser.add_argument("--held", type=int, default=1000, help="size of the table's own subset, which is left out")
    parser.add_argument("--images", type=int, default=1000, help="clean images; each corruption has a fifth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="where to write the record")
    options = parser.parse_args(arguments)
    record = measure(
        options.dataset,
        options.root,
        options.label_set,
        teacher_name=options.teacher,
        held=options.held,
        images=options.images,
        seed=options.seed,
    )
    write_record(record, options.out)
    print(table(record))


if __name__ == "__main__":
    main()
