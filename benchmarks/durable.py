"""Writing that a crash or a full disk cannot leave half done."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from apm.errors import ApmError, UsageError


def make_folder(path: Path) -> None:
    """Make a folder and those above it; a `UsageError` says why where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"Cannot write to {path}: {error.strerror}. Give another folder with --out.") from None


def replace_durably(temporary: Path, final: Path, data: bytes) -> None:
    """Write `data` under a temporary name, flush it to the disk, and rename it: `final` is there whole or not."""
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself must reach the disk too
        directory = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


class explained:
    """Turn an OSError of the body into a sentence for people."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError):
            return
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "The disk is full" if full else f"Cannot write: {error.strerror or error}"
        raise ApmError(
            f"{what} ({self.path}). All rows written so far are whole: "
            f"{'free some space and ' if full else ''}run the same command again to continue."
        ) from None
