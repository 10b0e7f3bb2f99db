"""Whether GLOM's islands follow objects: compared with masks, APM's field and k-means on the teacher's grid.

``python -m apm.benchmarks.studies.glom_islands CKPT --root COCO --rows FILE --record FILE`` reads ``images/*.jpg`` and
``masks/*.png`` (category numbers, 0: unlabelled) below COCO, takes central squares, and labels every location with the
category of most of its pixels. The same photographs, pasted on one another, give composites, whose truth is the pasted
square. All features are read at GLOM's own locations and cut into parts in two ways: k-means into ``--parts`` clusters,
and islands (connected neighbours above a cosine) at the threshold that gives closest to ``--parts`` of them. Masks are
used only for scoring. ``--rows`` keeps a row per image: after a kill the same command resumes.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from apm.errors import UsageError
from apm.glom.model import GLOM
from apm.student import islands
from apm.student.field import resample
from apm.student.islands import Labels
from apm.student.position import dense_locations
from apm.teachers import load_teacher
from apm.teachers.base import Teacher
from apm.test_time.inputs import student_inputs, student_pixels
from apm.test_time.island_fields import trainers
from apm.test_time.label_maps import LR, STEPS
from apm.test_time.options import StudentOptions
from apm.test_time.queries import ALL
from apm.test_time.trainer import TestTimeTrainer

from .glom_images import arguments, read_trained, said
from .partitions import cut_into_islands
from .rows import Row, continued
from .scenes import neighbours, pasted, photographs
from .study import ROOT, USUAL, Options, Record, Study, averaged, markdown, plus_minus, run

Field = NDArray[np.float64]
MEASURES = {
    "clusters": "AMI, k-means",
    "islands": "AMI, islands",
    "other": "AMI, k-means, another image's mask",
    "contrast": "contrast at the mask's edges",
}
KINDS = {"masks": "photographs and their masks", "composites": "composites and the pasted square"}


class Sources:
    """Features of an image at GLOM's places, by the name of what made them."""

    def __init__(self, model: GLOM, settling: int, teacher: Teacher, students: Mapping[str, TestTimeTrainer]) -> None:
        self.teacher, self.students, self.settling = teacher, students, settling
        self.networks = {"GLOM": model, "GLOM not trained": GLOM(model.config, seed=1)}
        self.grid = model.config.grid

    @torch.no_grad()
    def __call__(self, square: Image.Image) -> dict[str, Field]:
        """Compute all of them, (G, G, D) each."""
        side = self.grid
        found: dict[str, Any] = {}
        for name, network in self.networks.items():
            levels = network(student_pixels([square], network.config.image_size), steps=self.settling)[0]  # (N, L, D)
            found |= {f"{name}, level {level}": values for level, values in enumerate(levels.unbind(1))}
        config = self.students["grid"].model
        seen = student_inputs([square], self.teacher, config, grids=True)
        found["teacher's grid"] = resample(self.teacher.encode_grid(square), side)
        for target, name in (("grid", "APM's field, fitted to the grid"), ("cls", "APM's field, fitted to the token")):
            with torch.enable_grad():
                result = self.students[target].adapt(
                    seen.pixels, seen.tokens, grids=seen.grids if target == "grid" else None, keep_field=True
                )
            found[name] = result.features(*dense_locations(config.grid, side))[0]
        found["colours"] = torch.from_numpy(
            np.asarray(square.resize((side, side), Image.Resampling.BOX), dtype=np.float64)
        )
        found["coordinates"] = torch.cartesian_prod(*[torch.arange(side, dtype=torch.float64)] * 2)
        return {name: np.asarray(values, dtype=np.float64).reshape(side, side, -1) for name, values in found.items()}


def contrast(field: Field, truth: Labels) -> float:
    """How much less alike neighbours are across an edge of the truth than within: as `islands.boundary_contrast`."""
    known, same = neighbours(truth)
    cosines = np.concatenate([one.ravel() for one in islands.neighbour_cosines(field - field.mean(axis=(0, 1)))])
    return float(cosines[known & same].mean() - cosines[known & ~same].mean())


def score(field: Field, truth: Labels, other: Labels, parts: int) -> dict[str, float]:
    """Score one field of an image by its truth, and by another image's; see `MEASURES`."""
    clusters = islands.clusters(field, parts)

    def agreement(found: Labels, wanted: Labels) -> float:
        known = wanted >= 0
        return islands.agreement(found[known], wanted[known])

    return {
        "clusters": agreement(clusters, truth),
        "islands": agreement(cut_into_islands(field, parts), truth),
        "other": agreement(clusters, other),
        "contrast": contrast(field, truth),
    }


def measure(options: Options) -> Record:
    """Score every source of features on photographs with masks, and on composites of them."""
    if options.root is None:
        raise UsageError("--root, a folder with images and masks, is needed.")
    trained = read_trained(options)
    teacher = load_teacher(options.teacher, device=options.device)
    student = StudentOptions(preset=options.preset, steps=options.steps, seed=options.seed, queries=ALL)
    students = trainers(student.model(teacher.dim), student.training(teacher.device), grid_lr=LR, device=options.device)
    sources = Sources(trained.model, trained.settling, teacher, students)
    usable = [scene for scene in photographs(options.root, sources.grid) if scene.usable][: options.limit]
    settings = {
        "preset": options.preset,
        "steps": options.steps,
        "grid_lr": LR,
        "parts": options.parts,
        "seed": options.seed,
        "teacher": teacher.identity,
        "settling": trained.settling,
        "step": trained.step,
    }
    kinds = {"masks": usable, "composites": pasted(usable, len(usable), sources.grid, seed=options.seed)}

    def scored(item: tuple[str, int]) -> Row:
        kind, number = item
        scene, other = kinds[kind][number], kinds[kind][(number + 1) % len(usable)]
        fields = sources(scene.square)
        return {name: score(field, scene.truth, other.truth, options.parts) for name, field in fields.items()}

    rows = continued(
        [(kind, number) for kind in kinds for number in range(len(usable))],
        scored,
        "images",
        path=options.rows,
        settings={**settings, "images": len(usable)},
    )
    found = {"masks": rows[: len(usable)], "composites": rows[len(usable) :]}
    found = {kind: some for kind, some in found.items() if some}  # after an early end there may be none
    return {
        "glom": trained.record,
        "settings": settings,
        "grid": sources.grid,
        "images": {kind: len(some) for kind, some in found.items()},
        "scores": {kind: averaged(some) for kind, some in found.items()},
    }


def table(record: Record) -> str:
    """A table for each kind of image: a row a source of features."""
    settings = record["settings"]
    parts = []
    for kind, of in record["scores"].items():
        rows = ((name, *(plus_minus(values[what], 3) for what in MEASURES)) for name, values in of.items())
        title = f"{record['images'][kind]} {KINDS[kind]}"
        parts.append(f"{title}\n\n{markdown(('features', *MEASURES.values()), rows)}")
    note = (
        f"At {record['grid']} × {record['grid']} locations, {settings['parts']} parts. AMI: adjusted mutual "
        f"information (0: chance, 1: the same partition); ± standard error over images. APM's students: "
        f"{settings['preset']}, {settings['steps']} steps, seed {settings['seed']}; teacher "
        f"`{settings['teacher']}`. {said(record)}"
    )
    return "\n\n".join([*parts, note])


def _arguments(parser: ArgumentParser) -> None:
    arguments(parser)
    parser.add_argument("--parts", type=int, default=4, help="number of parts per image")


STUDY = Study(
    name="glom_islands",
    question=__doc__,
    measure=measure,
    table=table,
    arguments=_arguments,
    shared={**USUAL, "preset": "small", "steps": STEPS, "limit": 50, "rows": None},
    results="glom-islands.json",
    document=ROOT / "docs" / "glom.md",
    marker="islands",
)

if __name__ == "__main__":
    sys.exit(run(STUDY.main))
