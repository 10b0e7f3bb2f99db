"""Where the seconds of a cold start go: `apm --help`, and one photograph in a process of its own."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from functools import partial

import torch

from .children import apm, must_run
from .kind import PHOTOGRAPH, kind, photograph_of
from .options import Options, Record
from .timing import repeated, spread

PACKAGES = 10
"""Packages whose imports are listed, those that take longest."""

# Run by a bare interpreter; what `apm classify` does, in its order, with a look at the clock in between.
_CHILD = """
import json, sys, time
name, path, preset = sys.argv[1:]
spans, last = {}, time.perf_counter()
def mark(stage):
    global last
    now = time.perf_counter()
    spans[stage], last = now - last, now
from apm.startup import collector_paused, for_one_command, import_open_clip
for_one_command()
with collector_paused():
    import torch; mark("import torch")
import apm.cli.main, apm.cli.classify, apm.classifier; mark("import apm's own modules")
from apm.labels import label_set, prompt_templates
from apm.text.zeroshot import ZeroShotHead
import_open_clip()
import apm.teachers.openclip; mark("import open_clip, timm, torchvision")
teacher = apm.classifier.load_teacher(name); mark("load the teacher")
labels = teacher.default_labels or label_set("imagenet")
ZeroShotHead.build(teacher, labels, teacher.default_templates or prompt_templates("single")); mark("text features")
from apm.student.matmul import measured_precision
measured_precision(torch.device("cpu")); mark("choose the precision")
classifier = apm.classifier.Classifier(teacher, labels=list(dict.fromkeys(labels)), device="cpu",
                                       student=apm.StudentOptions(preset=preset)); mark("draw the student")
(answer,) = classifier.classify([path]); mark("decode, teacher, readout")
if answer.error is not None:
    sys.exit(answer.error)
spans["adaptation"] = answer.adaptation.seconds
spans["decode, teacher, readout"] -= spans["adaptation"]
print(json.dumps(spans))
"""


@kind(
    (lambda record: [row for row in record["rows"] if not row["stage"]], "| command | time |\n| {what} | {seconds} |"),
    (lambda record: [row for row in record["rows"] if row["stage"]], "| its stages | time |\n| {what} | {seconds} |"),
    (
        lambda record: [{"package": name, "seconds": own} for name, own in record["summary"]["imports"].items()],
        """
        | imported (python -X importtime, which is slower) | its own modules |
        | `{package}`                                      | {seconds:m3} ms |
        """,
    ),
    title="A cold start",
    shared={"teacher": "embedded"},
    own=PHOTOGRAPH,
    rounds=3,
    on_cpu=True,
)
def startup(options: Options) -> Record:
    """Where the seconds of a cold start go: of `apm --help`, and of `apm classify PHOTOGRAPH` without caches of ours.

    Files are in the system's cache from the second repetition on: what is measured is work, not the disk.
    """
    photograph, teacher, preset = photograph_of(options), options.teacher, options.of_commands
    classify = apm("classify", photograph, "--teacher", teacher, "--preset", preset, "--device", "cpu")
    rows = []
    for name, command in {"apm --help": apm("--help"), "apm classify (all of it, cold)": classify}.items():
        times = repeated(partial(must_run, command), torch.device("cpu"), options.rounds)
        rows.append({"what": name, "stage": False, "seconds": spread(times)})
    child = [sys.executable, "-c", _CHILD, teacher, str(photograph), preset]
    spans = [json.loads(must_run(child).stdout.splitlines()[-1]) for _ in range(options.rounds)]
    rows += [{"what": stage, "stage": True, "seconds": spread([span[stage] for span in spans])} for stage in spans[0]]
    listing = must_run([sys.executable, "-X", "importtime", *classify[1:], "--steps", "1"]).stderr
    return options.found(rows, {"imports": dict(by_package(listing).most_common(PACKAGES))}, teacher=teacher)


def by_package(listing: str) -> Counter[str]:
    """Sum up what ``-X importtime`` printed, in microseconds for each module: seconds by top-level package."""
    seconds: Counter[str] = Counter()
    for own, module in re.findall(r"^import time: +(\d+) \| +\d+ \| +(\S+)$", listing, flags=re.MULTILINE):
        seconds[module.partition(".")[0]] += int(own) / 1e6  # type: ignore[assignment]
    return seconds
