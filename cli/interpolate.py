"""`apm interpolate`: walk from one image to another between their trigger columns."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apm.errors import UsageError
from apm.images.files import make_folder
from apm.images.paths import printable

from .early import check_images, check_made
from .options import Debug, Device, MaxPixels
from .render import read_image, say_files


def interpolate(
    first: Annotated[Path, typer.Argument(metavar="A", help="The photograph to start from.")],
    last: Annotated[Path, typer.Argument(metavar="B", help="The photograph to end at.")],
    checkpoint: Annotated[Path, typer.Option(metavar="CKPT", help="Checkpoint of `apm pretrain`.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for walk.npz, walk.gif and walk.png.")],
    frames: Annotated[int, typer.Option(help="Number of frames, both ends included.")] = 9,
    size: Annotated[int, typer.Option(help="Side of a frame in pixels, one query each.")] = 112,
    device: Device = "auto",
    max_pixels: MaxPixels = None,
    debug: Debug = False,
) -> None:
    """Interpolate linearly between the trigger columns of two photographs, and unfold each column on the way.

    The two ends are the student's direct reconstructions. Prints the files' names.
    """
    if not 2 <= frames <= 1000:
        raise UsageError(f"--frames must be from 2 (the two ends) to 1000, not {frames}.")
    if not 1 <= size <= 1024:
        raise UsageError(f"--size must be from 1 to 1024, not {size}.")
    check_made(checkpoint, "apm pretrain")
    check_images(first, last)
    from apm.devices import pick_device
    from apm.figures.field import write_walk
    from apm.pretrain.student import Student

    student = Student.load(checkpoint, device=pick_device(device))
    photographs = [read_image(path, max_pixels) for path in (first, last)]
    make_folder(out)
    files = write_walk(
        student,
        photographs,
        out,
        frames=frames,
        size=size,
        settings=f"apm interpolate {printable(first.name)} {printable(last.name)} --frames {frames} · "
        f"{student.describe()} · columns interpolated linearly, share of the second above each frame",
        names=[printable(first.stem), printable(last.stem)],
    )
    say_files(files)
