"""What stands beside every recorded number: commit, versions, hardware, threads."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from apm.images.files import write_atomically

_DISTRIBUTIONS = (
    "apm",
    "torch",
    "open_clip_torch",
    "timm",
    "numpy",
    "pillow",
    "scikit-image",
    "opencv-python-headless",
    "pyarrow",
)


def git_commit() -> str | None:
    """The commit of the checkout that this code runs from, None outside of one; ``+changes`` where files differ."""
    try:
        commit = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changed else "")


def describe(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Describe code and machine, as plain JSON values."""
    device = torch.device(device)
    versions = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "git_commit": git_commit(),
        "versions": versions,
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
    }


def peak_memory(device: torch.device) -> int:
    """Return the most memory in bytes that this process has held so far.

    On a GPU it is what torch had in use there at once, without what its allocator keeps in reserve; else all resident.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), *arguments],
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout.strip()


def _processor() -> str:
    """The processor's name as Linux gives it, else what Python knows."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def write_record(record: Mapping[str, Any], out: Path | None) -> None:
    """Put a measurement's record into a file, whole or not at all; without one, print it."""
    text = json.dumps(record, indent=1) + "\n"
    if out is None:
        print(text, end="")
    else:
        write_atomically(out, text.encode())
