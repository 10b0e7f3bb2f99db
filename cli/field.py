"""`apm field`: what a trained student answers about one image, at any locations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apm.errors import UsageError, unknown
from apm.images.files import make_folder
from apm.images.paths import printable
from apm.settings import at_least

from .early import check_images, check_made
from .options import Debug, Device, MaxPixels
from .render import read_image, say_files

ORDERS = ("reading", "random")


def field(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The photograph; its central square is used.")],
    checkpoint: Annotated[Path, typer.Option(metavar="CKPT", help="Checkpoint of `apm pretrain`.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the arrays (npz) and the picture (png).")],
    size: Annotated[
        int | None, typer.Option(help="Side of the picture in pixels, one query for each. Default: 224.")
    ] = None,
    locations: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV", help="Query the locations of this file instead: columns y and x, 0 to 1 over the square."
        ),
    ] = None,
    order: Annotated[
        str, typer.Option(help="Order of the queries: reading or random. Answers do not depend on it.")
    ] = "reading",
    seed: Annotated[int, typer.Option(help="Seed of the random order.")] = 0,
    chunk: Annotated[int, typer.Option(help="Queries at a time: fewer need less memory.")] = 4096,
    device: Device = "auto",
    max_pixels: MaxPixels = None,
    debug: Debug = False,
) -> None:
    """Query a trained student's field of one image: one pass, any resolution, any order, bounded memory.

    Writes rows, cols (in grid cells), features and colours of all queries, and a picture. Prints the files' names.
    """
    if size is not None and locations is not None:
        raise UsageError("--size and --locations exclude each other; give one of them.")
    if order not in ORDERS:
        raise unknown("order", order, ORDERS)
    at_least(0)("--seed", seed)
    at_least(1)("--chunk", chunk)
    check_made(checkpoint, "apm pretrain")
    check_images(image)
    side = 224 if size is None else size
    from apm.devices import pick_device
    from apm.figures import base as figures
    from apm.figures.field import LIMIT, read_locations, write_field
    from apm.pretrain.student import Student

    if not 1 <= side <= LIMIT:
        raise UsageError(f"--size must be from 1 to {LIMIT}, not {side}.")
    student = Student.load(checkpoint, device=pick_device(device))
    places = None if locations is None else read_locations(locations, student.config.grid)
    photograph = read_image(image, max_pixels)
    make_folder(out)
    queries = f"{side}×{side} queries" if places is None else f"{len(places[0])} queries"
    files = write_field(
        student,
        photograph,
        out / figures.output_stem(image),
        settings=f"apm field {printable(image.name)} · {student.describe()} · {queries}, {order} order",
        size=side,
        locations=places,
        order=order,
        seed=seed,
        chunk=chunk,
    )
    say_files(files)
