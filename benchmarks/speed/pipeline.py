"""How the cost of whole answers grows: with the labels, the images and the processes. Files in, answers out."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
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

from .children import many, must_run
from .kind import Given, Kind, some
from .options import Options, images_and_targets
from .plots import column, curves, from_zero
from .tables import shown
from .timing import interleaved, seconds, spread

CHECKPOINTS = (10, 30, 100, 300, 1000, 3000, 10_000)
LABELS_OF_IMAGES = 10
PHOTOGRAPH = (500, 375)
"""Width and height of the JPEG that is decoded, the usual size in ImageNet."""


def sweep_labels(options: Options, teacher: Teacher, counts: Sequence[int], *, steps: int) -> dict[str, Any]:
    """Seconds of one answer against the number of labels, and of their text features, which are made once."""
    with _photograph() as path, _empty_cache():
        works, text_seconds = {}, {}
        for count in counts:
            labels = [f"object number {index}" for index in range(count)]
            encode = partial(ZeroShotHead.build, teacher, labels, prompt_templates("single"))
            text_seconds[count] = seconds(encode, options.device)
            works[str(count)] = partial(_classifier(options, teacher, labels, steps), path)
        times = interleaved(works, options.device, options.rounds)
    rows = [
        {
            "labels": count,
            "seconds": spread(times[str(count)]),
            "text_seconds": text_seconds[count],
            "head_bytes": 4 * count * teacher.dim,
        }
        for count in counts
    ]
    return options.found(rows, teacher=teacher.identity, steps=steps)


def sweep_images(options: Options, teacher: Teacher, checkpoints: Sequence[int], *, steps: int) -> dict[str, Any]:
    """Throughput and memory in one long stream of files, looked at after so many images.

    Throughput is that since the checkpoint before; memory is that of the process at this moment.
    """
    rows: list[dict[str, Any]] = []
    with _photograph() as path:
        classifier = _classifier(options, teacher, [f"object {i}" for i in range(LABELS_OF_IMAGES)], steps)
        classifier(path)
        begun = last = time.perf_counter()
        done = 0
        for number, answer in enumerate(classifier.classify(repeat(path, checkpoints[-1])), start=1):
            if answer.error is not None:
                raise ApmError(answer.error)
            if number in checkpoints:
                now = time.perf_counter()
                rate = (number - done) / (now - last)
                row = {"images": number, "seconds": now - begun, "images_per_second": rate}
                rows.append({**row, "resident_bytes": resident_bytes()})
                last, done = now, number
    return options.found(rows, teacher=teacher.identity, steps=steps)


def sweep_processes(options: Options, counts: Sequence[int], *, images: int, steps: int) -> dict[str, Any]:
    """Images a second of one machine's processes under torch's launcher, which share its cores evenly."""
    rows = []
    for count in counts:
        threads = max(1, (os.cpu_count() or 1) // count)
        values = [_launch(options, count, threads, images, steps) for _ in range(options.rounds)]
        rate = spread([images / value for value in values])
        rows.append({"processes": count, "threads": threads, "seconds": spread(values), "images_per_second": rate})
    return options.found(rows, images=images, steps=steps)


def work_as_one_of_many(given: Given) -> float | None:
    """One process's part of `sweep_processes`: adapt every W-th image, between two barriers.

    Returns:
        The seconds that all took together, in the first process; None in the others.
    """
    options = Options.of(given)
    adapt = AdaptConfig(steps=given.steps, precision=options.precision)
    with join() as group:
        part = len(range(group.rank, given.limit, group.world))
        trainer = TestTimeTrainer(options.config, adapt, device=options.device)
        inputs, targets = images_and_targets(options.config, max(part, 1), options.device)
        trainer.adapt(inputs[:1], targets[:1])
        group.barrier()
        begun = time.perf_counter()
        if part:
            trainer.adapt(inputs, targets)
        group.barrier()
        return time.perf_counter() - begun if group.first else None


def _launch(options: Options, count: int, threads: int, images: int, steps: int) -> float:
    told = {
        "device": options.device,
        "preset": options.preset,
        "dim": options.dim,
        "precision": options.chosen_precision,
        "images": images,
        "steps": steps,
    }
    arguments = [f"--{name}={value}" for name, value in told.items()] + ["--quick"] * options.quick
    done = must_run(many(count, __package__, "worker", *arguments), threads=threads)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("{"))
    return float(json.loads(line)["seconds"])


def resident_bytes() -> int | None:
    """Memory of this process now; None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _classifier(options: Options, teacher: Teacher, labels: Sequence[str], steps: int) -> Classifier:
    return Classifier(
        teacher,
        labels=labels,
        prompts="single",
        student=StudentOptions(
            preset="small" if options.quick else options.preset,
            readout=options.readout,
            steps=steps,
            precision=options.precision,
            queries="all",
        ),
        device=str(options.device),
    )


@contextmanager
def _empty_cache() -> Iterator[None]:
    """Keep text features in a folder of their own, empty at first, and not among the user's."""
    before = os.environ.get("APM_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["APM_CACHE"] = folder
        try:
            yield
        finally:
            del os.environ["APM_CACHE"]
            if before is not None:
                os.environ["APM_CACHE"] = before


@contextmanager
def _photograph() -> Iterator[Path]:
    """A JPEG of smooth noise in a temporary folder."""
    width, height = PHOTOGRAPH
    small = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photograph.jpg"
        Image.fromarray(small).resize(PHOTOGRAPH, Image.Resampling.BICUBIC).save(path, quality=90)
        yield path


def _measure_labels(given: Given) -> dict[str, Any]:
    teacher = load_teacher(given.teacher, device=given.device)
    return sweep_labels(Options.of(given), teacher, some(given, (10, 100, 1000, 10_000)), steps=given.steps)


def _measure_images(given: Given) -> dict[str, Any]:
    teacher = load_teacher(given.teacher, device=given.device)
    checkpoints = [count for count in CHECKPOINTS if count < given.limit] + [given.limit]
    return sweep_images(Options.of(given), teacher, checkpoints, steps=given.steps)


def _plot_images(figure: Any, record: Mapping[str, Any]) -> None:
    left, right = figure.subplots(1, 2)
    left.plot(column(record["rows"], "images"), column(record["rows"], "images_per_second"), "o-")
    left.set(xlabel="images so far", ylabel="images/s", xscale="log")
    known = [row for row in record["rows"] if row["resident_bytes"] is not None]
    right.plot(column(known, "images"), [row["resident_bytes"] / 1e6 for row in known], "o-")
    right.set(xlabel="images so far", ylabel="memory of the process, MB", xscale="log")
    from_zero(left.yaxis, right.yaxis)


LABELS = Kind(
    name="labels",
    question="against the number of labels",
    title="Time against the number of labels",
    shared={"teacher": "embedded", "steps": 20},
    measure=_measure_labels,
    table=shown(
        {
            "labels": "labels",
            "one answer": "seconds",
            "text features, once": lambda row: f"{row['text_seconds']:.2f} s",
            "held": lambda row: f"{row['head_bytes'] / 1e6:.1f} MB",
        },
        "An answer: decoding, teacher, {steps} steps, ranking.",
    ),
    plot=curves("labels", {"seconds": "one answer", "text_seconds": "text features, once"}, xlabel="labels", log=True),
)
IMAGES = Kind(
    name="images",
    question="one long stream: throughput and memory",
    title="A long stream of images",
    shared={"teacher": "embedded", "steps": 2, "limit": CHECKPOINTS[-1]},
    measure=_measure_images,
    table=shown(
        {
            "images so far": "images",
            "time so far": lambda row: f"{row['seconds']:.1f} s",
            "images/s since the row above": lambda row: f"{row['images_per_second']:.2f}",
            "memory of the process": (
                lambda row: "–" if row["resident_bytes"] is None else f"{row['resident_bytes'] / 1e6:,.0f} MB"
            ),
        },
        "Files to answers, {steps} steps each, in one stream.",
    ),
    plot=_plot_images,
)
PROCESSES = Kind(
    name="processes",
    question="processes under torch's launcher",
    title="Processes",
    shared={"steps": 20, "limit": 32},
    measure=lambda given: sweep_processes(
        Options.of(given), some(given, (1, 2, 4)), images=given.limit, steps=given.steps
    ),
    table=shown(
        {
            "processes": "processes",
            "threads each": "threads",
            "time": "seconds",
            "images/s": lambda row: f"{row['images_per_second']['median']:.2f}",
        },
        "{images} images of {steps} steps under `torchrun`; start-up is not counted.",
    ),
    plot=curves("processes", {"images_per_second": ""}, xlabel="processes", ylabel="images/s"),
    rounds=3,
)
