"""One writer at a time."""

from __future__ import annotations

from pathlib import Path

import filelock

from apm.errors import UsageError
from apm.images.files import make_folder

LOCK = ".lock"


def patience(world: int) -> float:
    """Seconds that one of `world` processes waits for a lock: a killed process gives its own back a little later."""
    return 10.0 if world > 1 else 2.0


def lock_folder(path: Path, timeout: float = 0, *, busy: str) -> filelock.BaseFileLock:
    """Take a folder for writing, and make it where it is not there; the system gives it back when the process ends.

    Args:
        path: the folder.
        timeout: seconds to wait for another process to let go.
        busy: who has it then, for the message.

    Raises:
        UsageError: another process has the folder, or it cannot be made or locked.
    """
    make_folder(path)
    lock = filelock.FileLock(path / LOCK, timeout=timeout)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UsageError(f"{busy} is writing to {path}. Wait for it, or give another folder with --out.") from None
    except (OSError, NotImplementedError) as error:  # no permission, or a file system without locks
        raise UsageError(
            f"Cannot lock {path}: {getattr(error, 'strerror', None) or error}. Give another folder with --out."
        ) from None
    return lock
