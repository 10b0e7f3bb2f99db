"""Scripts that run in processes of their own, under torch's launcher or without it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.places import ROOT

HANG = 240
"""Seconds after which a process hangs, on however slow a machine."""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")


def start(script: str, folder: Path, *arguments: object, launcher: tuple[str, ...] = (), **how: Any) -> Any:
    """Start a script, put into `folder`, in a group of processes of its own; ``how`` is what `Popen` is told."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "worker.py"
    file.write_text(script)
    return subprocess.Popen(
        [sys.executable, *launcher, str(file), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        **how,
    )


@contextmanager
def running(command: list[str], **how: Any) -> Iterator[Any]:
    """Run a command beside a test; ``how`` is what `Popen` is told. Where the block fails it is killed."""
    with subprocess.Popen(command, cwd=ROOT, **how) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def finish(script: str, folder: Path, *arguments: object, launcher: tuple[str, ...] = ()) -> int:
    """Run a script to its end, or to where it kills itself; returns its exit code."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = start(script, folder, *arguments, launcher=launcher, **pipes)
    try:
        output, _ = process.communicate(timeout=HANG)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)  # with its workers
        process.communicate()
        raise
    assert process.returncode in (0, -signal.SIGKILL), output
    return int(process.returncode)
