"""How the cost of `apm segment` grows: with the looks at each tile, and with the places at which fields are read."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
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
from .children import apm, peak_bytes
from .kind import PHOTOGRAPH, argument, kind, photograph_of
from .options import Options, Record
from .plots import curves
from .tables import Row
from .timing import Work, interleaved, spreads

LABELS = ("cat", "dog", "wall", "sofa", "carpet", "grass", "sky", "tree", "person", "car")


def _along(key: str, record: Row, **kept: int) -> list[Row]:
    ((other, usual),) = kept.items()
    return sorted((row for row in record["rows"] if row[other] == usual), key=lambda row: row[key])


@kind(
    """
    | views of a tile | places along the shorter side | one photograph | of it views | memory of the command  |
    | {views}         | {places}                      | {seconds}      | {looking}   | {peak_bytes:M,.0f} MB  |
    """,
    "A photograph of {size[0]} × {size[1]} pixels, {tiles} tiles with a student each, {steps} steps; from the file "
    "to the map, without start-up. Memory is the most that `apm segment` held, all that it loads included.",
    title="Segmentation: time and memory against views and places",
    shared={"steps": 150},
    own=PHOTOGRAPH
    | argument("--views", "1,2,4", type=numbers, default=[1, 4, 8, 16, 32, 64])
    | argument("--places", "28,56", type=numbers, default=[28, 56, 112, 224]),
    panels=[
        curves(
            "views",
            {"seconds": "whole", "looking": "views"},
            "views of a tile",
            log=True,
            rows=partial(_along, "views", places=PLACES),
        ),
        curves(
            "places", {"seconds": "whole"}, "places along the shorter side", rows=partial(_along, "places", views=VIEWS)
        ),
    ],
    rounds=3,
)
def segment(options: Options) -> Record:
    """`apm segment` against views and places, with its memory.

    Views, looks of the teacher at each tile, vary at the usual places, and the reverse. Seconds are of one photograph;
    memory is the most that the command holds, all that it loads included, in a process of its own for each row.
    """
    teacher, photograph = load_teacher("embedded", device=options.device), photograph_of(options)
    views, places = options.some(options.views), options.some(options.places)
    points = [(count, PLACES) for count in views] + [(VIEWS, count) for count in places if count != PLACES]
    if VIEWS not in views:
        points.append((VIEWS, PLACES))
    image = load_image(photograph).image
    tiles = [image.crop((x, y, x + side, y + side)) for x, y, side in tiles_of(*image.size)]
    works: dict[Any, Work] = {}
    for count, fine in points:
        classifier = Classifier(teacher, labels=LABELS, student=_student(options, count), device=str(options.device))
        works[count, fine] = partial(classifier.segment, photograph, places=fine)
        works[count] = partial(_look, teacher, tiles, count)
    times, rows = spreads(interleaved(works, options.device, options.rounds)), []
    for point in points:
        with tempfile.TemporaryDirectory() as out:
            held = peak_bytes(_command(options, photograph, out, *point))
        row = {"views": point[0], "places": point[1], "seconds": times[point], "looking": times[point[0]]}
        rows.append({**row, "peak_bytes": held})
    return options.found(rows, teacher=teacher.identity, steps=options.steps, size=list(image.size), tiles=len(tiles))


def _student(options: Options, views: int) -> StudentOptions:
    return StudentOptions(
        preset=options.of_commands,
        steps=options.steps,
        lr=LR,
        distil="grid",
        grid_views=views,
        precision="fp32" if options.precision == "auto" else options.precision,  # as `apm segment` has it
    )


def _look(teacher: Teacher, tiles: Sequence[Any], views: int) -> None:
    for tile in tiles:
        looks(tile, teacher, views, seed=0, sample_id="tile")


def _command(options: Options, photograph: object, out: object, views: int, places: int) -> list[str]:
    student = _student(options, views)
    told = {name: getattr(student, name) for name in ("preset", "precision", "steps")}
    told |= {"labels": ",".join(LABELS), "teacher": "embedded", "device": options.device}
    told |= {"grid-views": views, "places": places, "out": out}
    return apm("segment", photograph, *(f"--{name}={value}" for name, value in told.items()))
