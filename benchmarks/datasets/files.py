"""Folders and picture files, and what a folder of classes is: no data set is named here."""

from __future__ import annotations

import os
import re
from pathlib import Path

from PIL import Image

from apm.errors import UsageError
from apm.images.load import MAX_PIXELS, load_image
from apm.images.paths import EXTENSIONS

_WNID = re.compile(r"n\d{8}")
_SKIPPED_FOLDERS = frozenset({"__MACOSX", "@eaDir", "lost+found", "System Volume Information", "$RECYCLE.BIN"})
"""What archives, network drives and file systems put among the classes."""


def is_wnid(name: str) -> bool:
    """Whether a name has the form of a WordNet id, such as n01440764."""
    return _WNID.fullmatch(name) is not None


def is_integer(name: str) -> bool:
    """Whether a name is a plain decimal number."""
    return name.isascii() and name.isdigit()


def class_folders(folder: Path) -> list[str]:
    """Return the names of the sub-folders, without hidden ones and `_SKIPPED_FOLDERS`; integers sorted as integers.

    Raises:
        UsageError: the folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
    except OSError as error:
        raise UsageError(f"Cannot read the folder {folder}: {error.strerror}.") from error
    names = [name for name in names if name not in _SKIPPED_FOLDERS]
    # Sorted as text, 10 comes before 2, and every label after it is silently wrong.
    return sorted(names, key=int) if names and all(map(is_integer, names)) else sorted(names)


def image_names(folder: Path) -> list[str]:
    """Return the names of the picture files right in a folder, sorted; hidden files (also macOS's ``._``) are skipped.

    Links that lead nowhere are among them: a picture that is missing must not go unnoticed.

    Raises:
        UsageError: the folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if not e.name.startswith(".") and (e.is_file() or _is_dead(e))]
    except OSError as error:
        raise UsageError(f"Cannot read the folder {folder}: {error.strerror}.") from error
    return sorted(name for name in names if os.path.splitext(name)[1].lower() in EXTENSIONS)


def _is_dead(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not os.path.exists(entry)


def dead_links(folder: Path) -> list[str]:
    """Return the names in a folder that are links to what is not there, sorted; hidden ones are skipped."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if not e.name.startswith(".") and _is_dead(e))


def class_images(folder: Path) -> list[str]:
    """Return the pictures of one class folder, as paths below it: its own, or those of its folder ``images``.

    The second is how Tiny ImageNet lays out its classes. Deeper pictures are not taken: they are a sign of a wrong
    parent folder.
    """
    names = image_names(folder)
    if not names and (folder / "images").is_dir():
        names = [f"images/{name}" for name in image_names(folder / "images")]
    return names


def beside(folder: Path, name: str) -> Path:
    """Return the file `name` that lies beside a folder or, where the folder is a link, beside its target.

    The folder may be ``.``, whose parent a path alone does not tell.
    """
    here = Path(os.path.abspath(folder)).parent / name
    return here if here.exists() else folder.resolve().parent / name


def split_json(folder: Path, name: str) -> Path:
    """Return where the split json of a folder of images lies: beside it, or in ``data_splits`` there or one higher.

    The last two are for trees made for TPT. Where there is none, the first place is returned.
    """
    parent = Path(os.path.abspath(folder)).parent
    places = (beside(folder, name), parent / "data_splits" / name, parent.parent / "data_splits" / name)
    return next((place for place in places if place.is_file()), places[0])


def stable_id(path: str) -> str:
    """Turn a path below the data set's folder into an id: forward slashes, and no bytes that are not UTF-8."""
    return os.fsencode(path.replace(os.sep, "/")).decode("utf-8", "backslashreplace")


def read_rgb(path: str | Path) -> Image.Image:
    """Decode a picture of a data set as RGB, the way published evaluations do.

    See `apm.images.load.load_image` on what that means. Up to twice `MAX_PIXELS` are decoded, Pillow's own limit there.

    Raises:
        ImageError: the file is missing, unreadable, damaged, no picture or a mere strip; the message names it.
    """
    return load_image(path, max_pixels=2 * MAX_PIXELS, as_published=True).image
