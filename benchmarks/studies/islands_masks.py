"""Whether regions of a field are objects: `python -m apm.benchmarks.studies.islands_masks --root COCO --rows FILE`.

COCO contains ``images/*.jpg`` and ``masks/*.png`` (category numbers, 0: unlabelled). One student per image is fitted to
each target (``TARGETS``). Its field is read between its own locations at several steps of the fit, and cut into parts
in four ways: k-means into as many clusters as the truth has categories; k-means into ``--parts``; islands, which are
connected neighbours whose cosine, after removing the field's mean, reaches ``--threshold``; and islands at the
threshold that gives closest to the true number of them. Each is scored by adjusted mutual information (AMI) with the
truth and by boundary F, beside references without a student (``REFERENCES``). With ``--scenes composites`` the same
photographs are pasted on one another, and the truth is the pasted square. Masks are used only for scoring and for the
number of clusters. ``--rows`` keeps a row per image: the same command resumes from it.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from apm.errors import ImageError, UsageError
from apm.student import islands
from apm.student.cells import Cells
from apm.student.field import resample
from apm.student.islands import Labels
from apm.teachers import load_teacher
from apm.teachers.base import Teacher
from apm.test_time.grid_views import view_cells
from apm.test_time.inputs import student_inputs
from apm.test_time.island_fields import coordinates, trainers
from apm.test_time.label_maps import LR
from apm.test_time.options import StudentOptions
from apm.test_time.queries import ALL
from apm.test_time.views import pixels_id

from .partitions import cut_into_islands, fit
from .pointing_views import average, grid_sizes
from .rows import Row, continued
from .scenes import Scene, pasted, photographs
from .study import ROOT, USUAL, Options, Record, Study, averaged, markdown, numbers, plus_minus, run, signed
from .watching import Watcher

Field = NDArray[np.floating]

TARGETS = {
    "token": "the teacher's token, as in the paper",
    "grid": "its grid of patches",
    "guided": "its grid, with colours in the queries (`--guide rgb`)",
    "views": "the grids of many views",
}
REFERENCES = {
    "teacher's grid": "k-means on that grid, upsampled bilinearly",
    "teacher's finer grid": "the same for the input size that makes its cells as large as the average view's",
    "views' average": "the same for the mean of the views' cells that cover each location, without a student",
    "superpixels": "SLIC (Achanta et al. 2012)",
    "colours": "k-means on the colours of the locations",
    "coordinates": "k-means on nothing but row and column",
    "another's mask": "the truth of the next image: chance",
}
SMALLEST = 0.01
"""Share of the square that a category must hold to count when clusters are numbered."""


@dataclass(frozen=True)
class Judge:
    """Cuts fields into parts, and scores partitions by a truth."""

    truth: Labels
    """(S, S); below 0 where it is not known."""
    other: Labels
    """Another image's."""
    parts: int
    threshold: float
    tolerance: float

    @property
    def number(self) -> int:
        """Categories of the truth, all but the smallest: 2 or more."""
        sizes = np.unique(self.truth[self.truth >= 0], return_counts=True)[1]
        return max(2, int((sizes >= SMALLEST * self.truth.size).sum()))

    def field(self, field: Field) -> dict[str, float]:
        """Cut a field (S, S, D) in all ways, and score it."""
        centred = field - field.mean(axis=(0, 1))
        joined = islands.regions(centred, self.threshold)
        return {
            **self.labels(islands.clusters(field, self.number), islands.clusters(field, self.parts)),
            **self._score("islands", joined),
            "number of islands": float(joined.max() + 1),
            **self._score("islands, true number", cut_into_islands(field, self.number)),
        }

    def labels(self, number: Labels, fixed: Labels) -> dict[str, float]:
        """Score two partitions: into as many parts as the truth has, and into a fixed number."""
        of_other = {
            "AMI, true number, another's mask": self._agreement(number, self.other),
            "F, true number, another's mask": fit(number, self.other, self.tolerance).f,
        }
        return {**self._score("true number", number), **self._score("fixed number", fixed), **of_other}

    def _score(self, name: str, found: Labels) -> dict[str, float]:
        near = fit(found, self.truth, self.tolerance)
        return {
            f"AMI, {name}": self._agreement(found, self.truth),
            f"F, {name}": near.f,
            f"precision, {name}": near.precision,
            f"recall, {name}": near.recall,
        }

    @staticmethod
    def _agreement(found: Labels, truth: Labels) -> float:
        known = truth >= 0
        return islands.agreement(found[known], truth[known])


class Player:
    """Fits all students of a scene, and scores every field and reference."""

    def __init__(self, teacher: Teacher, options: Options) -> None:
        self.teacher, self.options = teacher, options
        student = StudentOptions(preset=options.preset, steps=max(options.snapshots), seed=options.seed, queries=ALL)
        made = trainers(student.model(teacher.dim), student.training(teacher.device), grid_lr=options.grid_lr)
        token, grid = ((one.model, one.config) for one in (made["cls"], made["grid"]))
        configs = {"token": token, "grid": grid, "guided": (replace(grid[0], guide="rgb"), grid[1]), "views": grid}
        self.grid = token[0].grid
        self.lr = token[1].lr
        self.watchers = {name: Watcher(*configs[name], device=options.device) for name in TARGETS}

    def __call__(self, scene: Scene, other: Scene) -> Row:
        """Score one scene: loss and measures of each target at each step, measures of each reference."""
        options = self.options
        judge = Judge(scene.truth, other.truth, options.parts, options.threshold, options.tolerance)
        fields: dict[str, dict[str, dict[str, float]]] = {}
        for target, watcher in self.watchers.items():
            moments = watcher(self._inputs(scene.square, target), lambda step, _: step in options.snapshots)
            fields[target] = {
                str(one.step): {"loss": one.loss, **judge.field(one.field(options.places))} for one in moments
            }
        return {
            "name": scene.name,
            "number": judge.number,
            "unknown": float((scene.truth < 0).mean()),
            "fields": fields,
            "references": self._references(scene, other, judge),
        }

    def _inputs(self, square: Image.Image, target: str) -> Any:
        seen = student_inputs([square], self.teacher, self.watchers[target].model, grids=target != "views")
        return seen.pixels, seen.tokens, self._views(square) if target == "views" else seen.grids

    def _views(self, square: Image.Image) -> Cells:
        settings: dict[str, Any] = {"seed": self.options.seed, "sample_ids": [pixels_id(square)]}
        return view_cells([square], self.teacher, self.grid, self.options.views, **settings)

    def _references(self, scene: Scene, other: Scene, judge: Judge) -> dict[str, dict[str, float]]:
        side, parts = self.options.places, self.options.parts
        small = scene.square.resize((side, side), Image.Resampling.BOX)
        place = coordinates(side).astype(np.float64)
        finer = grid_sizes(self.teacher, self.options.views)["grid, as fine"]
        grids = {
            "teacher's grid": self.teacher.encode_grid(scene.square).cpu(),
            "teacher's finer grid": self.teacher.encode_grid(scene.square, size=finer).cpu(),
            "views' average": average(self._views(scene.square), self.grid).cpu(),
        }
        superpixels = (_superpixels(scene.square, side, count) for count in (judge.number, parts))
        return {
            **{
                name: judge.field(resample(grid, side).cpu().numpy().reshape(side, side, -1))
                for name, grid in grids.items()
            },
            "superpixels": judge.labels(*superpixels),
            "colours": judge.field(np.asarray(small, dtype=np.float64)),
            "coordinates": judge.field(place),
            "another's mask": judge.labels(other.truth, other.truth),
        }


def _superpixels(square: Image.Image, side: int, count: int) -> Labels:
    """SLIC's, all one part where it finds no second: of so few as a mask may have it at times makes one."""
    try:
        return islands.superpixels(square, side, count)
    except ImageError:
        return np.zeros((side, side), dtype=np.int64)


def measure(options: Options) -> Record:
    """Score the scenes."""
    if options.root is None:
        raise UsageError("--root, a folder with images and masks, is needed.")
    teacher = load_teacher(options.teacher, device=options.device)
    scenes = [one for one in photographs(options.root, options.places) if one.usable]
    if options.scenes == "composites":
        scenes = pasted(scenes, len(scenes), options.places, seed=options.seed)
    player = Player(teacher, options)
    kept = ("scenes", "preset", "snapshots", "grid_lr", "views", "parts", "threshold", "tolerance", "places", "seed")
    settings = {name: getattr(options, name) for name in kept}
    began = time.perf_counter()
    rows = continued(
        range(min(options.limit, len(scenes))),
        lambda number: player(scenes[number], scenes[(number + 1) % len(scenes)]),
        options.scenes,
        path=options.rows,
        settings={**settings, "usable": len(scenes), "teacher": teacher.identity},
    )
    return {
        "teacher": teacher.identity,
        "teacher_grid": list(teacher.encode_grid(scenes[0].square).shape[:2]),
        "settings": {**settings, "locations": player.grid, "lr": player.lr, "precision": "fp32"},
        "seconds": time.perf_counter() - began,
        **summary(rows),
    }


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Means and standard errors over scenes, differences paired.

    Returns:
        ``fields``: target → step → measure; ``references``: name → measure; ``differences``: target → what is taken
        off its last step → measure: a reference, the field before the first step, or the target ``grid``.
    """
    found = [{name: row[name] for name in ("fields", "references", "number")} for row in rows]
    less = [{"differences": {target: _less(row, target) for target in TARGETS}} for row in rows]
    return {
        "images": len(rows),
        "unknown": float(np.mean([row["unknown"] for row in rows])),
        **averaged(found),
        **averaged(less),
    }


def _less(row: Row, target: str) -> dict[str, dict[str, float]]:
    """Of one scene: by how much the last field of a target is above each of what it is compared with."""
    steps = list(row["fields"][target].values())
    first, mine = steps[0], steps[-1]
    others = {**row["references"], "no steps": first}
    if target != "grid":
        others["grid"] = list(row["fields"]["grid"].values())[-1]
    found = {
        name: {m: mine[m] - of[m] for m in of if m in mine and m.startswith(("AMI", "F"))}
        for name, of in others.items()
    }
    found["its own with another's mask"] = {
        m: mine[m] - mine[f"{m}, another's mask"] for m in ("AMI, true number", "F, true number")
    }
    return found


def table(records: Sequence[Record]) -> str:
    """Records as markdown, one after the other."""
    return "\n\n".join(_table(record) for record in records)


CUTS = ("true number", "fixed number", "islands", "islands, true number")
COLUMNS = tuple(f"{name}, {cut}" for cut in CUTS for name in ("AMI", "F"))


def _table(record: Record) -> str:
    settings = record["settings"]
    rows = []
    for target, steps in record["fields"].items():
        for step, values in steps.items():
            islands_ = plus_minus(values["number of islands"], 0)
            rows.append((target, step, f"{values['loss'][0]:.1e}", *_cells(values), islands_))
    for name, values in record["references"].items():
        count = plus_minus(values["number of islands"], 0) if "number of islands" in values else "–"
        rows.append((name, "–", "–", *_cells(values), count))
    titles = ("features", "steps", "loss", *COLUMNS, "islands")
    last = max(settings["snapshots"])
    kind = "photographs and their masks" if settings["scenes"] == "photographs" else "composites and the pasted square"
    number, parts = plus_minus(record["number"], 1), settings["parts"]
    paragraphs = (
        f"**{record['images']} {kind}**, {last} steps. True number: the categories with at least "
        f"{100 * SMALLEST:g} % of the square, {number}; fixed number: {parts}; islands at a cosine of "
        f"{settings['threshold']} after removing the mean. The {100 * record['unknown']:.0f} % of locations without a "
        "label are left out.",
        markdown(titles, rows, text=1),
        f"Paired differences after {last} steps, k-means with the true number of clusters (bold: beyond two standard "
        "errors):",
        _differences(record),
        f"<sub>`{record['command']}` · {record['date']} · teacher `{record['teacher']}`, its grid "
        f"{record['teacher_grid'][0]} × {record['teacher_grid'][1]} · {settings['preset']} student, "
        f"{settings['locations']} × {settings['locations']} locations · lr {settings['lr']:g} "
        f"({settings['grid_lr']:g} for grids) · {settings['views']} views · {settings['precision']} · fields read at "
        f"{settings['places']} × {settings['places']} locations · boundaries within {100 * settings['tolerance']:g} % "
        f"of the diagonal · seed {settings['seed']} · ± is the standard error over images</sub>",
    )
    return "\n\n".join(paragraphs)


def _cells(values: Mapping[str, Sequence[float]]) -> list[str]:
    return [plus_minus(values[name], 3) if name in values else "–" for name in COLUMNS]


def _differences(record: Record) -> str:
    """What each target's field has more than references, than itself before, than the grid's."""
    titles = [f"{target}: {name}" for name in ("AMI", "F") for target in record["differences"]]
    against = [*REFERENCES, "no steps", "its own with another's mask", "grid"]

    def cell(target: str, other: str, name: str) -> str:
        found = record["differences"][target].get(other)
        return signed(found[f"{name}, true number"]) if found else "–"

    rows = [
        (f"minus {other}", *(cell(target, other, name) for name in ("AMI", "F") for target in record["differences"]))
        for other in against
    ]
    return markdown(("", *titles), rows)


def plot(records: Sequence[Record]) -> None:
    """Draw both measures over the steps, a row a record."""
    from apm.figures.base import new_figure, save

    figure = new_figure(8.5, 3 * len(records))
    axes = figure.subplots(len(records), 2, squeeze=False)
    for record, row in zip(records, axes, strict=True):
        for measured, axis in zip(("AMI", "F"), row, strict=True):
            _lines(axis, record, f"{measured}, true number")
            axis.set_title(f"{record['images']} {record['settings']['scenes']}: {measured}")
            axis.set_xlabel("steps")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize=7, frameon=False)
    settings = records[0]["settings"]
    save(
        figure,
        ROOT / "docs" / "islands-masks.png",
        settings=f"teacher {records[0]['teacher']} · {settings['preset']} student · k-means with as many clusters as "
        f"the truth has categories · AMI with the truth, F of boundaries within {100 * settings['tolerance']:g} % of "
        "the diagonal · bars: standard error over images · dotted: references without a student",
    )


def _lines(axis: Any, record: Record, name: str) -> None:
    """One measure: a line a target, a dotted line a reference."""
    for number, (target, steps) in enumerate(record["fields"].items()):
        means, errors = zip(*((*values[name], 0)[:2] for values in steps.values()), strict=True)
        axis.errorbar(range(len(steps)), means, errors, color=f"C{number}", marker="o", markersize=3, label=target)
    for number, (reference, values) in enumerate(record["references"].items()):
        axis.axhline(values[name][0], color=f"C{number + 4}", linestyle=":", label=reference)
    axis.set_xticks(range(len(record["fields"]["grid"])), list(record["fields"]["grid"]))


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--scenes", choices=("photographs", "composites"), default="photographs")
    parser.add_argument(
        "--snapshots", type=_steps, default=[0, 10, 50, 150], metavar="N,N", help="steps after which fields are read"
    )
    parser.add_argument(
        "--grid-lr", type=float, default=LR, help="learning rate of all students but those fitted to the token"
    )
    parser.add_argument("--views", type=int, default=16, help="views of an image (default: %(default)s)")
    parser.add_argument("--threshold", type=float, default=0.9, help="minimum cosine of neighbours in one island")
    parser.add_argument("--parts", type=int, default=8, help="the fixed number of clusters")
    parser.add_argument("--places", type=int, default=48, help="locations per side at which all fields are read")
    parser.add_argument(
        "--tolerance", type=float, default=0.02, help="tolerance for boundaries, as a share of the diagonal"
    )


def _steps(text: str) -> list[int]:
    """For argparse: the steps in order, 0 always among them."""
    return sorted({0, *(number for part in text.split(",") if part != "0" for number in numbers(part))})


STUDY = Study(
    name="islands_masks",
    question=__doc__,
    measure=measure,
    table=table,
    arguments=_arguments,
    shared={**USUAL, "preset": "small", "limit": 100, "rows": None},
    side_by_side=True,
    results="islands_masks-*.json",
    document=ROOT / "docs" / "islands.md",
    marker="islands and masks",
    plots=plot,
)

if __name__ == "__main__":
    sys.exit(run(STUDY.main))
