"""What is told of files that are not there before anything slow is imported."""

from __future__ import annotations

from pathlib import Path

from apm.errors import ImageError, UsageError
from apm.images.paths import file_problem, printable


def check_made(checkpoint: Path, command: str) -> None:
    """Refuse a checkpoint that is not there, by a `UsageError`; `command` makes one."""
    if not checkpoint.exists():
        raise UsageError(f"{printable(checkpoint)}: no such checkpoint; `{command}` makes one.")


def check_images(*paths: Path) -> None:
    """Refuse images of which nothing can be read, by an `ImageError`."""
    for path in paths:
        if (problem := file_problem(path)) is not None:
            raise ImageError(f"{printable(path)}: {problem}")


def check_data(place: Path) -> None:
    """Refuse a place of many images that is not there, by a `UsageError`."""
    if not place.exists():
        raise UsageError(f"{printable(place)}: no such folder.")
