"""`apm colourise`: photographs in the colours that a student trained on grey images predicts."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apm.images.files import make_folder, write_atomically
from apm.images.paths import printable

from . import render
from .answering import Form, Inputs
from .early import check_made
from .options import Debug, Device, JsonLines, LinesOnly, MaxPixels
from .results_folder import failed_record, fill_folder

if TYPE_CHECKING:
    from apm.pretrain.student import Student


def colourise(
    paths: Annotated[
        list[str],
        typer.Argument(help="Files, folders, patterns, or - to read paths from stdin, one per line.", metavar="PATH"),
    ],
    checkpoint: Annotated[Path, typer.Option(metavar="CKPT", help="Checkpoint of `apm pretrain --grey-input`.")],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for pictures and their JSON; the same command continues it.")
    ],
    places: Annotated[
        int | None,
        typer.Option(
            help="Locations per side at which colours are predicted, 1 to 1024; between them they are interpolated. "
            "Default: as in training.",
            show_default=False,
        ),
    ] = None,
    device: Device = "auto",
    as_json: JsonLines = False,
    quiet: LinesOnly = False,
    max_pixels: MaxPixels = None,
    debug: Debug = False,
) -> None:
    """Colour photographs: the lightness is the photograph's own, the colours are predicted by a student.

    The student sees the whole photograph squeezed to a square, in grey; colours in the file are ignored.
    For each image a PNG of its own size and a JSON file are written; on stdout a line with the names of both images.

    Exit code: 0 all done, 1 some could not be (each is named on stderr), 2 wrong usage.
    """
    form = Form(as_json=as_json, quiet=quiet, out=out)
    inputs = Inputs(paths)
    inputs.name_problems(form, doing="colour", failed=failed_record)
    check_made(checkpoint, "apm pretrain")
    with render.told_when_interrupted("interrupted before anything was coloured."):
        from apm.devices import pick_device
        from apm.images.load import MAX_PIXELS
        from apm.pretrain.colouring import check_places, check_student
        from apm.pretrain.student import Student

        student = Student.load(checkpoint, device=pick_device(device))
        check_student(student)
        side = check_places(student, places)
        make_folder(out)
        identity = f"{checkpoint.name}@{hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:16]}"
    limit = MAX_PIXELS if max_pixels is None else max_pixels
    fill_folder(
        out,
        "colourise",
        {"student": identity, "places": side},
        inputs,
        form,
        lambda path, stem: _coloured(student, path, stem, side, limit),
        partial(_line, out),
        always={"student": identity},
    )


def _coloured(student: Student, path: Path, stem: Path, places: int, max_pixels: int) -> dict[str, Any]:
    """Colour a file, write the picture, and return the fields of its record."""
    from apm.images.load import load_image
    from apm.pretrain.colouring import colourise

    loaded = load_image(path, max_pixels=max_pixels)
    picture = colourise(student, loaded.image, places=places)
    file = write_atomically(Path(f"{stem}.png"), partial(picture.save, format="PNG"))
    return {
        "size": list(picture.size),
        "places": places,
        "notes": list(loaded.notes),
        "files": {"picture": file.name},
    }


def _line(folder: Path, record: dict[str, Any]) -> str:
    return f"{printable(record['path'])}\t{printable(folder / record['files']['picture'])}"
