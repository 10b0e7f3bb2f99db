"""Whether a field segments better than upsampling: `python -m apm.benchmarks.studies.segmentation --root DIR`.

DIR holds photographs (``images/``), masks of category ids (``masks/``) and ``categories.tsv``, as COCO's. Every map
sees the same tiles of the whole photograph, is read at the same places and classified with the same texts, among the
labels that are there and among all; ``--min-area`` holds for all alike. The masks only score, and say which labels are
there. Clean, with corruptions that move nothing, and with objects pasted along their own outlines on other photographs,
where the outline is known. ``--rows FILE`` keeps each photograph's row: the same command goes on from there.
"""

from __future__ import annotations

import math
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from apm.errors import unknown
from apm.segmentation import PLACES, Field, Probable, blended, features_of, tiles_of, without_small
from apm.student.config import Guide
from apm.teachers import load_teacher
from apm.teachers.base import Teacher
from apm.test_time.grid_views import GRID_SIDES, GridView, cells_of, looks
from apm.test_time.inputs import student_inputs
from apm.test_time.label_maps import LR, STEPS, VIEWS
from apm.test_time.options import StudentOptions
from apm.test_time.queries import ALL
from apm.test_time.trainer import TestTimeTrainer
from apm.test_time.views import pixels_id
from apm.text.zeroshot import ZeroShotHead

from ..corruptions import CORRUPTIONS, corrupt
from ..runs.environment import peak_memory
from .masked import (
    RESAMPLES,
    Masked,
    by_category,
    composites,
    counts,
    mean_iou,
    pixel_accuracy,
    read_categories,
    read_masked,
    resampled,
    tallied,
    with_interval,
)
from .pointing_views import average, whole
from .rows import Row, continued
from .study import ROOT, USUAL, Options, Record, Study, markdown, run
from .upsampling import GridField, Overlay, joint_bilateral

OURS = "field, views"
SOURCES = {
    "grid": "the teacher's grid at its default size, its features resampled bilinearly",
    "grid, probabilities": "the same grid, classified first and its probabilities resampled bilinearly",
    "grid, filtered": "the first, its probabilities put through a joint bilateral filter with the image's colours",
    "grid, as fine": "its grid at the size at which its cells are as large as those of the average view",
    "grid, same pixels": "its grid at the size at which the image has as many pixels as all views together",
    "views' average": "the views' grids laid over one another at the student's own places; no student",
    "views, bilinear": "the same at every place, each view read bilinearly",
    "views, probabilities": "the same, each view classified first",
    "views, filtered": "*views, bilinear*, put through the joint bilateral filter",
    OURS: "`apm segment`: a student fitted to the grids of all views",
    "field, guided": "the same with `--guide rgb`",
}
STUDENTS: dict[str, Guide] = {OURS: "none", "field, guided": "rgb"}
BASELINES = tuple(name for name in SOURCES if name not in STUDENTS)
STAY = ("gaussian_noise", "defocus_blur", "fog", "contrast", "jpeg_compression")
CLEAN, COMPOSITES, CORRUPTED = "clean", "composites", "corrupted"
GIVEN = {"present": "those there", "all": "all"}
"""Which labels are given."""
REACH, SPREAD, STRIDE = 0.05, 0.1, 2
"""Of the filter: its reach as a share of the shorter side, in colours, and places skipped."""

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
    """Segment everything in every way, and score it."""
    teacher = load_teacher(options.teacher, device=options.device)
    names = read_categories(options.root)
    templates = teacher.default_templates or ("a photo of a {}.",)
    head = ZeroShotHead.build(teacher, tuple(names.values()), templates)
    player = Player(teacher, head, tuple(names), options)
    kept = ["preset", "steps", "lr", "precision", "views", "places", "min_area", "part", "limit", "level", "seed"]
    kept += ["conditions", "composites", "corrupted"]
    settings = {name: getattr(options, name) for name in kept}
    cases = list(cases_of(options))
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
        "filter": {"reach": REACH, "spread": SPREAD, "stride": STRIDE},
        "settings": {**settings, "locations": player.config.grid},
        "groups": {group: scores(some) for group, some in grouped(rows).items()},
        "categories": per_category([row for row in rows if row["condition"] == CLEAN], names),
        "peak_bytes": peak_memory(teacher.device),
        "seconds": {
            name: float(np.mean([row["seconds"][name] for row in rows if row["condition"] == CLEAN]))
            for name in rows[0]["seconds"]
        },
        "tiles": float(np.mean([row["tiles"] for row in rows])),
    }


def cases_of(options: Options) -> Iterator[Case]:
    """Photographs as they are, composites, then every photograph corrupted, all kinds of it one after the other."""
    photographs = read_masked(options.root, options.limit, options.part)
    for name in options.conditions:
        if name not in (CLEAN, COMPOSITES, *CORRUPTIONS):
            raise unknown("condition", name, (CLEAN, COMPOSITES, *CORRUPTIONS))
    if CLEAN in options.conditions:
        yield from (Case(one, CLEAN) for one in photographs)
    if COMPOSITES in options.conditions:
        made = composites(photographs, options.composites, seed=options.seed)
        yield from (Case(one, COMPOSITES) for one in made)
    for one in photographs[: options.corrupted]:
        for name in options.conditions:
            if name in CORRUPTIONS:
                changed = corrupt(np.asarray(one.image), name, options.level, seed=options.seed, image_id=one.name)
                yield Case(replace(one, image=Image.fromarray(changed)), name)


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
        size = teacher.grid_size
        self.sizes = {
            "grid": size,
            "grid, as fine": whole(size / (sum(GRID_SIDES) / 2)),
            "grid, same pixels": whole(size * math.sqrt(options.views)),
        }
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
        if name.endswith("filtered"):
            found = Probable.of_features(looked["grid" if name.startswith("grid") else "views, bilinear"], head)
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
        reach = REACH * min(rows, cols)
        return joint_bilateral(
            values, torch.from_numpy(small).permute(2, 0, 1), reach=reach, spread=SPREAD, stride=STRIDE
        )

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
    return name.endswith(("probabilities", "filtered"))


def probabilities(grid: Tensor, head: ZeroShotHead) -> Tensor:
    """Classify a grid (h, w, D): (h, w, C)."""
    unit = torch.nn.functional.normalize(grid.float().cpu(), dim=2)
    return (head.logit_scale * (unit @ head.features.float().cpu().T)).softmax(dim=2)


def grouped(rows: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    """Rows by group and condition, in the order of the photographs; of a group the photographs that have all of it."""
    by: dict[str, dict[str, Row]] = {}
    for row in rows:
        by.setdefault(row["condition"], {})[row["name"]] = row
    corruptions = [name for name in by if name in CORRUPTIONS]
    groups = {name: [name] for name in (CLEAN, COMPOSITES) if name in by} | (
        {CORRUPTED: corruptions} if corruptions else {}
    )
    found = {}
    for group, names in groups.items():
        complete = [one for one in by[names[0]] if all(one in by[name] for name in names)]
        if complete:
            found[group] = {name: [by[name][one] for one in complete] for name in names}
    return found


def scores(conditions: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Mean IoU and pixel accuracy of every way, means over the conditions, and how far ours is above each.

    Intervals are of resampled photographs, the same ones for both of a pair and for all conditions.
    """
    n = len(next(iter(conditions.values())))
    weights = resampled(n)
    found: dict[str, Any] = {"n": n, "conditions": list(conditions)}
    for given in GIVEN:
        samples: dict[str, dict[str, NDArray[np.float64]]] = {}
        for name in SOURCES:
            sums = [
                np.tensordot(weights, tallied([row["counts"][given][name] for row in rows]), axes=(1, 0))
                for rows in conditions.values()
            ]  # (R, K, 3) each
            samples[name] = {
                "miou": np.mean([mean_iou(one) for one in sums], axis=0),
                "accuracy": np.mean([pixel_accuracy(one) for one in sums], axis=0),
            }
            if all(row["pasted"] for rows in conditions.values() for row in rows):
                objects = np.array([object_iou(row, given, name) for rows in conditions.values() for row in rows])
                samples[name]["object"] = weights @ objects / n
        found[given] = {
            name: {
                of: {**with_interval(values), "ours_above": with_interval(samples[OURS][of] - values)}
                for of, values in mine.items()
            }
            for name, mine in samples.items()
        }
    return found


def object_iou(row: Row, given: str, name: str) -> float:
    """IoU of the pasted object's category, which is nowhere else on the photograph."""
    right, said, there = row["counts"][given][name][str(row["pasted"])]
    return float(right / (said + there - right))


def per_category(rows: Sequence[Row], names: Mapping[int, str]) -> dict[str, Any]:
    """IoU of each category on the clean photographs with the labels that are there, by ours and by the grid."""
    found: dict[str, Any] = {}
    for name in (OURS, "grid", "views, bilinear"):
        for category, one in by_category([row["counts"]["present"][name] for row in rows]).items():
            row = found.setdefault(names[int(category)], {"images": one["images"]})
            row[name] = one["iou"]
    return found


def table(record: Record) -> str:
    """Print a record as markdown."""
    settings, seconds = record["settings"], record["seconds"]
    parts = []
    for group, found in record["groups"].items():
        parts.append(f"**{_title(group, found, settings)}**")
        parts.append(_scores_table(found))
    parts.append("\n".join(f"- *{name}*: {meaning}" for name, meaning in SOURCES.items()))
    if record["categories"]:
        parts.append(_categories_table(record["categories"]))
    sizes = ", ".join(f"{name} {size}" for name, size in record["teacher_sizes"].items())
    took = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
    parts.append(
        f"Sides of the teacher's grids in pixels: {sizes}. Seconds a photograph, of {record['tiles']:.1f} tiles on "
        f"average: {took}. The process held {record['peak_bytes'] / 2**20:.0f} MiB at most. The filter: reach "
        f"{record['filter']['reach']} of the shorter side, colours {record['filter']['spread']}."
    )
    parts.append(
        f"<sub>`{record['command']}` · {record['date']} · teacher `{record['teacher']}`, {record['labels']} labels · "
        f"{settings['views']} views · {settings['preset']} student, {settings['locations']} × {settings['locations']} "
        f"locations, {settings['steps']} steps, lr {settings['lr']:g}, {settings['precision']} · read at "
        f"{settings['places']} places along the shorter side · pieces below {settings['min_area']} given away · seed "
        f"{settings['seed']} · intervals of 95 % from {RESAMPLES:,} resamples of the photographs, paired</sub>"
    )
    return "\n\n".join(parts)


def _title(group: str, found: Record, settings: Mapping[str, Any]) -> str:
    if group == CORRUPTED:
        return f"{found['n']} photographs, mean of {', '.join(found['conditions'])} at level {settings['level']}"
    if group == COMPOSITES:
        return f"{found['n']} composites: an object along its own outline on another photograph"
    return f"{found['n']} photographs, {group}"


def _scores_table(found: Record) -> str:
    titles = ["map", "mIoU", f"{OURS}: above it by", "pixels", "above it by", "mIoU, all labels", "above it by"]
    columns = [("present", "miou"), ("present", "accuracy"), ("all", "miou")]
    if "object" in found["present"][OURS]:
        titles += ["IoU of the object", "above it by"]
        columns.append(("present", "object"))
    rows = []
    for name in SOURCES:
        row = [name]
        for given, of in columns:
            one = found[given][name][of]
            row += [f"{100 * one['value']:.1f}", "–" if name == OURS else _interval(one["ours_above"])]
        rows.append(row)
    return markdown(titles, rows)


def _interval(one: Mapping[str, float]) -> str:
    return f"{100 * one['value']:+.1f} [{100 * one['low']:+.1f}, {100 * one['high']:+.1f}]"


def _categories_table(categories: Mapping[str, Mapping[str, float]]) -> str:
    names = ("grid", "views, bilinear", OURS)
    shown = sorted(categories.items(), key=lambda one: (-one[1]["images"], one[0]))
    rows = [(name, one["images"], *(f"{100 * one[of]:.0f}" for of in names)) for name, one in shown]
    return "IoU of each category, clean, with the labels that are there:\n\n" + markdown(
        ("category", "photographs", *names), rows
    )


def _arguments(parser: ArgumentParser) -> None:
    everything = (CLEAN, COMPOSITES, *STAY)
    parser.add_argument("--views", type=int, default=VIEWS, help="looks at a tile (default: %(default)s)")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="keep the rows there (.jsonl), and go on from them")
    parser.add_argument("--places", type=int, default=PLACES, help="along the shorter side (default: %(default)s)")
    parser.add_argument("--min-area", type=float, default=0.001, help="as in apm segment (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=LR)
    parser.add_argument("--composites", type=int, default=100, help="at most (default: %(default)s)")
    parser.add_argument("--corrupted", type=int, default=100, help="photographs, of each corruption: at most")
    parser.add_argument("--level", type=int, default=3, help="of the corruptions (default: %(default)s)")
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
    shared={**USUAL, "preset": "small", "steps": STEPS, "precision": "fp32", "limit": 100},
    results="segmentation-*.json",
    document=ROOT / "docs" / "fields.md",
    marker="segmentation",
)


if __name__ == "__main__":
    sys.exit(run(STUDY.main))
