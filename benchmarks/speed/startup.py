"""Where the seconds of a cold start go: `apm --help`, and one photograph in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from apm.errors import ApmError

from .options import Options
from .record import Recorder
from .timing import seconds, spread

PACKAGES = 10
"""Packages whose imports are listed, those that take longest."""

STAGES = (
    "import torch",
    "import apm's own modules",
    "import open_clip, timm, torchvision",
    "load the teacher",
    "text features",
    "choose the precision",
    "draw the student",
    "decode, teacher, readout",
    "adaptation",
)

# Run by a bare interpreter; what `apm classify` does, in its order, with a look at the clock in between.
_CHILD = """
import json, sys, time
name, path, preset = sys.argv[1:]
marks = [time.perf_counter()]
def mark():
    marks.append(time.perf_counter())
from apm.startup import collector_paused, for_one_command, import_open_clip
for_one_command()
with collector_paused():
    import torch; mark()
import apm.cli.main, apm.cli.classify, apm.classifier; mark()
from apm.labels import label_set, prompt_templates
from apm.text.zeroshot import ZeroShotHead
import_open_clip()
import apm.teachers.openclip; mark()
teacher = apm.classifier.load_teacher(name); mark()
labels = teacher.default_labels or label_set("imagenet")
ZeroShotHead.build(teacher, labels, teacher.default_templates or prompt_templates("single")); mark()
from apm.student.matmul import measured_precision
measured_precision(torch.device("cpu")); mark()
classifier = apm.classifier.Classifier(teacher, labels=list(dict.fromkeys(labels)), device="cpu",
                                       student=apm.StudentOptions(preset=preset)); mark()
answer = classifier(path); mark()
spans = [b - a for a, b in zip(marks, marks[1:])]
spans[-1] -= answer.adaptation.seconds
print(json.dumps([*spans, answer.adaptation.seconds]))
"""


def measure_startup(options: Options, photograph: Path, *, teacher: str = "embedded") -> dict[str, Any]:
    """Record the seconds of `apm --help` and of `apm classify PHOTOGRAPH` without any cache of ours, and its stages.

    Files are in the system's cache from the second repetition on: what is measured is work, not the disk.
    """
    cpu = torch.device("cpu")
    recorder = Recorder("startup", options.record(teacher=teacher), cpu)
    preset = "small" if options.quick else options.preset
    classify = ("classify", str(photograph), "--teacher", teacher, "--preset", preset, "--device", "cpu")
    commands = {"apm --help": ("--help",), f"apm {classify[0]} (all of it, cold)": classify}
    rows: list[dict[str, Any]] = []
    for name, arguments in commands.items():
        times = [_timed([sys.executable, "-m", "apm", *arguments], cpu) for _ in range(options.rounds + 1)]
        rows.append({"what": name, "stage": False, "seconds": spread(times[1:])})
    runs = [_run([sys.executable, "-c", _CHILD, teacher, str(photograph), preset]) for _ in range(options.rounds)]
    spans = [json.loads(run.splitlines()[-1]) for run in runs]
    rows += [
        {"what": stage, "stage": True, "seconds": spread([span[number] for span in spans])}
        for number, stage in enumerate(STAGES)
    ]
    imports = _import_seconds([sys.executable, "-X", "importtime", "-m", "apm", *classify, "--steps", "1"])
    return recorder.finish(rows, {"imports": dict(imports[:PACKAGES])})


def _timed(command: Sequence[str], device: torch.device) -> float:
    return seconds(lambda: _run(command), device)


def _import_seconds(command: Sequence[str]) -> list[tuple[str, float]]:
    """Seconds that each package's own modules took to import, longest first."""
    return by_package(_done(command).stderr)


def by_package(listing: str) -> list[tuple[str, float]]:
    """Sum up what ``-X importtime`` printed, in microseconds for each module, by top-level package."""
    seconds: dict[str, float] = defaultdict(float)
    for own, module in re.findall(r"^import time: +(\d+) \| +\d+ \| +(\S+)$", listing, flags=re.MULTILINE):
        seconds[module.partition(".")[0]] += int(own) / 1e6
    return sorted(seconds.items(), key=lambda one: -one[1])


def _run(command: Sequence[str]) -> str:
    """Run a command with an empty cache of text features; return its stdout."""
    return _done(command).stdout


def _done(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "APM_CACHE": cache}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ApmError(f"{' '.join(command[:4])} … failed:\n{done.stderr[-2000:]}")
    return done
