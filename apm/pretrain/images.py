"""The images that a student is trained on: a tree of files, or Parquet files with a column of encoded images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from apm.errors import ImageError, UsageError
from apm.images.load import MAX_PIXELS, decode_image, load_image
from apm.images.paths import EXTENSIONS, file_problem, images_below, printable

COLUMN = "image"
"""The Parquet column: bytes of an image file, or a struct with a field ``bytes``."""


@dataclass(frozen=True)
class ImageSource:
    """A fixed list of images that can be read from any place on.

    Attributes:
        place: what the user named.
        files: image files, or Parquet files.
        rows: rows of each Parquet file; empty for image files.
        dead: links in the folder that lead to no file, and folders in it that cannot be read.
        fingerprint: 16 hex digits over names and sizes, in bytes, of all files: tells whether it is the same list.
    """

    place: Path
    files: tuple[Path, ...]
    rows: tuple[int, ...]
    fingerprint: str
    dead: tuple[Path, ...]

    @property
    def left_out(self) -> str | None:
        """What `dead` comes to, in one line; None where it is empty."""
        return _left_out(self.place, self.dead)

    def __len__(self) -> int:
        return sum(self.rows) if self.rows else len(self.files)

    def read(self, start: int = 0, *, max_pixels: int = MAX_PIXELS) -> Iterator[tuple[str, Image.Image | ImageError]]:
        """Yield name and RGB image, or the error that says what is wrong with it, from number `start` on, in order."""
        if not self.rows:
            for path in self.files[start:]:
                name = path.relative_to(self.place).as_posix()
                try:
                    yield name, load_image(path, max_pixels=max_pixels).image
                except ImageError as error:
                    yield name, error
            return
        for path, count in zip(self.files, self.rows, strict=True):
            if start < count:
                yield from _read_parquet(path, start, max_pixels)
            start = max(start - count, 0)


def open_images(place: str | Path) -> ImageSource:
    """Find the images in a folder and below it, or the rows of Parquet files where a folder holds no images.

    Args:
        place: a folder, or one Parquet file.

    Raises:
        UsageError: no such place, nothing in it, or Parquet files without a column of images.
    """
    place, dead = Path(place), list[Path]()
    shown = printable(place)
    if not place.exists():
        raise UsageError(f"{shown}: no such folder or file.")
    if place.is_dir():
        images: list[Path] = []
        for path in images_below(place):
            (images if path.is_file() else dead).append(path)
        tables = [] if images else sorted(path for path in place.rglob("*.parquet") if path.is_file())
        if not images and not tables:
            raise UsageError(
                f"{shown}: no images in this folder or below it (known: {' '.join(sorted(EXTENSIONS))}), and no "
                f".parquet files either. {_left_out(place, dead) or ''}".rstrip()
            )
    elif place.suffix == ".parquet":
        images, tables = [], [place]
    else:
        raise UsageError(f"{shown} is one file; give a folder of images or a .parquet file with a column of images.")
    files = tuple(images or tables)
    rows = tuple(_count_rows(path) for path in tables)
    if tables and not sum(rows):
        raise UsageError(f"{shown}: the Parquet files have no rows.")
    root = place if place.is_dir() else place.parent
    listing = [[path.relative_to(root).as_posix(), path.stat().st_size] for path in files]
    fingerprint = hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]
    return ImageSource(place=place, files=files, rows=rows, fingerprint=fingerprint, dead=tuple(dead))


def _left_out(place: Path, dead: Sequence[Path]) -> str | None:
    if not dead:
        return None
    what = "path leads" if len(dead) == 1 else "paths lead"
    return (
        f"{len(dead)} {what} to no image in {printable(place)} and what is below it, first"
        f" {printable(dead[0])}: {file_problem(dead[0])}."
    )


def _count_rows(path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if COLUMN not in file.schema_arrow.names:
                raise UsageError(
                    f'{printable(path)} has no column "{COLUMN}"; its columns: {", ".join(file.schema_arrow.names)}.'
                )
            return int(file.metadata.num_rows)
    except pa.ArrowInvalid as error:
        raise UsageError(f"{printable(path)} is not a Parquet file ({' '.join(str(error).split())}).") from error


def _read_parquet(path: Path, start: int, max_pixels: int) -> Iterator[tuple[str, Image.Image | ImageError]]:
    """Read one row group at a time: memory does not grow with the file. A damaged group costs its own rows alone."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        first = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if start < first + count:
                try:
                    values: Sequence[Any] = file.read_row_group(group, columns=[COLUMN]).column(COLUMN).to_pylist()
                except (pa.ArrowException, OSError):
                    values = [None] * count
                for row, value in enumerate(values, start=first):
                    if row >= start:
                        name = f"{path.name}, row {row}"
                        try:
                            yield name, _decode(value, name, max_pixels)
                        except ImageError as error:
                            yield name, error
            first += count


def _decode(value: Any, name: str, max_pixels: int) -> Image.Image:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes) or not data:
        raise ImageError(f"{name}: no bytes of an image")
    return decode_image(data, name, max_pixels=max_pixels).image
