"""Checks for missing files, made before anything slow is imported."""

from __future__ import annotations

from pathlib import Path

from apm.errors import ImageError, UsageError
from apm.images.paths import file_problem, printable


def check_made(checkpoint: Path, command: str) -> None:
    """Raise a `UsageError` if there is no such checkpoint; `command` makes one."""
    if not checkpoint.exists():
        raise UsageError(f"{printable(checkpoint)}: no such checkpoint; `{command}` makes one.")


def check_images(*paths: Path) -> None:
    """Raise an `ImageError` for the first image that cannot be read at all."""
    for path in paths:
        if (problem := file_problem(path)) is not None:
            raise ImageError(f"{printable(path)}: {problem}")


def check_data(place: Path) -> None:
    """Raise a `UsageError` if there is no such folder or file of images."""
    if not place.exists():
        raise UsageError(f"{printable(place)}: no such folder or file.")
