"""Whether a field segments better than upsampling: `python -m apm.benchmarks.studies.segmentation --root DIR`.

DIR contains photographs (``images/``), masks of category ids (``masks/``) and ``categories.tsv``, as COCO's. All maps
use the same tiles of the whole photograph, the same locations and the same texts, among the labels present and among
all; ``--min-area`` applies to all. Masks are used only for scoring and for the labels present. Conditions: clean; with
corruptions that move nothing; and objects cut out along their outlines, pasted on other photographs, where the outline
is known. ``--rows FILE`` keeps a row per photograph: the same command resumes from it.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from apm.errors import UsageError, unknown
from apm.segment_values import PLACES
from apm.segmentation import Field, Probable, blended, features_of, tiles_of, without_small
from apm.student.config import Guide
from apm.teachers import load_teacher
from apm.teachers.base import Teacher
from apm.test_time.grid_views import GridView, cells_of, looks
from apm.test_time.inputs import student_inputs
from apm.test_time.label_maps import LR, STEPS, VIEWS
from apm.test_time.options import StudentOptions
from apm.test_time.queries import ALL
from apm.test_time.trainer import TestTimeTrainer
from apm.test_time.views import pixels_id
from apm.text.zeroshot import ZeroShotHead

from ..corruptions import CORRUPTIONS, corrupt
from .masked import Masked, composites, counts, read_categories, read_masked
from .pointing_views import average, grid_sizes
from .rows import Row, continued
from .segment_scores import CLEAN, COMPOSITES, FILTERED, GUIDED, OURS, SOURCES, grouped, per_category, scores, table
from .study import ROOT, USUAL, Options, Record, Study, run
from .upsampling import GridField, Overlay, joint_bilateral

STUDENTS: dict[str, Guide] = {OURS: "none", GUIDED: "rgb"}
STAY = ("gaussian_noise", "defocus_blur", "fog", "contrast", "jpeg_compression")
"""Corruptions that leave everything at its place: the masks stay true."""
FILTER = {"reach": 0.12, "spread": 0.2, "stride": 4}
"""Of `joint_bilateral`; its reach is a share of the shorter side. The best for *views, filtered* of reach 0.03, 0.06,
0.12 and spread 0.05, 0.1, 0.2 on 24 photographs of the part ``tuning`` with the embedded teacher."""

Look = Callable[["Seen"], Field]


@dataclass(frozen=True)
class Case:
    """A photograph as it is looked at."""

    masked: Masked
    condition: str


@dataclass(frozen=True)
class Seen:
    """What the teacher says of a tile, once for all maps."""

    tile: Image.Image
    grids: Mapping[str, Tensor]
    views: list[tuple[GridView, Tensor]]


def measure(options: Options) -> Record:
    """Segment everything in every way, and score it.

    Raises:
        UsageError: --root is missing, or does not hold what is needed.
    """
    if options.root is None:
        raise UsageError("--root, a folder with images, masks and categories.tsv, is needed.")
    teacher = load_teacher(options.teacher, device=options.device)
    names = read_categories(options.root)
    templates = teacher.default_templates or ("a photo of a {}.",)
    head = ZeroShotHead.build(teacher, tuple(names.values()), templates)
    player = Player(teacher, head, tuple(names), options)
    kept = ["preset", "steps", "lr", "precision", "views", "places", "min_area", "part", "limit", "level", "seed"]
    kept += ["conditions", "composites", "corrupted"]
    settings = {**{name: getattr(options, name) for name in kept}, "filter": FILTER}
    cases = cases_of(options)
    rows = continued(
        cases,
        player,
        "photographs",
        path=options.rows,
        settings={**settings, "teacher": teacher.identity, "sources": list(SOURCES)},
    )
    return {
        "labels": len(names),
        "templates": list(templates),
        "teacher": teacher.identity,
        "teacher_sizes": player.sizes,
        "settings": {**settings, "locations": player.config.grid},
        "groups": {group: scores(some) for group, some in grouped(rows).items()},
        "categories": per_category([row for row in rows if row["condition"] == CLEAN], names),
        "tiles": float(np.mean([row["tiles"] for row in rows])),
    }


def cases_of(options: Options) -> list[Case]:
    """Photographs as they are, composites, and corrupted photographs, evenly mixed: an early end has some of each."""
    for name in options.conditions:
        if name not in (CLEAN, COMPOSITES, *CORRUPTIONS):
            raise unknown("condition", name, (CLEAN, COMPOSITES, *CORRUPTIONS))
    photographs = read_masked(options.root, options.limit, options.part)
    made = composites(photographs, options.composites, seed=options.seed)
    corruptions = [name for name in options.conditions if name in CORRUPTIONS]
    groups = [
        [[Case(one, CLEAN)] for one in photographs if CLEAN in options.conditions],
        [[Case(one, COMPOSITES)] for one in made if COMPOSITES in options.conditions],
        [[corrupted(one, name, options) for name in corruptions] for one in photographs[: options.corrupted]],
    ]
    mixed = [((at + 0.5) / len(group), some) for group in groups for at, some in enumerate(group)]
    return [case for _, some in sorted(mixed, key=lambda one: one[0]) for case in some]


def corrupted(one: Masked, name: str, options: Options) -> Case:
    """A photograph with one of the corruptions; its mask stays."""
    changed = corrupt(np.asarray(one.image), name, options.level, seed=options.seed, image_id=one.name)
    return Case(replace(one, image=Image.fromarray(changed)), name)


class Player:
    """Segments one photograph in every way."""

    def __init__(self, teacher: Teacher, head: ZeroShotHead, categories: Sequence[int], options: Options) -> None:
        self.teacher, self.head, self.categories, self.options = teacher, head, categories, options
        given = {name: getattr(options, name) for name in ("preset", "steps", "lr", "precision", "seed")}
        student = StudentOptions(**given, distil="grid", queries=ALL)
        self.config, adapt = student.model(teacher.dim), student.training(teacher.device)
        self.trainers = {
            name: TestTimeTrainer(replace(self.config, guide=guide), adapt, device=options.device)
            for name, guide in STUDENTS.items()
        }
        self.sizes = grid_sizes(teacher, options.views)
        self._seen: dict[str, Seen] = {}
        self._seconds: dict[str, float] = {}

    def __call__(self, case: Case) -> Row:
        """Counts of every map for both lists of labels, and the seconds that views and students took."""
        self._seen, self._seconds = {}, dict.fromkeys(("views", *STUDENTS), 0.0)
        image, truth = case.masked.image, case.masked.truth
        looked = {name: self._lattice(image, self._look(name)) for name in SOURCES if not _classified_first(name)}
        there = case.masked.categories
        found: dict[str, dict[str, Any]] = {}
        for given, ids in (("present", there), ("all", list(self.categories))):
            found[given] = {}
            head = self._among(ids)
            values = torch.tensor(ids, dtype=torch.int32)
            for name in SOURCES:
                probable = self._probable(name, image, looked, head)
                map_ = without_small(probable.map(image.size, values), self.options.min_area)
                found[given][name] = counts(map_, truth)
        return {
            "name": case.masked.name,
            "condition": case.condition,
            "pasted": case.masked.pasted,
            "tiles": len(tiles_of(*image.size)),
            "counts": found,
            "seconds": self._seconds,
        }

    def _among(self, ids: Sequence[int]) -> ZeroShotHead:
        rows = [self.categories.index(one) for one in ids]
        labels = tuple(self.head.labels[row] for row in rows)
        return replace(self.head, labels=labels, features=self.head.features[rows])

    def _probable(self, name: str, image: Image.Image, looked: Mapping[str, Tensor], head: ZeroShotHead) -> Probable:
        if name == "grid, probabilities":
            return self._blended(image, lambda seen: GridField(probabilities(seen.grids["grid"], head)))
        if name == "views, probabilities":
            return self._blended(
                image, lambda seen: Overlay([(view, probabilities(grid, head)) for view, grid in seen.views])
            )
        if name in FILTERED:
            found = Probable.of_features(looked[FILTERED[name]], head)
            return replace(found, values=self._filtered(found.values, image))
        return Probable.of_features(looked[name], head)

    def _look(self, name: str) -> Look:
        """What gives a tile's field by one of the ways that end in features."""
        if name in self.trainers:
            return lambda seen: self._student(name, seen)
        if name == "views' average":
            side = self.config.grid
            return lambda seen: GridField(average(cells_of(seen.views, side), side))
        if name == "views, bilinear":
            return lambda seen: Overlay(seen.views)
        return lambda seen: GridField(seen.grids[name])

    def _lattice(self, image: Image.Image, look: Look) -> Tensor:
        return features_of(image, lambda tile: look(self._of(tile)), tiles_of(*image.size), self.options.places)

    def _blended(self, image: Image.Image, look: Look) -> Probable:
        """Blend what are probabilities already."""

        def reader(tile: Image.Image) -> Callable[[Tensor], Tensor]:
            field = look(self._of(tile))
            return lambda points: field.read(points)[0].cpu()

        sums = blended(image, reader, tiles_of(*image.size), self.options.places)  # (rows, cols, C)
        values = (sums / sums.sum(dim=2, keepdim=True)).permute(2, 0, 1)
        return Probable(torch.arange(len(values)), values)

    def _filtered(self, values: Tensor, image: Image.Image) -> Tensor:
        rows, cols = values.shape[1:]
        small = np.asarray(image.resize((cols, rows), Image.Resampling.BOX), dtype=np.float32) / 255
        chosen: dict[str, Any] = {**FILTER, "reach": FILTER["reach"] * min(rows, cols)}
        return joint_bilateral(values, torch.from_numpy(small).permute(2, 0, 1), **chosen)

    def _of(self, tile: Image.Image) -> Seen:
        name = pixels_id(tile)
        if name not in self._seen:
            began = time.perf_counter()
            views = looks(tile, self.teacher, self.options.views, seed=self.options.seed, sample_id=name)
            self._seconds["views"] += time.perf_counter() - began
            grids = {one: self.teacher.encode_grid(tile, size=size) for one, size in self.sizes.items()}
            self._seen[name] = Seen(tile, grids, views)
        return self._seen[name]

    def _student(self, name: str, seen: Seen) -> Field:
        began = time.perf_counter()
        inputs = student_inputs([seen.tile], self.teacher, self.config)
        cells = cells_of(seen.views, self.config.grid)
        result = self.trainers[name].adapt(inputs.pixels, inputs.tokens, grids=cells, keep_field=True)
        self._seconds[name] += time.perf_counter() - began
        assert result.folded is not None
        return result.folded


def _classified_first(name: str) -> bool:
    return name.endswith("probabilities") or name in FILTERED


def probabilities(grid: Tensor, head: ZeroShotHead) -> Tensor:
    """Classify a grid (h, w, D): (h, w, C)."""
    unit = torch.nn.functional.normalize(grid.float().cpu(), dim=2)
    return (head.logit_scale * (unit @ head.features.float().cpu().T)).softmax(dim=2)


def _arguments(parser: ArgumentParser) -> None:
    everything = (CLEAN, COMPOSITES, *STAY)
    parser.add_argument("--views", type=int, default=VIEWS, help="views of a tile (default: %(default)s)")
    parser.add_argument(
        "--places", type=int, default=PLACES, help="locations along the shorter side (default: %(default)s)"
    )
    parser.add_argument("--min-area", type=float, default=0.001, help="as in apm segment (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=LR)
    parser.add_argument(
        "--composites", type=int, default=100, help="largest number of composites (default: %(default)s)"
    )
    parser.add_argument("--corrupted", type=int, default=100, help="largest number of photographs per corruption")
    parser.add_argument("--level", type=int, default=3, help="severity of the corruptions (default: %(default)s)")
    parser.add_argument(
        "--part", choices=("all", "tuning", "report"), default="all", help="every other photograph, or all of them"
    )
    parser.add_argument(
        "--conditions",
        type=lambda text: text.split(","),
        default=list(everything),
        help=f"some of {','.join(everything)} and other corruptions that move nothing",
    )


STUDY = Study(
    name="segmentation",
    question=__doc__,
    measure=measure,
    table=table,
    arguments=_arguments,
    shared={**USUAL, "preset": "small", "steps": STEPS, "precision": "fp32", "limit": 100, "rows": None},
    results="segmentation-*.json",
    document=ROOT / "docs" / "fields.md",
    marker="segmentation",
)


if __name__ == "__main__":
    sys.exit(run(STUDY.main))
