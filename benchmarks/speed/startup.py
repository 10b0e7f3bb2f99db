"""Where the seconds of a cold start go: `apm --help`, and one photograph in a process of its own."""

from __future__ import annotations

import json
import re
import sys
from argparse import ArgumentParser
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from .children import must_run
from .kind import Given, Kind
from .options import Options
from .tables import digits, table
from .timing import repeated, spread

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
    preset = "small" if options.quick else options.preset
    classify = ("classify", str(photograph), "--teacher", teacher, "--preset", preset, "--device", "cpu")
    commands = {"apm --help": ("--help",), f"apm {classify[0]} (all of it, cold)": classify}
    rows: list[dict[str, Any]] = []
    for name, arguments in commands.items():
        command = [sys.executable, "-m", "apm", *arguments]
        times = repeated(lambda command=command: must_run(command), cpu, options.rounds)  # type: ignore[misc]
        rows.append({"what": name, "stage": False, "seconds": spread(times)})
    child = [sys.executable, "-c", _CHILD, teacher, str(photograph), preset]
    spans = [json.loads(must_run(child).stdout.splitlines()[-1]) for _ in range(options.rounds)]
    rows += [
        {"what": stage, "stage": True, "seconds": spread([span[number] for span in spans])}
        for number, stage in enumerate(STAGES)
    ]
    listing = must_run([sys.executable, "-X", "importtime", "-m", "apm", *classify, "--steps", "1"]).stderr
    return options.found(rows, {"imports": dict(by_package(listing)[:PACKAGES])}, teacher=teacher)


def by_package(listing: str) -> list[tuple[str, float]]:
    """Sum up what ``-X importtime`` printed, in microseconds for each module, by top-level package."""
    seconds: dict[str, float] = defaultdict(float)
    for own, module in re.findall(r"^import time: +(\d+) \| +\d+ \| +(\S+)$", listing, flags=re.MULTILINE):
        seconds[module.partition(".")[0]] += int(own) / 1e6
    return sorted(seconds.items(), key=lambda one: -one[1])


def photograph_of(given: Given) -> Path:
    """The file that was named, or scikit-image's cat."""
    if given.photograph is not None:
        return Path(given.photograph)
    import skimage

    return Path(skimage.__file__).parent / "data" / "chelsea.png"


def photograph_argument(parser: ArgumentParser) -> None:
    """Add ``--photograph``."""
    parser.add_argument("--photograph", type=Path, help="the file (default: scikit-image's cat)")


def _table(record: dict[str, Any]) -> str:
    def part(title: str, *, stage: bool) -> str:
        return table({title: "what", "time": "seconds"}, [row for row in record["rows"] if row["stage"] is stage])

    columns = {
        "imported (python -X importtime, which is slower)": lambda row: f"`{row[0]}`",
        "its own modules": lambda row: f"{digits(1e3 * row[1])} ms",
    }
    imports = table(columns, record["summary"]["imports"].items())
    return f"{part('command', stage=False)}\n{part('its stages', stage=True)}\n{imports}"


STARTUP = Kind(
    name="startup",
    question="where the seconds of a cold start go",
    title="A cold start",
    shared={"teacher": "embedded"},
    arguments=photograph_argument,
    measure=lambda given: measure_startup(Options.of(given), photograph_of(given), teacher=given.teacher),
    table=_table,
    rounds=3,
    on_cpu=True,
)
