"""Command line of the speed measurements; see ``python -m apm.benchmarks.speed --help``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apm.classifier import pick_device
from apm.errors import UsageError
from apm.teachers import load_teacher

from ..studies.study import numbers, run
from .options import Options
from .record import write

RESULTS = Path("benchmarks/results")
DOCS = Path("docs")
KINDS = {
    "step": "one step: engine, plain form, published loop, optimiser, beside the machine's own floor (the default)",
    "steps": "against the number of steps",
    "grid": "against the side of the grid, trained and read",
    "patches": "against the number of patches queried",
    "batch": "against the students side by side",
    "labels": "against the number of labels",
    "images": "one long stream: throughput and memory",
    "processes": "processes under torch's launcher",
    "queries": "fewer queries a step, on real images: agreement, accuracy, seconds",
    "startup": "where the seconds of a cold start go",
    "tuning": "test-time prompt tuning with 1,000 class names, beside the published loop",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the record, print its table; returns the exit code."""
    given = parser().parse_args(arguments)
    progress, log = logging.StreamHandler(), logging.getLogger(__package__)  # to stderr
    log.addHandler(progress)
    log.setLevel(logging.INFO)
    try:
        return run(lambda: _do(given))
    finally:
        log.removeHandler(progress)


def _do(given: argparse.Namespace) -> int:
    if given.kind == "report":
        from .report import write_report

        for path in write_report(given.out, given.docs):
            print(path, file=sys.stderr)
    elif given.kind == "gpu":
        return _gpu(given)
    elif given.kind == "worker":
        from .pipeline import work_as_one_of_many

        seconds = work_as_one_of_many(_options(given), images=given.images or 32, steps=given.steps or 20)
        if seconds is not None:
            print(json.dumps({"seconds": seconds}))
    else:
        from .report import as_markdown

        record = measure(given)
        path = write(record, given.out)
        print(as_markdown(record))
        print(path, file=sys.stderr)
    return 0


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Make the record that the arguments ask for."""
    from . import fewer_queries, pipeline, scaling, startup, step, tuning

    options = _options(given)
    some = (lambda values: values[:2]) if given.quick else (lambda values: values)  # --quick: two points of each sweep
    steps = {} if given.steps is None else {"steps": given.steps}
    if given.kind == "step":
        return step.measure_step(options, published_rounds=given.published_rounds)
    if given.kind == "steps":
        return scaling.sweep_steps(options, some(scaling.STEPS))
    if given.kind == "grid":
        return scaling.sweep_grid(options, some(scaling.GRIDS), some(scaling.READOUTS))
    if given.kind == "patches":
        return scaling.sweep_patches(options)
    if given.kind == "batch":
        return scaling.sweep_batch(options, given.batches or some(scaling.BATCHES))
    if given.kind == "processes":
        images = {} if given.images is None else {"images": given.images}
        return pipeline.sweep_processes(options, some(pipeline.PROCESSES), **images, **steps)
    if given.kind == "tuning":
        return tuning.measure_tuning(options, rounds=given.rounds or 3)
    if given.kind == "startup":
        return startup.measure_startup(options, _photograph(given), teacher=given.teacher)
    teacher = load_teacher(given.teacher, device=options.device)
    if given.kind == "labels":
        return pipeline.sweep_labels(options, teacher, some(pipeline.LABELS), **steps)
    if given.kind == "images":
        last = given.images or pipeline.CHECKPOINTS[-1]
        checkpoints = [count for count in pipeline.CHECKPOINTS if count < last] + [last]
        return pipeline.sweep_images(options, teacher, checkpoints, **steps)
    from ..datasets import open_dataset

    dataset = open_dataset("folder", given.root, limit=given.images or 100)
    return fewer_queries.sweep_queries(options, teacher, dataset, given.counts, **steps)


def _gpu(given: argparse.Namespace) -> int:
    """Measure a GPU, write record and page, print one screen; 1 where something did not hold."""
    from . import gpu, gpu_report

    options = _options(given)
    if options.device.type != "cuda" and not given.quick:
        raise UsageError(
            "There is no CUDA GPU here, and nothing to measure without one. (On a CPU: --quick, as a test.)"
        )
    clone = Path(__file__).resolve().parents[2]
    tests = clone if (clone / "tests").is_dir() and not given.quick else None
    record = gpu.measure_gpu(options, _photograph(given), tests=tests)
    print(gpu_report.screen(record), end="")
    for path in gpu_report.write_gpu(record, given.out, given.docs):
        print(path, file=sys.stderr)
    return 1 if gpu.failures(record) else 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m apm.benchmarks.speed",
        description="Measure the student's speed against the machine's own floor, and write a record of it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="kinds:\n"
        + "\n".join(f"  {name:10} {text}" for name, text in KINDS.items())
        + "\n  gpu        everything about a GPU in a few minutes: checks, speed, commands (`make gpu`)"
        + "\n  report     make docs/speed.md and its plots from the records",
    )
    top.add_argument("kind", nargs="?", default="step", choices=[*KINDS, "gpu", "report", "worker"], metavar="KIND")
    top.add_argument("--out", type=Path, default=RESULTS, help="folder of the records (default: %(default)s)")
    top.add_argument("--docs", type=Path, default=DOCS, help="folder of the report (default: %(default)s)")
    top.add_argument("--preset", default="paper", help="size of the student: paper or small")
    top.add_argument("--dim", type=int, default=512, help="D, the token's width, where no teacher gives it")
    top.add_argument("--readout", default="query", choices=("query", "mean"))
    top.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="only this one is measured")
    top.add_argument("--device", default="auto", help="auto, cpu or cuda")
    top.add_argument("--rounds", type=int, help="repetitions (default: 9; 3 where each takes long)")
    top.add_argument("--published-rounds", type=int, default=2, help="rounds of the published loop; 0: leave it out")
    top.add_argument("--batch", type=int, help="students side by side (default: 1 on a CPU, 16 on a GPU)")
    top.add_argument("--batches", type=numbers, help="for batch: 1,2,4")
    top.add_argument("--counts", type=numbers, help="for queries: the numbers of locations, 64,256")
    top.add_argument("--images", type=int, help="for images, processes, queries: how many")
    top.add_argument("--steps", type=int, help="for labels, images, processes, queries: steps for each image")
    top.add_argument("--teacher", default="embedded", help="for labels, images, queries, startup")
    top.add_argument("--root", help="for queries: a folder with a folder of images for each class (default: APM_DATA)")
    top.add_argument("--photograph", type=Path, help="for startup: the file (default: scikit-image's cat)")
    top.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs; the numbers mean nothing")
    return top


def _options(given: argparse.Namespace) -> Options:
    for name in ("rounds", "batch", "images", "steps", "dim"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be 1 or more, not {value}.")
    device = pick_device(given.device)
    slow = given.kind in ("steps", "grid", "processes", "startup", "gpu")
    return Options(
        preset=given.preset,
        dim=given.dim,
        readout=given.readout,
        precision=given.precision,
        device=device,
        rounds=given.rounds or (2 if given.quick else 3 if slow else 9),
        batch=given.batch or (16 if device.type == "cuda" and not given.quick else 1),
        quick=given.quick,
    )


def _photograph(given: argparse.Namespace) -> Path:
    if given.photograph is not None:
        return Path(given.photograph)
    import skimage

    return Path(skimage.__file__).parent / "data" / "chelsea.png"


if __name__ == "__main__":
    sys.exit(main())
