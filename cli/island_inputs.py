"""How `apm islands` goes through images: each comes with another one, for the control."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    """The files that the arguments stand for, and how many more are missing; these are named on stderr.

    For ``-`` paths are read from stdin, one per line.

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
    """Load a teacher and print its notes."""
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
    """Call `make` for each image, and print the names of the files it writes.

    Args:
        files: the images; those that cannot be read are named on stderr and left out.
        make: file, image, another image and what that is called → the files written.
        out: the folder that they are written to.
        missing: number of files that were missing, and have been named.

    Raises:
        typer.Exit: with 1 where something could not be made, with 130 after Ctrl-C.
    """
    if out.exists():  # a file by this name is told before anything is computed
        make_folder(out)
    done = 0
    with render.told_when_interrupted(lambda: f"interrupted: {done:,} of {len(files):,} images are done."):
        for file, image, other, told in _beside_others(files):
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


def _beside_others(files: Sequence[Path]) -> Iterator[tuple[Path, Image.Image, Image.Image, str]]:
    """Yield each image, the one whose target serves as its control, and what that is called: the next, or the first.

    Three images are held at a time.
    """
    from PIL import Image

    images = _read(files)
    first = current = next(images, None)
    for following in images:
        assert current is not None
        yield *current, following[1], printable(following[0].name)
        current = following
    if first is None or current is None:
        return
    if current is first:
        yield *first, first[1].transpose(Image.Transpose.ROTATE_180), "the image itself, upside down"
    else:
        yield *current, first[1], printable(first[0].name)


def _read(files: Sequence[Path]) -> Iterator[tuple[Path, Image.Image]]:
    from apm.images.load import load_image

    for file in files:
        try:
            yield file, load_image(file).image
        except ImageError as error:
            render.failure(str(error))
