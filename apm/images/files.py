"""Files that are there whole or not at all, whatever happens to the process that writes them."""

from __future__ import annotations

import errno
import json
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

import filelock

from apm.errors import ApmError, UsageError
from apm.images.paths import printable


class WriteError(ApmError):
    """A file cannot be written. What was there before still is.

    Attributes:
        reason: why, in a few words: "the disk is full".
    """

    def __init__(self, path: str | os.PathLike[str], error: OSError) -> None:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        self.reason = "the disk is full" if full else str(error.strerror or error)
        super().__init__(
            f"Cannot write {printable(path)}: {self.reason}. What was written before is whole: "
            f"{'free some space and ' if full else ''}run the same command again to continue."
        )


def read_json_lines(path: str | os.PathLike[str]) -> list[Any]:
    """Read a file that grows by a JSON line at a time; a last line that a kill cut off is left out.

    Raises:
        ValueError: another line is no JSON.
    """
    content = Path(path).read_bytes()
    return [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]


def write_atomically(
    path: str | os.PathLike[str],
    content: bytes | Callable[[BinaryIO], object],
    *,
    staging: Path | None = None,
    private: bool = False,
) -> Path:
    """Write a file under a temporary name, then put it in place: readers see the old file, the new one, or none.

    The folder of `path` is made if it is not there. The content reaches the disk before it takes the file's name.

    Args:
        path: the file.
        content: its bytes, or a function that writes them to an open file.
        staging: an existing folder of the same file system for the temporary file; None: that of `path`. It is not
            made: whoever removes it makes every write through it fail.
        private: nobody but this user may read or write the file; else the umask says who may.

    Raises:
        WriteError: the folder cannot be written, or the disk is full. What was at `path` is still there then.
    """
    path = Path(path)
    with writing(path):
        if staging is None:
            path.parent.mkdir(parents=True, exist_ok=True)
        temporary = (staging or path.parent) / f".{path.name[:32]}-{uuid.uuid4().hex[:12]}.part"
        with open(temporary, "xb", opener=_open_private if private else None) as file:
            try:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    content(file)
                file.flush()
                os.fsync(file.fileno())
                if staging is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(temporary, path)
            except BaseException:
                with suppress(OSError):
                    temporary.unlink()
                raise
        _flush_folder(path.parent)
    return path


def is_private(file: IO[bytes]) -> bool:
    """Whether an open file is this user's own (or the administrator's) and nobody else may write it.

    Where there are no owners, as on Windows, the answer is yes.
    """
    if not hasattr(os, "geteuid"):
        return True
    status = os.fstat(file.fileno())
    return status.st_uid in (os.geteuid(), 0) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an OSError of the body, which writes to `path`, into a `WriteError` for people."""
    try:
        yield
    except OSError as error:
        raise WriteError(path, error) from error


def make_folder(path: str | os.PathLike[str]) -> None:
    """Make a folder that the user named, and those above it.

    Raises:
        UsageError: it cannot be made, or is a file.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = error.strerror or error
        raise UsageError(f"Cannot write to {printable(path)}: {why}. Give another folder with --out.") from error


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _flush_folder(folder: Path) -> None:
    """Let a rename reach the disk; some systems and network drives cannot, and the file is in place all the same."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def alone_with(path: str | os.PathLike[str], doing: str) -> Iterator[None]:
    """Hold a file's lock, which is a file beside it; the folder is made if need be.

    Args:
        path: the file.
        doing: what another process does with it then, for the message: "training".

    Raises:
        UsageError: another process has it.
        WriteError: the folder cannot be written.
    """
    path = Path(path)
    lock = filelock.FileLock(path.with_name(path.name + ".lock"), timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = lock.acquire()
    except filelock.Timeout:  # an OSError too
        raise UsageError(f"Another process is {doing} {printable(path)}.") from None
    except OSError as error:
        raise WriteError(path, error) from error
    with held:
        yield
