"""Measurements in processes of their own: one command, or several processes under torch's launcher."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from apm.errors import ApmError

Done = subprocess.CompletedProcess[str]

_WATCH = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:], stdout=sys.stderr)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def run_apart(command: Sequence[str], *, threads: int | None = None, **how: Any) -> Done:
    """Run a command with an empty cache of text features; ``how`` is what `subprocess.run` is told besides."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "APM_CACHE": cache}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, **how)


def must_run(command: Sequence[str], *, threads: int | None = None) -> Done:
    """Run a command that must not fail; raises an `ApmError` with its last words where it does."""
    done = run_apart(command, threads=threads)
    if done.returncode:
        raise ApmError(f"{' '.join(command[:4])} … failed:\n{done.stderr[-2000:]}")
    return done


def peak_bytes(command: Sequence[str]) -> int:
    """The most memory that a command's process, which must not fail, had resident at a time.

    A small process of its own starts it: Linux charges a child with what its parent held when it was started.
    """
    held = int(must_run([sys.executable, "-c", _WATCH, *command]).stdout)
    return held * (1 if sys.platform == "darwin" else 1024)


def apm(*words: object) -> list[str]:
    """The command ``apm`` with these words."""
    return [sys.executable, "-m", "apm", *map(str, words)]


def many(processes: int, module: str, *arguments: str) -> list[str]:
    """The command of so many processes of a module under torch's launcher."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, "-m", module, *arguments]
