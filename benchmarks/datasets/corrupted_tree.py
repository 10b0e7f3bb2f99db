"""Write corrupted copies of a tree of class folders in ImageNet-C's form: ``<corruption>/<level>/<class>/<image>``."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from apm.errors import ApmError, ImageError, UsageError, unknown
from apm.images.files import make_folder, write_atomically

from ..corruptions import CORRUPTIONS, CROP, MARK, RESIZE, SETTINGS_FILE, VERSION, centre_crop, check_level, corrupt
from .files import class_folders, class_images, read_rgb, stable_id

_JPEG_QUALITY = 85  # that of the official files


@dataclass(frozen=True, kw_only=True)
class TreeSettings:
    """What fixes the pixels of a written tree."""

    seed: int = 0
    resize: int = RESIZE
    """Short side before the central 224×224 is cut, in pixels."""
    format: str = "jpeg"
    """jpeg of quality 85, as the official files, or png, which keeps the pixels."""

    def __post_init__(self) -> None:
        if self.resize < CROP:
            raise UsageError(f"A short side of {self.resize} is less than the crop of {CROP}: use {CROP} or more.")
        if self.format not in ("jpeg", "png"):
            raise unknown("format", self.format, ["jpeg", "png"])


@dataclass(frozen=True)
class ImageReport:
    """What happened to one source image: pictures written, pictures that were there already, or the error."""

    id: str
    written: int
    skipped: int
    error: str | None = None


class TreeWriter:
    """Writes the tree, image by image; what is there already is left alone, so running again continues.

    Args:
        source: folder of class folders.
        target: folder to write to; made when absent.
        corruptions: names; none means all 15.
        levels: severities; none means all 5.
        settings: must be those of the tree when `target` holds one.

    Raises:
        UsageError: unknown names, no images, a target inside the source, or a target made with other settings.
    """

    def __init__(
        self,
        source: Path,
        target: Path,
        *,
        corruptions: Sequence[str] = (),
        levels: Sequence[int] = (),
        settings: TreeSettings,
    ) -> None:
        for name in corruptions:
            if name not in CORRUPTIONS:
                raise unknown("corruption", name, CORRUPTIONS)
        for level in levels:
            check_level(level)
        if target.resolve().is_relative_to(source.resolve()):
            raise UsageError(
                f"{target} is inside {source}: its pictures would be used as sources. Choose another folder."
            )
        self.cells = tuple(
            (c, lv) for c in dict.fromkeys(corruptions or CORRUPTIONS) for lv in dict.fromkeys(levels or range(1, 6))
        )
        self.source, self.target, self.settings = source, target, settings
        self.ids = _list(source)
        _check_apart(self.ids, settings.format)

    def run(self, *, jobs: int = 1) -> Iterator[ImageReport]:
        """Write all pictures; yields a report for each source image, in order.

        Args:
            jobs: number of processes.

        Raises:
            ApmError: the target cannot be written (full disk, no permission).
        """
        if jobs < 1:
            raise UsageError(f"--jobs must be 1 or more, not {jobs}.")
        self._claim()
        work = partial(_write_image, self.source, self.target, self.cells, self.settings)
        if jobs == 1:
            yield from map(work, self.ids)
            return
        with ProcessPoolExecutor(
            jobs, mp_context=get_context("spawn"), initializer=cv2.setNumThreads, initargs=(1,)
        ) as pool:
            ids = iter(self.ids)
            while chunk := list(islice(ids, 64 * jobs)):  # bounded: an interruption waits for little
                try:
                    yield from pool.map(work, chunk, chunksize=4)
                except BrokenProcessPool as error:
                    raise ApmError(
                        "A process was killed, perhaps for lack of memory. What was written so far is complete: run "
                        "again with fewer --jobs to continue."
                    ) from error

    def _claim(self) -> None:
        """Write the settings file, or compare with the one that is there."""
        path = self.target / SETTINGS_FILE
        wanted = {**asdict(self.settings), "crop": CROP, "jpeg_quality": _JPEG_QUALITY, "version": VERSION}
        try:
            present: Any = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            present = None
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} cannot be read: {error}. Choose another folder.") from error
        if present is None:
            if self.target.is_dir() and any(self.target.iterdir()):
                raise UsageError(f"{self.target} is not empty and holds no {SETTINGS_FILE}: choose an empty folder.")
            make_folder(self.target)
            write_atomically(path, json.dumps({"made": MARK, **wanted}, indent=2).encode() + b"\n")
            return
        present = present if isinstance(present, dict) else {}
        differing = [
            f"{key} ({present.get(key)} there, {value} now)"
            for key, value in wanted.items()
            if present.get(key) != value
        ]
        if differing:
            raise UsageError(
                f"{self.target} was made with other settings: {', '.join(differing)}. Choose another folder."
            )


def _list(source: Path) -> list[str]:
    """Paths of the images below the source, class by class."""
    if not source.is_dir():
        raise UsageError(f"{source} is not a folder.")
    ids = [f"{name}/{image}" for name in class_folders(source) for image in class_images(source / name)]
    if not ids:
        raise UsageError(
            f"{source} holds no pictures in class folders (<class>/<image>). Give the folder of the classes."
        )
    return ids


def _check_apart(ids: Sequence[str], format: str) -> None:
    """Refuse sources whose pictures would be written to one file: ``a.png`` and ``a.png.jpg``, both as JPEG."""
    written: dict[str, str] = {}
    for image in ids:
        other = written.setdefault(output_name(image, format), image)
        if other != image:
            raise UsageError(f"{other} and {image} would both be written as {output_name(image, format)}: rename one.")


def output_name(image: str, format: str) -> str:
    """Return the path of a written picture: that of its source, with a suffix added when it is of another format."""
    suffixes = {"jpeg": (".jpg", ".jpeg"), "png": (".png",)}[format]
    return image if image.lower().endswith(suffixes) else image + suffixes[0]


def _write_image(
    source: Path, target: Path, cells: Sequence[tuple[str, int]], settings: TreeSettings, image: str
) -> ImageReport:
    name = output_name(image, settings.format)
    missing = [(c, lv, path) for c, lv in cells if not (path := target / c / str(lv) / name).exists()]
    skipped = len(cells) - len(missing)
    if not missing:
        return ImageReport(image, 0, skipped)
    try:
        pixels = np.asarray(centre_crop(read_rgb(source / image), resize=settings.resize))
    except ImageError as error:
        return ImageReport(image, 0, skipped, str(error))
    for corruption, level, path in missing:
        changed = corrupt(pixels, corruption, level, seed=settings.seed, image_id=stable_id(image))
        write_atomically(path, _encoded(Image.fromarray(changed), settings.format))
    return ImageReport(image, len(missing), skipped)


def _encoded(picture: Image.Image, format: str) -> bytes:
    buffer = io.BytesIO()
    if format == "jpeg":
        picture.save(buffer, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    else:
        picture.save(buffer, "PNG")
    return buffer.getvalue()
