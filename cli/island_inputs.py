"""How `apm islands` goes through images, whatever it looks at: beside each of them it is given another one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from apm.errors import ImageError, UsageError
from apm.images.files import make_folder
from apm.images.paths import file_problem, printable

from . import render
from .answering import paths_of
from .data import load_chosen_teacher

if TYPE_CHECKING:
    from PIL import Image

    from apm.teachers.base import Teacher


def files_of(paths: Sequence[str]) -> tuple[list[Path], int]:
    """The files that the arguments stand for, and how many of them are not there, which are told.

    ``-`` is one path a line on stdin.

    Raises:
        UsageError: none came in on stdin, or as `paths_of`.
        typer.Exit: with 1 where nothing is left.
    """
    files = list(paths_of(paths))
    if not files:
        raise UsageError("Stdin held no path.")
    problems = {file: problem for file in files if (problem := file_problem(file)) is not None}
    for file, problem in problems.items():
        render.failure(f"{printable(file)}: {problem}")
    left = [file for file in files if file not in problems]
    if not left:
        raise typer.Exit(1)
    return left, len(files) - len(left)


def load_named(name: str | None, device: str) -> Teacher:
    """Load it, and say what is to be known of it."""
    source = load_chosen_teacher(name, device)
    for note in source.notes:
        render.notice(note)
    return source


def for_each_image(
    files: Sequence[Path],
    make: Callable[[Path, Image.Image, Image.Image, str], Iterable[Path]],
    *,
    out: Path,
    missing: int,
) -> None:
    """Make what is to be made of each image, and name the files.

    Args:
        files: where the images are; what cannot be read is told, and left out.
        make: file, image, another image and what that is called → the files written.
        out: the folder that they are written to.
        missing: files asked for that are not there, and are told already.

    Raises:
        typer.Exit: with 1 where something could not be made, with 130 after Ctrl-C.
    """
    if out.exists():  # a file by this name is told before anything is computed
        make_folder(out)
    done = 0
    with render.told_when_interrupted(lambda: f"interrupted: {done:,} of {len(files):,} images are done."):
        images = _read(files)
        for number, (file, image) in enumerate(images):
            other, told = _other_of(images, number)
            try:
                written = make(file, image, other, told)
            except ImageError as error:
                render.failure(f"{printable(file.name)} beside {told}: {error}")
                continue
            render.say_files(written)
            sys.stdout.flush()
            done += 1
    if missing or done < len(files):
        raise typer.Exit(1)


def _other_of(images: list[tuple[Path, Image.Image]], number: int) -> tuple[Image.Image, str]:
    """The image whose target serves as a control for one of them, and what to call it."""
    from PIL import Image

    if len(images) == 1:
        return images[0][1].transpose(Image.Transpose.ROTATE_180), "the image itself, upside down"
    file, image = images[(number + 1) % len(images)]
    return image, printable(file.name)


def _read(files: Sequence[Path]) -> list[tuple[Path, Image.Image]]:
    from apm.images.load import load_image

    images = []
    for file in files:
        try:
            images.append((file, load_image(file).image))
        except ImageError as error:
            render.failure(str(error))
    return images
