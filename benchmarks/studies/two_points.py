"""The distance at which a map resolves two objects: `python -m apm.benchmarks.studies.two_points --root DIR`.

Two small copies of a photograph are pasted side by side on one of another class, and the map of their label is followed
from one to the other. It resolves two if it falls between them to 81 % of the lower peak or less, as in Rayleigh's
criterion for two stars. As a control, the gap is filled with more copies: a map that falls there as well shows its own
unevenness, not the gap. The study also measures how coarsely each map can be read: the error of maps that are read at
fewer locations and interpolated. ``--rows FILE`` keeps the rows: the same command resumes.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from apm.errors import UsageError
from apm.segmentation import Field
from apm.student.cells import Cells
from apm.student.field import resample
from apm.teachers import load_teacher
from apm.teachers.base import Teacher
from apm.test_time.grid_views import cells_of, looks
from apm.test_time.inputs import student_inputs
from apm.test_time.island_fields import square_of
from apm.test_time.label_maps import LR, STEPS, VIEWS, label_maps
from apm.test_time.options import StudentOptions
from apm.test_time.queries import ALL
from apm.test_time.trainer import TestTimeTrainer
from apm.test_time.views import pixels_id
from apm.text.zeroshot import ZeroShotHead

from ..datasets import open_dataset
from ..tables.stats import mcnemar
from .pointing_views import average, grid_sizes
from .rows import Row, continued
from .study import ROOT, USUAL, Options, Record, Study, markdown, numbers, run
from .upsampling import GridField, Overlay

SOURCES = {
    "grid": "the teacher's grid at its default size, upsampled bilinearly",
    "grid, as fine": "its grid at the input size that makes its cells as large as the average view's",
    "views' average": "the mean of the views' cells that cover each of the student's locations, without a student",
    "views, bilinear": "the mean of the views at each location that is read, each upsampled bilinearly",
    "field, grid": "a student fitted to the grid at its default size",
    "field, views": "a student fitted to the grids of all views",
}
VALLEY = 0.81
"""Of the lower peak: what lies between two that are told apart is at most this high."""
FINEST = 112
"""Places a side at which maps are read."""
COARSER = (8, 16, 28, 56)
"""Fewer places, from which what lies between is interpolated."""


@dataclass(frozen=True)
class Pair:
    """Two copies of a photograph on another, and the same with copies all the way between."""

    two: Image.Image
    filled: Image.Image
    label: int
    distance: int
    """Between the middles of the two, in pixels."""
    first: tuple[float, float]
    """(y, x) of the first's middle, as shares of the side."""
    second: tuple[float, float]


def measure(options: Options) -> Record:
    """Make the pairs, follow the maps, and count."""
    if min(options.distances) < options.side or max(options.distances) + options.side > options.canvas:
        raise UsageError(
            f"--distances must lie between the objects' side, {options.side}, and what the canvas leaves, "
            f"{options.canvas - options.side}."
        )
    teacher = load_teacher(options.teacher, device=options.device)
    data = open_dataset("folder", options.root)
    head = ZeroShotHead.build(teacher, data.class_names, data.templates)
    pairs = list(pairs_of(data.samples, options))
    kept = ("preset", "steps", "lr", "precision", "views", "canvas", "side", "distances", "limit", "seed")
    settings = {name: getattr(options, name) for name in kept}
    follower = Follower(teacher, head, options)
    rows = continued(
        pairs,
        follower,
        "pairs",
        path=options.rows,
        settings={**settings, "dataset": data.name, "samples": len(data.samples), "teacher": teacher.identity},
    )
    return {
        "dataset": data.name,
        "classes": len(data.class_names),
        "templates": list(data.templates),
        "teacher": teacher.identity,
        "teacher_sizes": follower.sizes,
        "settings": {**settings, "locations": follower.config.grid},
        "told_apart": told_apart(rows),
        "lost": {
            name: {str(places): float(np.mean([row["lost"][name][str(places)] for row in rows])) for places in COARSER}
            for name in SOURCES
        },
    }


def pairs_of(samples: Sequence[Any], options: Options) -> Iterator[Pair]:
    """`limit` pairs at each distance, the distances in turn."""
    rng = np.random.default_rng(options.seed)
    labels = np.array([sample.label for sample in samples])
    for _ in range(options.limit):
        for distance in options.distances:
            number = int(rng.integers(len(samples)))
            ground = int(rng.choice(np.flatnonzero(labels != labels[number])))
            yield pair(
                samples[number].load(), samples[ground].load(), int(labels[number]), distance, options=options, rng=rng
            )


def pair(
    photograph: Image.Image,
    background: Image.Image,
    label: int,
    distance: int,
    *,
    options: Options,
    rng: np.random.Generator,
) -> Pair:
    """Paste copies at a distance, side by side or one above the other, where the canvas has room for them."""
    canvas, side = options.canvas, options.side
    copy = square_of(photograph).resize((side, side), Image.Resampling.BICUBIC)
    ground = square_of(background).resize((canvas, canvas), Image.Resampling.BICUBIC)
    along, across = int(rng.integers(canvas - side - distance + 1)), int(rng.integers(canvas - side + 1))
    upright = bool(rng.integers(2))
    steps = -(-distance // side)  # so many that no gap is left
    places = [along + round(distance * step / steps) for step in range(steps + 1)]

    def pasted(starts: Sequence[int]) -> Image.Image:
        image = ground.copy()
        for start in starts:
            image.paste(copy, (across, start) if upright else (start, across))
        return image

    def middle(start: int) -> tuple[float, float]:
        y, x = (start, across) if upright else (across, start)
        return (y + side / 2) / canvas, (x + side / 2) / canvas

    return Pair(pasted([places[0], places[-1]]), pasted(places), label, distance, middle(places[0]), middle(places[-1]))


class Follower:
    """Follows the maps of one pair by every source."""

    def __init__(self, teacher: Teacher, head: ZeroShotHead, options: Options) -> None:
        self.teacher, self.head, self.options = teacher, head, options
        given = {name: getattr(options, name) for name in ("preset", "steps", "lr", "precision", "seed")}
        student = StudentOptions(**given, distil="grid", queries=ALL)
        self.config, adapt = student.model(teacher.dim), student.training(teacher.device)
        self.trainers = {
            name: TestTimeTrainer(self.config, adapt, device=options.device) for name in SOURCES if "field" in name
        }
        sizes = grid_sizes(teacher, options.views)
        self.sizes = {name: sizes[name] for name in ("grid", "grid, as fine")}

    def __call__(self, one: Pair) -> Row:
        """How high each map is between the copies, with the gap and without it, and what coarser reading loses."""
        maps = {"two": self.maps(one.two, one.label), "filled": self.maps(one.filled, one.label)}
        width = self.options.side / self.options.canvas
        return {
            "distance": one.distance,
            "valleys": {
                name: {kind: valley(some[name], one.first, one.second, width) for kind, some in maps.items()}
                for name in SOURCES
            },
            "lost": {name: {str(places): lost(maps["two"][name], places) for places in COARSER} for name in SOURCES},
        }

    def maps(self, image: Image.Image, label: int) -> dict[str, Tensor]:
        """The label's probabilities (FINEST, FINEST) by source."""
        seen = looks(image, self.teacher, self.options.views, seed=self.options.seed, sample_id=pixels_id(image))
        grids = {name: self.teacher.encode_grid(image, size=size) for name, size in self.sizes.items()}
        cells = cells_of(seen, self.config.grid)
        inputs = student_inputs([image], self.teacher, self.config)
        targets: dict[str, Tensor | Cells] = {
            "field, grid": resample(grids["grid"][None], self.config.grid),
            "field, views": cells,
        }
        fields: dict[str, Field] = {name: GridField(grid) for name, grid in grids.items()}
        fields |= {"views' average": GridField(average(cells, self.config.grid)), "views, bilinear": Overlay(seen)}
        for name, trainer in self.trainers.items():
            result = trainer.adapt(inputs.pixels, inputs.tokens, grids=targets[name], keep_field=True)
            assert result.folded is not None
            fields[name] = result.folded
        return {name: self._map(field, label) for name, field in fields.items()}

    def _map(self, field: Field, label: int) -> Tensor:
        features = field.read(middles(FINEST))[0].reshape(FINEST, FINEST, -1)
        return label_maps(features, self.head, [label]).probabilities[0]


def middles(side: int) -> Tensor:
    """The middles (side², 2) of side × side equal cells: y and x as shares of the side, in reading order."""
    axis = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).reshape(-1, 2)


def valley(values: Tensor, first: tuple[float, float], second: tuple[float, float], width: float) -> float:
    """How far a map falls between two places: its least value there over the lower of its two peaks about them.

    Args:
        values: (S, S), above 0.
        first: (y, x), as shares of the side.
        second: in the same row or the same column.
        width: of the objects, as a share of the side: the map is averaged across it, and its peaks are looked
            for within half of it.

    Returns:
        1 where nothing is lower than the lower of the two.
    """
    if first[1] == second[1]:
        values, first, second = values.T, first[::-1], second[::-1]
    size = len(values)
    lines = slice(round((first[0] - width / 2) * size), max(1, round((first[0] + width / 2) * size)))
    profile = values[lines].mean(dim=0)
    start, end, half = (int(where * size) for where in (first[1], second[1], width / 2))
    tops = [low + int(profile[low : at + half + 1].argmax()) for at in (start, end) for low in [max(0, at - half)]]
    return float(profile[tops[0] : tops[1] + 1].min() / profile[tops].min())


def lost(values: Tensor, places: int) -> float:
    """Root mean square error of a map (S, S) that is read at fewer places a side, as a share of its deviation."""
    size = len(values)
    read = GridField(values[..., None]).read(middles(places))[0].reshape(places, places, 1)
    back = resample(read[None], size)[0].reshape(size, size)
    return float((back - values).square().mean().sqrt() / values.std(correction=0).clamp_min(1e-12))


def told_apart(rows: Sequence[Row]) -> dict[str, Any]:
    """By source and distance: share of the pairs that show two, the same where there is no gap, and McNemar's p."""
    found: dict[str, Any] = {}
    for name in SOURCES:
        found[name] = {}
        for distance in sorted({row["distance"] for row in rows}):
            valleys = [row["valleys"][name] for row in rows if row["distance"] == distance]
            two, filled = (np.array([one[kind] <= VALLEY for one in valleys]) for kind in ("two", "filled"))
            found[name][str(distance)] = {
                "n": len(valleys),
                "two": float(two.mean()),
                "filled": float(filled.mean()),
                "p": mcnemar(int((filled & ~two).sum()), int((two & ~filled).sum())),
            }
    return found


def table(record: Record) -> str:
    """Print a record as markdown."""
    settings = record["settings"]
    distances = list(next(iter(record["told_apart"].values())))
    rows = [
        (name, *(f"{100 * one['two']:.0f} / {100 * one['filled']:.0f}{_mark(one['p'])}" for one in by.values()))
        for name, by in record["told_apart"].items()
    ]
    counts = sorted({one["n"] for by in record["told_apart"].values() for one in by.values()})
    lost_rows = [(name, *(f"{100 * value:.1f}" for value in by.values())) for name, by in record["lost"].items()]
    sizes = "; ".join(f"{name} {size}" for name, size in record["teacher_sizes"].items())
    return "\n\n".join(
        (
            "Pairs that the map resolves as two objects, in percent, with the gap / with the gap filled (* McNemar's "
            "p < 0.01), by the distance between the objects' centres in pixels; "
            f"{' to '.join(map(str, counts))} pairs per distance:",
            markdown(("map", *distances), rows),
            "Error of a map that is read at fewer locations per side and interpolated: RMSE in percent of the map's "
            "standard deviation:",
            markdown(("map", *map(str, COARSER)), lost_rows),
            "\n".join(f"- *{name}*: {meaning}" for name, meaning in SOURCES.items()),
            f"<sub>`{record['command']}` · {record['date']} · teacher `{record['teacher']}`, input sizes of "
            f"its grids {sizes} pixels · {record['classes']} classes · objects of {settings['side']} on a "
            f"canvas of {settings['canvas']} pixels · {settings['views']} views · {settings['preset']} student, "
            f"{settings['locations']} × {settings['locations']} locations, {settings['steps']} steps, lr "
            f"{settings['lr']:g}, {settings['precision']} · maps read at {FINEST} × {FINEST} · seed "
            f"{settings['seed']}</sub>",
        )
    )


def _mark(p: float) -> str:
    return "*" if p < 0.01 else ""


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--views", type=int, default=VIEWS, help="views of an image (default: %(default)s)")
    parser.add_argument("--canvas", type=int, default=224, help="side of the images, in pixels")
    parser.add_argument("--side", type=int, default=40, help="side of the pasted objects, in pixels")
    parser.add_argument(
        "--distances",
        type=numbers,
        default=[48, 64, 80, 112, 144],
        help="between their centres, in pixels, such as 48,64,80",
    )
    parser.add_argument("--lr", type=float, default=LR)


STUDY = Study(
    name="two_points",
    question=__doc__,
    measure=measure,
    table=table,
    arguments=_arguments,
    shared={**USUAL, "preset": "small", "steps": STEPS, "precision": "fp32", "limit": 40, "rows": None},
    results="two-points-*.json",
    document=ROOT / "docs" / "fields.md",
    marker="two points",
)


if __name__ == "__main__":
    sys.exit(run(STUDY.main))
