"""What the islands in a student's field follow: `python -m apm.benchmarks.studies.islands --root DIR`.

Real images, each once with the token as the target and once with the teacher's grid, beside controls in which regions
could not follow the image. Steps and readings are in float32: bfloat16 rounds a nearly constant field into stripes.
Writes a JSON record; `--document` puts it, its tables and the pictures where docs/islands.md has them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from apm.images.load import student_input
from apm.student import islands
from apm.student.config import PRESETS, APMConfig
from apm.student.field import resample
from apm.student.position import grid_locations
from apm.teachers import load_teacher
from apm.teachers.base import Teacher
from apm.test_time.label_maps import LR, STEPS
from apm.test_time.trainer import AdaptConfig, TestTimeTrainer

from ..datasets import open_dataset
from ..runs.environment import describe, write_record
from . import island_tables
from .island_tables import CONDITIONS, CONTROLS, TARGETS, VARIATION

Field = NDArray[np.float32]

PATCHES = 8
"""Patches a side of the shuffled image."""


@dataclass(frozen=True)
class Watched:
    """One student's field while it is fitted."""

    fields: dict[int, Field]
    """By the number of steps made: (H, H, D)."""
    losses: dict[int, float]
    """By the number of steps made."""
    rounding: float | None = None
    """How far the last field is from the same weights' in float64, root mean square, as a share of its spread."""

    @property
    def last(self) -> Field:
        """The field after the last step."""
        return self.fields[max(self.fields)]


@dataclass(frozen=True)
class Subject:
    """One image, the controls' inputs, and what its regions are compared with."""

    inputs: dict[str, tuple[Tensor, Tensor, Tensor]]
    """By condition: pixels (1, 3, S, S), the teacher's token (1, D), its grid at the student's locations (1, N, D)."""
    superpixels: islands.Labels
    other_superpixels: islands.Labels


def square_of(image: Image.Image) -> Image.Image:
    """Cut out the central square, which is what the student sees."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.convert("RGB").crop((left, top, left + side, top + side))


def prepare(
    image: Image.Image,
    other: Image.Image,
    teacher: Teacher,
    config: APMConfig,
    *,
    parts: int,
    seed: int,
    grid_size: int | None = None,
) -> Subject:
    """Make the inputs of every condition; "no steps" has none of its own.

    Args:
        image: the image watched.
        other: another one, for the control with its target.
        teacher: gives tokens and grids.
        config: of the student.
        parts: number of superpixels.
        seed: of random targets and of the patches' order.
        grid_size: side, in pixels, at which the teacher's grid is made; None for its default.
    """
    square, second = square_of(image), square_of(other)
    shuffled = islands.shuffle_patches(square, PATCHES, seed)

    def targets(one: Image.Image) -> tuple[Tensor, Tensor]:
        token = teacher.encode_image(teacher.preprocess(one)[None].to(teacher.device)).cpu()
        return token, resample(teacher.encode_grid(one, size=grid_size)[None].cpu(), config.grid)

    pixels, token, grid = student_input(square, config.image_size)[None], *targets(square)
    return Subject(
        inputs={
            "image": (pixels, token, grid),
            "random target": (pixels, islands.random_like(token, seed), islands.random_like(grid, seed)),
            "shuffled image": (student_input(shuffled, config.image_size)[None], *targets(shuffled)),
            "other target": (pixels, *targets(second)),
        },
        superpixels=islands.superpixels(square, config.grid, parts),
        other_superpixels=islands.superpixels(second, config.grid, parts),
    )


def trainers(
    config: APMConfig, adapt: AdaptConfig, *, grid_lr: float = LR, device: str | torch.device = "cpu"
) -> dict[str, TestTimeTrainer]:
    """Make one trainer for each target, in float32 whatever `adapt` says: the fields are looked at and measured.

    The grid trains no object query, so its student is read by the mean; and it has a learning rate of its own, because
    at a rate that suits the token its loss hardly falls.
    """
    adapt = replace(adapt, precision="fp32")
    return {
        "cls": TestTimeTrainer(replace(config, readout="query"), replace(adapt, distil="cls"), device=device),
        "grid": TestTimeTrainer(
            replace(config, readout="mean"), replace(adapt, distil="grid", lr=grid_lr), device=device
        ),
    }


def watch(trainer: TestTimeTrainer, inputs: tuple[Tensor, Tensor, Tensor], snapshots: Sequence[int]) -> Watched:
    """Fit a fresh student and keep its field after so many steps each (the last must be the config's)."""
    pixels, token, grid = inputs
    by_grid = trainer.config.distil != "cls"
    result = trainer.adapt(pixels, token, grids=grid if by_grid else None, snapshots=snapshots, keep_field=True)
    assert result.folded is not None
    side = trainer.model.grid
    losses = [*result.losses[0].tolist(), float(result.final_losses[0])]
    exact = result.folded.double().features(*grid_locations(side))[0].cpu().numpy()
    watched = Watched(
        fields={step: field[0].reshape(side, side, -1).cpu().numpy() for step, field in result.fields.items()},
        losses={step: losses[step] for step in result.fields},
    )
    apart, spread = (
        _root_mean_square(v) for v in (watched.last.reshape(exact.shape) - exact, exact - exact.mean(axis=0))
    )
    return replace(watched, rounding=apart / spread if spread else 0.0)  # the same everywhere: a student that died


def _root_mean_square(values: NDArray[np.floating]) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def watch_all(
    trainer: TestTimeTrainer, subject: Subject, snapshots: Sequence[int], *, controls: bool = True
) -> dict[str, Watched]:
    """Fit one student for each condition, or for the image alone."""
    runs = {
        name: watch(trainer, inputs, snapshots)
        for name, inputs in subject.inputs.items()
        if controls or name == "image"
    }
    first = runs["image"]
    untrained = {0: first.fields[0]}
    return {**runs, "no steps": Watched(untrained, {0: first.losses[0]})} if controls else runs


def measures(field: Field, subject: Subject, *, threshold: float, parts: int, seed: int = 0) -> dict[str, float]:
    """Measure one field (H, H, D): its islands, and what its clusters agree with."""
    plain = islands.measure(field, threshold=threshold)
    centred = islands.measure(field, threshold=threshold, centred=True)
    found = islands.clusters(field, parts, seed=seed)
    joined = islands.regions(field - field.mean(axis=(0, 1)), threshold)
    return {
        "cosine": plain.cosine,
        "regions": float(plain.regions),
        "centred cosine": centred.cosine,
        "centred regions": float(centred.regions),
        "centred largest": centred.largest,
        "AMI image": islands.agreement(found, subject.superpixels),
        "AMI other image": islands.agreement(found, subject.other_superpixels),
        "AMI regions": islands.agreement(joined, subject.superpixels),
        "contrast image": islands.boundary_contrast(field, subject.superpixels),
        "contrast other image": islands.boundary_contrast(field, subject.other_superpixels),
    }


def study(
    images: Sequence[Image.Image],
    teacher: Teacher,
    config: APMConfig,
    adapt: AdaptConfig,
    *,
    threshold: float = 0.9,
    parts: int = 12,
    grid_lr: float = LR,
    grid_size: int | None = None,
    device: str | torch.device = "cpu",
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Measure every condition on every image, or until Ctrl-C; the image after it serves as the other one.

    Returns:
        ``conditions``: target → condition → measure → (mean, standard error); ``differences``: target → control →
        measure → the image's minus the control's, likewise, paired; ``same_regions``: agreement of the clusters in the
        fields of two images; ``references``: agreement with the superpixels for what is no student's field.
    """
    by_target = trainers(config, adapt, grid_lr=grid_lr, device=device)
    found: list[dict[str, Any]] = []
    try:
        for number, image in enumerate(images):
            other = images[(number + 1) % len(images)]
            seed = adapt.seed + number
            subject = prepare(image, other, teacher, config, parts=parts, seed=seed, grid_size=grid_size)
            found.append(_observe(subject, by_target, threshold=threshold, parts=parts))
            progress(len(found))
    except KeyboardInterrupt:  # hours may lie behind: what is done is worth having, and says how much it is
        if len(found) < 2:
            raise
    return _summarise(found)


def _observe(
    subject: Subject, by_target: Mapping[str, TestTimeTrainer], *, threshold: float, parts: int
) -> dict[str, Any]:
    """Fit all students of one image, and measure."""
    rows: dict[str, dict[str, dict[str, float]]] = {}
    losses, clusters, spread, rounding, variation = {}, {}, {}, {}, {}
    for target, trainer in by_target.items():
        runs = watch_all(trainer, subject, (0, trainer.config.steps))
        rows[target] = {
            condition: measures(run.last, subject, threshold=threshold, parts=parts) for condition, run in runs.items()
        }
        losses[target] = runs["image"].losses[trainer.config.steps]
        clusters[target] = islands.clusters(runs["image"].last, parts)
        field = runs["image"].last
        spread[target] = _root_mean_square(field - field.mean(axis=(0, 1))) / _root_mean_square(field)
        rounding[target] = runs["image"].rounding
        variation[target] = islands.variation(field)
    side = len(subject.superpixels)
    grid = subject.inputs["image"][2].reshape(side, side, -1).numpy()
    place = np.stack(np.meshgrid(*[np.arange(side, dtype=np.float64)] * 2, indexing="ij"), axis=-1)
    partitions = {
        "teacher's grid": islands.clusters(grid, parts),
        "coordinates": islands.clusters(place, parts),
        "other image's superpixels": subject.other_superpixels,
    }
    return {
        "rows": rows,
        "losses": losses,
        "clusters": clusters,
        "spread": spread,
        "rounding": rounding,
        "variation": variation,
        "references": {name: islands.agreement(one, subject.superpixels) for name, one in partitions.items()},
        "contrast": islands.boundary_contrast(grid, subject.superpixels),
        "other contrast": islands.boundary_contrast(grid, subject.other_superpixels),
        "variance": float(((grid - grid.mean(axis=(0, 1))) ** 2).mean()),
    }


def _summarise(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means and standard errors over images, differences paired: see `study`."""

    def rows(target: str, condition: str) -> list[dict[str, float]]:
        return [one["rows"][target][condition] for one in found]

    def differences(target: str, control: str) -> list[dict[str, float]]:
        pairs = zip(rows(target, "image"), rows(target, control), strict=True)
        return [{name: mine[name] - theirs[name] for name in mine} for mine, theirs in pairs]

    def against_other(target: str, measure: str) -> list[float]:
        return _mean([row[f"{measure} image"] - row[f"{measure} other image"] for row in rows(target, "image")])

    def same(target: str) -> list[float]:
        clusters = [one["clusters"][target] for one in found]
        return _mean([islands.agreement(a, b) for a, b in itertools.pairwise([*clusters, clusters[0]])])

    return {
        "images": len(found),
        "conditions": {t: {c: _summaries(rows(t, c)) for c in CONDITIONS} for t in TARGETS},
        "differences": {t: {c: _summaries(differences(t, c)) for c in CONTROLS} for t in TARGETS},
        "image_against_other": {t: {name: against_other(t, name) for name in ("AMI", "contrast")} for t in TARGETS},
        "same_regions": {t: same(t) for t in TARGETS},
        "references": {name: _mean([one["references"][name] for one in found]) for name in found[0]["references"]},
        "teacher_contrast": {
            "image": _mean([one["contrast"] for one in found]),
            "other image": _mean([one["other contrast"] for one in found]),
            "difference": _mean([one["contrast"] - one["other contrast"] for one in found]),
        },
        "grid_variance": _mean([one["variance"] for one in found]),
        "final_loss": {t: _mean([one["losses"][t] for one in found]) for t in TARGETS},
        "spread": {t: _mean([one["spread"][t] for one in found]) for t in TARGETS},
        "rounding": {t: max(one["rounding"][t] for one in found) for t in TARGETS},
        "variation": {
            t: {name: _mean([one["variation"][t][n] for one in found]) for n, name in enumerate(VARIATION)}
            for t in TARGETS
        },
    }


def _mean(values: Sequence[float]) -> list[float]:
    """Mean and its standard error."""
    return [float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))]


def _summaries(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {name: _mean([row[name] for row in rows]) for name in rows[0]}


def main(arguments: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m apm.benchmarks.studies.islands", description=__doc__)
    parser.add_argument("--table", type=Path, help="print this record instead of measuring")
    parser.add_argument("--root", type=Path, help="a folder of images, one folder a class")
    parser.add_argument("--teacher", default="embedded")
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--images", type=int, default=30)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--grid-lr", type=float, default=LR, help="learning rate of the grid's students")
    parser.add_argument("--grid-size", type=int, help="side, in pixels, at which the teacher's grid is made")
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--parts", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="where to write the record; standard output without it")
    parser.add_argument(
        "--document", action="store_true", help="write record, tables and pictures of docs/islands.md, in a clone"
    )
    options = parser.parse_args(arguments)
    if options.table:
        print(island_tables.table(json.loads(options.table.read_text(encoding="utf-8"))))
        return
    if options.document:
        options.out = island_tables.RECORD
        island_tables.draw()  # first: it takes half a minute, and says what is missing
    data = open_dataset("folder", options.root, limit=options.images, seed=options.seed)
    teacher = load_teacher(options.teacher, device=options.device)
    config = APMConfig.preset(options.preset, dim=teacher.dim)
    adapt = AdaptConfig(steps=options.steps, seed=options.seed)
    images = [sample.load() for sample in data.samples]
    began = time.perf_counter()
    found = study(
        images,
        teacher,
        config,
        adapt,
        threshold=options.threshold,
        parts=options.parts,
        grid_lr=options.grid_lr,
        grid_size=options.grid_size,
        device=options.device,
        progress=lambda done: print(f"{done} of {len(data.samples)} images", file=sys.stderr),
    )
    record = {
        "command": f"python -m apm.benchmarks.studies.islands {shlex.join(arguments or sys.argv[1:])}".partition(
            " --out"
        )[0],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "sample_ids": [sample.id for sample in data.samples][: found["images"]],
        "teacher": teacher.identity,
        "teacher_grid": list(teacher.encode_grid(images[0], size=options.grid_size).shape[:2]),
        "settings": {
            "preset": options.preset,
            "locations": config.grid,
            "steps": options.steps,
            "lr": adapt.lr,
            "grid_lr": options.grid_lr,
            "grid_size": options.grid_size,
            "precision": "fp32",
            "seed": options.seed,
            "threshold": options.threshold,
            "parts": options.parts,
            "patches": PATCHES,
        },
        "seconds": time.perf_counter() - began,
        "environment": describe(options.device),
        **found,
    }
    write_record(record, options.out)
    if options.document:
        island_tables.write(record)


if __name__ == "__main__":
    main()
