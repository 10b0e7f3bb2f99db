"""How the cost of whole answers grows: with the labels, the images and the processes. Files in, answers out."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from apm.classifier import Classifier
from apm.errors import ApmError
from apm.labels import prompt_templates
from apm.processes import join
from apm.teachers import load_teacher
from apm.teachers.base import Teacher
from apm.test_time.options import AdaptConfig, StudentOptions
from apm.test_time.trainer import TestTimeTrainer
from apm.text.zeroshot import ZeroShotHead

from ..studies.study import numbers
from .children import many, must_run
from .kind import argument, kind
from .options import Options, Record, images_and_targets
from .plots import curves
from .timing import interleaved, seconds, spread

CHECKPOINTS = (10, 30, 100, 300, 1000, 3000, 10_000)
PHOTOGRAPH = (500, 375)
"""Width and height of the JPEG that is decoded, the usual size in ImageNet."""


@kind(
    """
    | labels   | one answer | text features, once  | held                  |
    | {labels} | {seconds}  | {text_seconds:.2f} s | {head_bytes:M.1f} MB  |

    An answer: decoding, teacher, {steps} steps, ranking.
    """,
    title="Time against the number of labels",
    shared={"teacher": "embedded", "steps": 20},
    panels=[curves("labels", {"seconds": "one answer", "text_seconds": "text features, once"}, log=True)],
)
def labels(options: Options) -> Record:
    """Seconds of one answer against the number of labels, and of their text features, which are made once."""
    teacher = load_teacher(options.teacher, device=options.device)
    works, text_seconds = {}, {}
    with _photograph() as path, tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, APM_CACHE=cache):
        for count in options.some((10, 100, 1000, 10_000)):
            labels = [f"object number {index}" for index in range(count)]
            encode = partial(ZeroShotHead.build, teacher, labels, prompt_templates("single"))
            text_seconds[count] = seconds(encode, options.device)
            works[count] = partial(_classifier(options, teacher, labels), path)
        times = interleaved(works, options.device, options.rounds)
    rows: list[Record] = []
    for count, found in times.items():
        row = {"labels": count, "seconds": spread(found), "text_seconds": text_seconds[count]}
        rows.append({**row, "head_bytes": 4 * count * teacher.dim})
    return options.found(rows, teacher=teacher.identity, steps=options.steps)


@kind(
    """
    | images so far | time so far     | images/s since the row above | memory of the process      |
    | {images}      | {seconds:.1f} s | {images_per_second:.2f}      | {resident_bytes:M,.0f} MB  |

    Files to answers, {steps} steps each, in one stream.
    """,
    title="A long stream of images",
    shared={"teacher": "embedded", "steps": 2, "limit": CHECKPOINTS[-1]},
    panels=[
        curves("images", {"images_per_second": ""}, "images so far", "images/s"),
        curves("images", {"resident_bytes": ""}, "images so far", "memory of the process, MB", unit=1e6),
    ],
)
def images(options: Options) -> Record:
    """Throughput and memory in one long stream of files, looked at after so many images.

    Throughput is that since the checkpoint before; memory is that of the process at this moment.
    """
    checkpoints = [count for count in CHECKPOINTS if count < options.limit] + [options.limit]
    rows: list[Record] = []
    teacher = load_teacher(options.teacher, device=options.device)
    classifier = _classifier(options, teacher, [f"object {number}" for number in range(10)])
    with _photograph() as path:
        classifier(path)
        begun = last = time.perf_counter()
        done = 0
        for number, answer in enumerate(classifier.classify(repeat(path, options.limit)), start=1):
            if answer.error is not None:
                raise ApmError(answer.error)
            if number in checkpoints:
                now = time.perf_counter()
                row = {"images": number, "seconds": now - begun, "images_per_second": (number - done) / (now - last)}
                rows.append({**row, "resident_bytes": resident_bytes()})
                last, done = now, number
    return options.found(rows, teacher=teacher.identity, steps=options.steps)


@kind(
    """
    | processes   | threads each | time      | images/s                |
    | {processes} | {threads}    | {seconds} | {images_per_second:.2f} |

    {images} images of {steps} steps under `torchrun`; start-up is not counted.
    """,
    title="Processes",
    shared={"steps": 20, "limit": 32},
    own=argument("--processes", "1,2,4", type=numbers, default=[1, 2, 4]),
    panels=[curves("processes", {"images_per_second": ""}, ylabel="images/s")],
    rounds=3,
)
def processes(options: Options) -> Record:
    """Images a second of one machine's processes under torch's launcher, which share its cores evenly."""
    told = {name: getattr(options, name) for name in ("preset", "quick", "limit", "steps")}
    told |= {"device": str(options.device), "precision": options.chosen_precision}
    rows = []
    for count in options.some(options.processes):
        threads = max(1, (os.cpu_count() or 1) // count)
        command = many(count, f"{__package__}.pipeline", json.dumps(told))
        values = np.array([float(must_run(command, threads=threads).stdout) for _ in range(options.rounds)])
        row = {"processes": count, "threads": threads, "seconds": spread(values)}
        rows.append({**row, "images_per_second": spread(options.limit / values)})
    return options.found(rows, images=options.limit, steps=options.steps)


def work_as_one_of_many(options: Options) -> float | None:
    """One process's part of `sweep_processes`: adapt every W-th image, between two barriers.

    Returns:
        The seconds that all took together, in the first process; None in the others.
    """
    adapt = AdaptConfig(steps=options.steps, precision=options.precision)
    with join() as group:
        part = len(range(group.rank, options.limit, group.world))
        trainer = TestTimeTrainer(options.config, adapt, device=options.device)
        inputs, targets = images_and_targets(options.config, max(part, 1), options.device)
        trainer.adapt(inputs[:1], targets[:1])
        group.barrier()
        begun = time.perf_counter()
        if part:
            trainer.adapt(inputs, targets)
        group.barrier()
        return time.perf_counter() - begun if group.first else None


def resident_bytes() -> int | None:
    """Memory of this process now; None where the system does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else None


def _classifier(options: Options, teacher: Teacher, labels: Sequence[str]) -> Classifier:
    student = StudentOptions(
        preset=options.of_commands, steps=options.steps, precision=options.precision, queries="all"
    )
    return Classifier(teacher, labels=labels, prompts="single", student=student, device=str(options.device))


@contextmanager
def _photograph() -> Iterator[Path]:
    """A JPEG of smooth noise in a temporary folder."""
    width, height = PHOTOGRAPH
    small = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photograph.jpg"
        Image.fromarray(small).resize(PHOTOGRAPH, Image.Resampling.BICUBIC).save(path, quality=90)
        yield path


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    taken = work_as_one_of_many(Options(**{**given, "device": torch.device(given["device"])}))
    if taken is not None:
        print(taken)
