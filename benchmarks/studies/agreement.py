"""What the agreement loss does to islands: `python -m apm.benchmarks.studies.agreement --root DIR`.

Each image's student is fitted with several weights of `apm.student.agreement` (``--agree``), including 0, once to the
teacher's token and once to its grid. If agreement makes islands, regions should grow and edges sharpen; superpixels of
the image, and those of another image, show whether the edges are the image's. ``--rows FILE`` keeps a row per image:
the same command resumes from it.
"""

from __future__ import annotations

import itertools
import sys
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from apm.student.agreement import RADIUS, AgreementLoss
from apm.student.config import APMConfig
from apm.teachers import load_teacher
from apm.teachers.base import Teacher
from apm.test_time.island_fields import Field, Subject, measures, prepare, trainers, watch
from apm.test_time.label_maps import LR
from apm.test_time.options import AdaptConfig, StudentOptions
from apm.test_time.queries import ALL

from ..datasets import open_dataset
from .rows import Row, continued
from .study import ROOT, USUAL, Options, Record, Study, averaged, markdown, plus_minus, run, signed

WEIGHTS = (0.0, 0.1, 1.0, 10.0)
TARGETS = {"cls": "the token", "grid": "the grid"}
PARTS, THRESHOLD = 12, 0.9
COLUMNS = {
    "cosine": ("neighbours' cosine", 3),
    "regions": ("regions", 1),
    "centred cosine": ("cosine, mean removed", 3),
    "centred regions": ("regions, mean removed", 1),
    "disagreement": ("disagreement", 4),
    "error": ("error to the grid", 3),
    "AMI image": ("AMI, own superpixels", 3),
    "AMI other image": ("AMI, another image's", 3),
    "contrast image": ("contrast, own superpixels", 3),
    "contrast other image": ("contrast, another image's", 3),
}
COMPARED = ("centred regions", "AMI image", "AMI less", "contrast image", "contrast less")
"""Beside the same student without agreement; "less": less another image's superpixels'."""


class Fits:
    """Fits one image's students with every weight, and measures their fields."""

    def __init__(
        self,
        teacher: Teacher,
        student: StudentOptions,
        *,
        weights: Sequence[float],
        targets: Sequence[str],
        grid_lr: float,
        grid_size: int | None,
    ) -> None:
        self.teacher, self.seed, self.grid_size = teacher, student.seed, grid_size
        adapt = student.training(teacher.device)
        self.model: APMConfig = student.model(teacher.dim)
        self.adapt: AdaptConfig = adapt
        self.targets = targets
        self.trainers = {
            weight: trainers(self.model, replace(adapt, agree=weight), grid_lr=grid_lr, device=teacher.device)
            for weight in weights
        }

    def __call__(self, image: Image.Image, other: Image.Image) -> Row:
        """Target → weight → measures of the last field."""
        subject = prepare(image, other, self.teacher, self.model, parts=PARTS, seed=self.seed, grid_size=self.grid_size)
        found: Row = {target: {} for target in self.targets}
        for weight, target in itertools.product(self.trainers, self.targets):
            watched = watch(self.trainers[weight][target], subject.inputs["image"], [self.adapt.steps])
            found[target][f"{weight:g}"] = self._measured(watched.last, subject)
        return found

    def _measured(self, field: Field, subject: Subject) -> dict[str, float]:
        one = measures(field, subject, threshold=THRESHOLD, parts=PARTS, seed=self.seed)
        grid = subject.inputs["image"][2]
        assert isinstance(grid, torch.Tensor)
        wanted = grid[0].numpy().reshape(field.shape)
        return {
            **{name: one[name] for name in COLUMNS if name in one},
            "disagreement": disagreement(field, self.model),
            "error": float(np.square(field - wanted).mean() / np.square(wanted - wanted.mean(axis=(0, 1))).mean()),
            "AMI less": one["AMI image"] - one["AMI other image"],
            "contrast less": one["contrast image"] - one["contrast other image"],
        }


def disagreement(field: Field, model: APMConfig) -> float:
    """Mean square of what places differ from their neighbours' consensus by, as a share of the field's variance."""
    places = torch.from_numpy(np.ascontiguousarray(field)).reshape(1, model.cells, model.dim)
    loss = AgreementLoss(model, 1, weight=1.0, device=places.device).forward(places, torch.zeros_like(places))
    return float(loss) / float((places - places.mean(dim=1, keepdim=True)).square().mean())


def measure(options: Options) -> Record:
    """Fit the students of every image, or of as many as are done at Ctrl-C; the image after it is the other one."""
    data = open_dataset("folder", options.root)
    teacher = load_teacher(options.teacher, device=options.device)
    student = StudentOptions(preset=options.preset, steps=options.steps, seed=options.seed, queries=ALL)
    fits = Fits(
        teacher,
        student,
        weights=options.weights,
        targets=options.targets,
        grid_lr=options.grid_lr,
        grid_size=options.grid_size,
    )
    samples = [data.samples[number] for number in np.random.default_rng(options.seed).permutation(len(data.samples))]
    settings = {name: getattr(options, name) for name in ("preset", "steps", "grid_lr", "grid_size", "seed")}
    settings |= {"weights": options.weights, "targets": options.targets, "radius": RADIUS}
    began = time.perf_counter()
    rows = continued(
        range(min(options.limit, len(samples))),
        lambda number: fits(samples[number].load(), samples[(number + 1) % len(samples)].load()),
        "images",
        path=options.rows,
        settings={**settings, "dataset": data.name, "samples": len(samples), "teacher": teacher.identity},
    )
    return {
        "dataset": data.name,
        "sample_ids": [sample.id for sample in samples[: len(rows)]],
        "teacher": teacher.identity,
        "settings": {**settings, "locations": fits.model.grid, "lr": fits.adapt.lr, "precision": "fp32"},
        "seconds": time.perf_counter() - began,
        **summary(rows),
    }


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Over images: ``means``: target → weight → measure → mean and error; ``gains``: less the first weight."""

    first, *others = next(iter(rows[0].values()))
    gains = [
        {t: {w: {n: of[w][n] - of[first][n] for n in COMPARED} for w in others} for t, of in row.items()}
        for row in rows
    ]
    return {"images": len(rows), "means": averaged(rows), "gains": averaged(gains)}


def table(record: Record) -> str:
    """Every measure with every weight, then what a weight changes; beyond two standard errors in bold."""
    settings = record["settings"]
    rows = [
        (TARGETS[target], weight, *(plus_minus(of[name], digits) for name, (_, digits) in COLUMNS.items()))
        for target, weights in record["means"].items()
        for weight, of in weights.items()
    ]
    gains = [
        (TARGETS[target], weight, *(signed(of[name], 1 if "regions" in name else 3) for name in COMPARED))
        for target, weights in record["gains"].items()
        for weight, of in weights.items()
    ]
    titles = ("regions, mean removed", "AMI", "AMI, minus another image's", "contrast", "contrast, minus another's")
    return "\n\n".join(
        (
            markdown(("target", "weight", *(title for title, _ in COLUMNS.values())), rows, text=1),
            markdown(("target", "weight, minus weight 0", *titles), gains, text=1),
            f"<sub>`{record['command']}` · {record['date']} · commit {record['environment']['git_commit']} · teacher "
            f"`{record['teacher']}` · {record['images']} images · {settings['preset']} preset, {settings['locations']} "
            f"× {settings['locations']} locations, {settings['steps']} steps, lr {settings['lr']:g} "
            f"({settings['grid_lr']:g} for the grid), {settings['precision']}, seed {settings['seed']} · ± is "
            "the standard error over images · bold: beyond two of these</sub>",
        )
    )


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--weights", type=float, nargs="+", default=[*WEIGHTS], help="weights of the loss; the first is the baseline"
    )
    parser.add_argument("--targets", nargs="+", default=[*TARGETS], choices=[*TARGETS], help="targets of the students")
    parser.add_argument("--grid-lr", type=float, default=LR, help="learning rate of the grid's students")
    parser.add_argument("--grid-size", type=int, help="input size of the teacher's grid in pixels")


STUDY = Study(
    name="agreement",
    question=__doc__,
    measure=measure,
    table=table,
    arguments=_arguments,
    shared={**USUAL, "preset": "small", "steps": 150, "limit": 24, "rows": None},
    results="agreement-*.json",
    document=ROOT / "docs" / "fields.md",
    marker="agreement",
)

if __name__ == "__main__":
    sys.exit(run(STUDY.main))
