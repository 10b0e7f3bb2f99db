"""How the cost of `apm segment` grows: with the looks at each tile, and with the places at which fields are read."""

from __future__ import annotations

import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from apm.classifier import Classifier
from apm.images.load import load_image
from apm.segment_values import PLACES
from apm.segmentation import tiles_of
from apm.teachers import load_teacher
from apm.teachers.base import Teacher
from apm.test_time.grid_views import looks
from apm.test_time.label_maps import LR, VIEWS
from apm.test_time.options import StudentOptions

from ..studies.study import numbers
from .children import peak_bytes
from .kind import Kind
from .options import Options, Record
from .plots import Panel, Row, side_by_side
from .startup import photograph_argument, photograph_of
from .tables import Table, shown
from .timing import Work, interleaved, spread

LABELS = ("cat", "dog", "wall", "sofa", "carpet", "grass", "sky", "tree", "person", "car")


def sweep_segment(options: Options) -> Record:
    """Seconds of one photograph and memory of the command, against views at the usual places, and the reverse.

    Views are looks of the teacher at each tile. Memory is the most that `apm segment` holds, all that it loads
    included, in a process of its own for each row.
    """
    teacher, photograph = load_teacher("embedded", device=options.device), photograph_of(options)
    views, places = options.some(options.views), options.some(options.places)
    points = [(count, PLACES) for count in views] + [(VIEWS, count) for count in places if count != PLACES]
    if VIEWS not in views:
        points.append((VIEWS, PLACES))
    image = load_image(photograph).image
    tiles = [image.crop((x, y, x + side, y + side)) for x, y, side in tiles_of(*image.size)]
    works: dict[str, Work] = {}
    for count, fine in points:
        student = _student(options, count)
        classifier = Classifier(teacher, labels=LABELS, student=student, device=str(options.device))
        works[f"{count},{fine}"] = partial(classifier.segment, photograph, places=fine)
        works[f"{count}"] = partial(_look, teacher, tiles, count)
    times = interleaved(works, options.device, options.rounds)
    rows = []
    for count, fine in points:
        with tempfile.TemporaryDirectory() as out:
            command = _command(options, photograph, Path(out), views=count, places=fine)
            held = peak_bytes(command)
        taken, looking = spread(times[f"{count},{fine}"]), spread(times[f"{count}"])
        rows.append({"views": count, "places": fine, "seconds": taken, "looking": looking, "peak_bytes": held})
    return options.found(rows, teacher=teacher.identity, steps=options.steps, size=list(image.size), tiles=len(tiles))


def _student(options: Options, views: int) -> StudentOptions:
    preset = "small" if options.quick else options.preset
    precision = "fp32" if options.precision == "auto" else options.precision  # as `apm segment` has it
    return StudentOptions(
        preset=preset, steps=options.steps, lr=LR, distil="grid", grid_views=views, precision=precision
    )


def _look(teacher: Teacher, tiles: Sequence[Any], views: int) -> None:
    for tile in tiles:
        looks(tile, teacher, views, seed=0, sample_id="tile")


def _command(options: Options, photograph: Path, out: Path, *, views: int, places: int) -> list[str]:
    student = _student(options, views)
    told = {
        "labels": ",".join(LABELS),
        "teacher": "embedded",
        "device": options.device,
        "preset": student.preset,
        "precision": student.precision,
        "steps": student.steps,
        "grid-views": views,
        "places": places,
        "out": out,
    }
    words = [f"--{name}={value}" for name, value in told.items()]
    return [sys.executable, "-m", "apm", "segment", str(photograph), *words]


def _along_views(record: Row) -> list[Row]:
    return sorted((row for row in record["rows"] if row["places"] == PLACES), key=lambda row: row["views"])


def _along_places(record: Row) -> list[Row]:
    return sorted((row for row in record["rows"] if row["views"] == VIEWS), key=lambda row: row["places"])


def _arguments(parser: ArgumentParser) -> None:
    photograph_argument(parser)
    parser.add_argument("--views", type=numbers, default=[1, 4, 8, 16, 32, 64], help="1,2,4")
    parser.add_argument("--places", type=numbers, default=[28, 56, 112, 224], help="28,56")


SEGMENT = Kind(
    name="segment",
    question="`apm segment` against views and places, with its memory",
    title="Segmentation: time and memory against views and places",
    shared={"steps": 150},
    arguments=_arguments,
    measure=sweep_segment,
    table=shown(
        Table(
            {
                "views of a tile": "{views}",
                "places along the shorter side": "{places}",
                "one photograph": "{seconds}",
                "of it views": "{looking}",
                "memory of the command": "{peak_bytes:M,.0f} MB",
            }
        ),
        "A photograph of {size[0]} × {size[1]} pixels, {tiles} tiles with a student each, {steps} steps; from the file "
        "to the map, without start-up. Memory is the most that `apm segment` held, all that it loads included.",
    ),
    plot=side_by_side(
        Panel("views", {"seconds": "whole", "looking": "views"}, "views of a tile", log=True, rows=_along_views),
        Panel("places", {"seconds": "whole"}, "places along the shorter side", rows=_along_places),
    ),
    rounds=3,
)
