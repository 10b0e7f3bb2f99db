"""From what a user names on a command line to files, and file names as text that any terminal can show."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from apm.errors import UsageError

EXTENSIONS = frozenset(
    {
        ".avif",
        ".bmp",
        ".gif",
        ".jfif",
        ".jp2",
        ".jpe",
        ".jpeg",
        ".jpg",
        ".pgm",
        ".png",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    }
)
"""What counts as an image inside a folder. A file named directly is read whatever its name."""


def expand_paths(arguments: Sequence[str | os.PathLike[str]], stdin: Iterable[bytes] = ()) -> Iterator[Path]:
    """Yield the files that command line arguments stand for, in order, without holding a list of them.

    A folder gives the images in it and below it, sorted, hidden ones left out; a pattern its sorted matches; ``-`` one
    path a line of `stdin`. What leads to no file is yielded as it is, so that `load_image` can say what is wrong
    with it in its place.

    Args:
        arguments: files, folders, glob patterns (``**`` included), ``-``.
        stdin: lines of bytes, read only when ``-`` is among the arguments; blank ones are skipped.

    Raises:
        UsageError: an argument is empty.
    """
    for argument in [os.fspath(one) for one in arguments]:
        if not argument:
            raise UsageError("An empty path was given; the shell variable it came from may not be set.")
        if argument == "-":
            for line in stdin:
                name = os.fsdecode(line.rstrip(b"\r\n"))
                if name.strip():
                    yield from expand_paths(["./-" if name == "-" else name])
        elif os.path.isdir(argument):
            yield from _first_or(Path(argument), images_below(argument))
        elif glob.has_magic(argument) and not os.path.lexists(argument):
            yield from _first_or(Path(argument), _matches(argument))
        else:
            yield Path(argument)


def images_below(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the images in and below a folder, sorted, hidden ones left out; then the folders that could not be read."""
    unreadable: list[Path] = []
    for here, folders, files in os.walk(folder, onerror=lambda error: unreadable.append(Path(error.filename))):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS:
                yield Path(here, name)
    yield from unreadable


def file_problem(path: Path) -> str | None:
    """Say in a few words why there is no file to read at `path`; None where there is one, whatever is in it."""
    if "\0" in str(path):
        return "no such file (a null character is in its name)"
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            with os.scandir(path):  # a closed folder is another cause than an empty one
                pass
            return "a folder, not an image" if any(images_below(path)) else "a folder without images"
    except FileNotFoundError:
        if os.path.islink(path):
            return "a link to a file that is not there"
        return "no file matches this pattern" if glob.has_magic(str(path)) else "no such file"
    except PermissionError:
        return "not readable, permission denied"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    return None if status.st_size else "empty file"


def printable(path: str | os.PathLike[str]) -> str:
    """Return a path as one line of text that any terminal can show: control and undecodable characters are escaped."""
    text = os.fspath(path)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _matches(pattern: str) -> Iterator[Path]:
    seen: set[Path] = set()  # a/**/* matches both a/b and a/b/c.png, which is one image all the same
    for match in sorted(_glob(pattern)):
        for path in images_below(match) if os.path.isdir(match) else (Path(match),):
            if path not in seen:
                seen.add(path)
                yield path


def _glob(pattern: str) -> Iterator[str]:
    """Yield matches; ``**`` does not follow links to folders, which may lead round in circles (`glob.glob` would)."""
    parts = pattern.split("/")
    if "**" not in parts:
        yield from glob.iglob(pattern)
        return
    at = parts.index("**")
    base = "/".join(parts[:at]) or ("/" if at else os.curdir)
    rest = "/".join(part for part in parts[at + 1 :] if part != "**")
    for top in glob.iglob(base):
        if not rest:  # everything below
            yield top
            continue
        for here, folders, _ in os.walk(top):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for match in glob.iglob(os.path.join(glob.escape(here), rest)):
                if not (os.path.islink(match) and os.path.isdir(match)):
                    yield match


def _first_or(fallback: Path, paths: Iterator[Path]) -> Iterator[Path]:
    """Yield `paths`, or `fallback` alone when there are none."""
    first = next(paths, fallback)
    yield first
    yield from paths
