"""What the islands in a student's field follow: `python -m apm.benchmarks.studies.islands --root DIR`.

Fits students to real images, with the token as target and with the teacher's grid, and to controls in which regions
cannot follow the image.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from apm.errors import ApmError
from apm.images.files import write_atomically
from apm.student import islands
from apm.student.config import APMConfig
from apm.teachers import load_teacher
from apm.teachers.base import Teacher
from apm.test_time.island_fields import (
    PATCHES,
    Subject,
    coordinates,
    measures,
    prepare,
    root_mean_square,
    trainers,
    watch_all,
)
from apm.test_time.label_maps import LR, STEPS
from apm.test_time.options import AdaptConfig, StudentOptions
from apm.test_time.queries import ALL
from apm.test_time.trainer import TestTimeTrainer

from ..datasets import open_dataset
from .study import ROOT, USUAL, Options, Record, Study, averaged, each, markdown, plus_minus, run, signed

TARGETS = ("cls", "grid")
CONTROLS = {
    "random target": "the image, with a target of random directions and the same lengths",
    "shuffled image": "the image cut into 8 × 8 patches in random order, as the student and the teacher see it",
    "other target": "the image, with the target of another image",
    "no steps": "the student before its first step",
}
CONDITIONS = ("image", *CONTROLS)
VARIATION = ("in one direction", "of row plus column")
"""What `apm.student.islands.variation` tells of how a field differs between places."""

COMMAND = (
    *("islands", "coffee.png", "chelsea.png", "--teacher", "embedded"),
    *("--snapshots", "0,10,50,100,150", "--grid-size", "448", "--out", "islands"),
)
"""Of `apm`, makes the pictures from two photographs of scikit-image."""
PICTURES = {"coffee-*-strip.png": "islands-strip.png", "coffee-*-parts.png": "islands-parts.png"}
"""What it makes: name in the document's folder."""

COLUMNS = {
    "cosine": "neighbours' cosine",
    "regions": "regions",
    "centred cosine": "cosine, mean removed",
    "centred regions": "regions, mean removed",
    "AMI image": "AMI, own superpixels",
    "AMI other image": "AMI, another image's",
    "contrast image": "contrast, own superpixels",
    "contrast other image": "contrast, another image's",
}
TARGET_NAMES = {"cls": "the token", "grid": "the grid"}


def measure(options: Options) -> Record:
    """Open data and teacher, and make the study."""
    data = open_dataset("folder", options.root, limit=options.limit, seed=options.seed)
    teacher = load_teacher(options.teacher, device=options.device)
    student = StudentOptions(preset=options.preset, steps=options.steps, seed=options.seed, queries=ALL)
    config, adapt = student.model(teacher.dim), student.training(teacher.device)
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
    )
    kept = ("preset", "steps", "grid_lr", "grid_size", "seed", "threshold", "parts")
    return {
        "sample_ids": [sample.id for sample in data.samples][: found["images"]],
        "teacher": teacher.identity,
        "teacher_grid": list(teacher.encode_grid(images[0], size=options.grid_size).shape[:2]),
        "settings": {
            **{name: getattr(options, name) for name in kept},
            "locations": config.grid,
            "lr": adapt.lr,
            "precision": "fp32",
            "patches": PATCHES,
        },
        "seconds": time.perf_counter() - began,
        **found,
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
) -> dict[str, Any]:
    """Measure every condition on every image, or until Ctrl-C; the image after it serves as the other one.

    Returns:
        ``conditions``: target → condition → measure → (mean, standard error); ``differences``: target → control →
        measure → the image's minus the control's, likewise, paired; ``same_regions``: agreement of the clusters in the
        fields of two images; ``references``: agreement with the superpixels for what is no student's field.
    """
    by_target = trainers(config, adapt, grid_lr=grid_lr, device=device)

    def observe(number: int) -> dict[str, Any]:
        image, other = images[number], images[(number + 1) % len(images)]
        seed = adapt.seed + number
        subject = prepare(image, other, teacher, config, parts=parts, seed=seed, grid_size=grid_size)
        return _observe(subject, by_target, threshold=threshold, parts=parts)

    found = each(range(len(images)), observe, "images", minimum=2)
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
        spread[target] = root_mean_square(field - field.mean(axis=(0, 1))) / root_mean_square(field)
        rounding[target] = runs["image"].rounding
        variation[target] = dict(zip(VARIATION, islands.variation(field), strict=True))
    side = len(subject.superpixels)
    wanted = subject.inputs["image"][2]
    assert isinstance(wanted, torch.Tensor)
    grid = wanted.reshape(side, side, -1).numpy()
    partitions = {
        "teacher's grid": islands.clusters(grid, parts),
        "coordinates": islands.clusters(coordinates(side).astype(np.float64), parts),
        "other image's superpixels": subject.other_superpixels,
    }
    own, others = (islands.boundary_contrast(grid, of) for of in (subject.superpixels, subject.other_superpixels))
    return {
        "rows": rows,
        "clusters": clusters,
        "rounding": rounding,
        "averaged": {
            "references": {name: islands.agreement(one, subject.superpixels) for name, one in partitions.items()},
            "teacher_contrast": {"image": own, "other image": others, "difference": own - others},
            "grid_variance": float(((grid - grid.mean(axis=(0, 1))) ** 2).mean()),
            "final_loss": losses,
            "spread": spread,
            "variation": variation,
        },
    }


def _summarise(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means and standard errors over images, differences paired: see `study`."""
    rows = [one["rows"] for one in found]
    less = [
        {t: {c: {m: of["image"][m] - of[c][m] for m in of[c]} for c in CONTROLS} for t, of in row.items()}
        for row in rows
    ]
    against_other = [
        {
            t: {m: of["image"][f"{m} image"] - of["image"][f"{m} other image"] for m in ("AMI", "contrast")}
            for t, of in row.items()
        }
        for row in rows
    ]
    same = [
        {t: islands.agreement(one["clusters"][t], other["clusters"][t]) for t in TARGETS}
        for one, other in itertools.pairwise([*found, found[0]])
    ]
    return {
        "images": len(found),
        "conditions": averaged(rows),
        "differences": averaged(less),
        "image_against_other": averaged(against_other),
        "same_regions": averaged(same),
        **averaged([one["averaged"] for one in found]),
        "rounding": {t: max(one["rounding"][t] for one in found) for t in TARGETS},
    }


def table(record: Record) -> str:
    """Print a record as markdown: the measures of every condition, then the references to compare them with.

    A difference of more than two standard errors is bold.
    """
    settings = record["settings"]
    grid = " × ".join(str(side) for side in record["teacher_grid"])
    same, teacher = record["same_regions"], record["teacher_contrast"]
    references = "; ".join(f"{name} {plus_minus(value, 3)}" for name, value in record["references"].items())
    paragraphs = (
        f"**{settings['preset']} student**, {settings['locations']} × {settings['locations']} locations, "
        f"{settings['steps']} steps, {record['images']} images; the teacher's grid is {grid}. Final loss: token "
        f"{record['final_loss']['cls'][0]:.1e}, grid {record['final_loss']['grid'][0]:.1e} (the grid's variance over "
        f"locations is {record['grid_variance'][0]:.1e}). Variation of the features between locations after the last "
        f"step: with the token {_spread(record, 'cls')}; with the grid {_spread(record, 'grid')}.",
        _conditions(record),
        _differences(record),
        f"AMI between the clusters of two images' fields: {plus_minus(same['cls'], 3)} (token) and "
        f"{plus_minus(same['grid'], 3)} (grid). AMI of references with the superpixels: {references}. Contrast of the "
        f"teacher's grid: {plus_minus(teacher['image'], 3)}, with another image's superpixels "
        f"{plus_minus(teacher['other image'], 3)} (difference {signed(teacher['difference'])}).",
        f"<sub>`{record['command']}` · {record['date']} · teacher `{record['teacher']}` · {settings['parts']} "
        f"clusters and superpixels · threshold {settings['threshold']} · lr {settings['lr']:g} "
        f"({settings['grid_lr']:g} for the grid) · {settings['precision']} · seed {settings['seed']} · ± is the "
        "standard error over images</sub>",
    )
    return "\n\n".join(paragraphs)


def _conditions(record: Record) -> str:
    """Every measure of every condition."""
    rows = []
    for target, condition in itertools.product(TARGETS, CONDITIONS):
        values = record["conditions"][target][condition]
        cells = (plus_minus(values[name], 1 if "regions" in name else 3) for name in COLUMNS)
        rows.append((TARGET_NAMES[target], condition, *cells))
    return markdown(("target", "condition", *COLUMNS.values()), rows, text=2)


def _differences(record: Record) -> str:
    """How much better the regions fit the image's superpixels than those of each control do."""
    pairs = list(itertools.product(("AMI", "contrast"), TARGETS))
    rows = [
        (
            f"… the control's: {control}",
            *(signed(record["differences"][target][control][f"{name} image"]) for name, target in pairs),
        )
        for control in CONTROLS
    ]
    against = (signed(record["image_against_other"][target][name]) for name, target in pairs)
    titles = (
        "own superpixels, minus … (paired; bold: beyond two standard errors)",
        *(f"{target}: {name}" for name in ("AMI", "contrast") for target in ("token", "grid")),
    )
    return markdown(titles, [*rows, ("… another image's superpixels", *against)])


def _spread(record: Mapping[str, Any], target: str) -> str:
    """How much a field varies, and how little of that is rounding."""
    share, rounding = record["spread"][target][0], record["rounding"][target]
    direction, places = (100 * record["variation"][target][name][0] for name in VARIATION)
    return (
        f"{100 * share:.2g} % of their norm (rounding: at most {100 * rounding:.1g} %), with {direction:.1f} % of its "
        f"variance in one feature direction and {places:.1f} % explained by the sum of a row term and a column term"
    )


def draw(options: Options) -> None:
    """Make the page's pictures with the command that it names, whatever the study's `options`.

    Raises:
        ApmError: the command failed.
    """
    import skimage

    with tempfile.TemporaryDirectory() as folder:
        for name in COMMAND[1:3]:
            Path(folder, name).symlink_to(Path(skimage.__file__).parent / "data" / name)
        done = subprocess.run([sys.executable, "-m", "apm", *COMMAND], cwd=folder, stdout=sys.stderr, check=False)
        if done.returncode:
            raise ApmError(f"apm {' '.join(COMMAND)} failed with exit code {done.returncode}.")
        for pattern, name in PICTURES.items():
            (made,) = Path(folder).glob(f"islands/{pattern}")
            write_atomically(ROOT / "docs" / name, made.read_bytes())


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--grid-lr", type=float, default=LR, help="learning rate of the grid's students")
    parser.add_argument("--grid-size", type=int, help="input size of the teacher's grid in pixels")
    parser.add_argument("--threshold", type=float, default=0.9, help="minimum cosine of neighbours in one region")
    parser.add_argument("--parts", type=int, default=12, help="number of clusters and of superpixels")


STUDY = Study(
    name="islands",
    question=__doc__,
    measure=measure,
    table=table,
    arguments=_arguments,
    shared={**USUAL, "preset": "small", "steps": STEPS, "limit": 30},
    results="islands-*.json",
    document=ROOT / "docs" / "islands.md",
    marker="islands",
    pictures=draw,
)

if __name__ == "__main__":
    sys.exit(run(STUDY.main))
