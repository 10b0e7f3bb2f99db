"""`make gpu`: all that can be said of a GPU in a few minutes: is it right, how fast is it, does all of it run.

Every part takes a device and runs on a CPU as well, in tests with tiny sizes; only the graph is a GPU's own.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from apm.classifier import Classifier
from apm.student.config import APMConfig
from apm.test_time.options import AdaptConfig, StudentOptions
from apm.test_time.trainer import TestTimeTrainer

from .children import many, run_apart
from .gpu_checks import Case, run_checks
from .machine import floor, rate_probe, stream_probe
from .options import Options, images_and_targets, loaded_engine
from .timing import interleaved, repeated, spread

log = logging.getLogger(__name__)

Row = dict[str, Any]

BUDGET = 480.0
"""Seconds for all parts together."""
BATCHES = (1, 2, 4, 8, 16, 32, 64)
STEPS = (1, 5, 10, 20, 50)
QUERIES = (16, 64, 256)
USUAL_STEPS = 20
LABELS = "cat,dog,rocket"


@dataclass(frozen=True)
class Clock:
    """Seconds that are left of the budget."""

    end: float

    @property
    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())


def measure_gpu(options: Options, photograph: Path, *, clone: Path | None) -> Row:
    """Run all parts, the important ones first, and record what they say.

    Args:
        options: device and sizes; with ``quick`` tiny ones.
        photograph: what `apm classify` is shown.
        clone: whose tests marked ``cuda`` are run; None: leave them out.

    Returns:
        What was found. Its rows are told apart by ``part``: tests, check, speed, classify, bench; a part that broke or
        found no time left has one row with an ``error``.
    """
    clock = Clock(time.monotonic() + BUDGET)
    parts: dict[str, Callable[[], Iterator[Row]]] = {
        "tests": lambda: _tests(clone, clock),
        "check": lambda: _checks(options),
        "speed": lambda: _speed(options),
        "classify": lambda: _classify(options, photograph, clock),
        "bench": lambda: _bench(options, clock),
    }
    rows: list[Row] = []
    for name, part in parts.items():
        if not clock.left:
            rows.append({"part": name, "name": name, "error": f"no time left of the {BUDGET:.0f} seconds"})
            continue
        log.info("%s … (%.0f s left)", name, clock.left)
        try:
            for row in part():
                rows.append({"part": name, **row})
        except Exception as error:  # what else works must still be told
            rows.append({"part": name, "name": name, "error": f"{type(error).__name__}: {error}"[:2000]})
    return options.found(rows, summary(rows), precision=options.precision, budget_seconds=BUDGET)


def failures(record: Mapping[str, Any]) -> list[str]:
    """What did not hold or did not run, a line each."""
    found = []
    for row in record["rows"]:
        if row.get("error"):
            found.append(f"{row['name']}: {row['error']}")
        elif row["part"] == "check" and not row["held"]:
            found.append(f"{row['name']} ({row['precision']}): {row['distance']} exceeds {row['limit']}")
    return found


def summary(rows: Sequence[Row]) -> Row:
    """The figures asked for first: how many checks hold, and the most images a second (usual steps, all locations)."""
    usual = [row for row in rows if row.get("sweep") == "batch"]
    best = max(usual, key=lambda row: row["images_per_second"]["median"], default=None)
    checks = [row for row in rows if row["part"] == "check"]
    return {
        "checks": len(checks),
        "checks_held": sum(bool(row.get("held")) for row in checks),
        "best": None
        if best is None
        else {name: best[name] for name in ("batch", "steps", "images_per_second", "ratio")},
    }


def _tests(root: Path | None, clock: Clock) -> Iterator[Row]:
    if root is None:
        return
    begun = time.monotonic()
    done = _run([sys.executable, "-m", "pytest", "-q", "-m", "cuda", str(root / "tests")], clock, cwd=root)
    last = done.stdout.strip().splitlines()[-1:] or [""]
    error = None if done.returncode == 0 and "passed" in last[0] else (done.stdout + done.stderr)[-2000:]
    yield {"name": "tests of the GPU", "said": last[0], "seconds": time.monotonic() - begun, "error": error}


def _checks(options: Options) -> Iterator[Row]:
    """Tiny: enough for the arithmetic. Small and paper: the shapes that kernels are chosen for."""
    students = [options.config] if options.quick else [APMConfig.preset("small", dim=512), options.config]
    precisions: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    for precision in precisions:
        for config in students:
            steps = 10 if config.cells <= 256 else 4  # a CPU makes them too
            for row in run_checks(Case(config, precision, options.device, steps=steps)):
                yield {**row, "hidden": config.hidden[0]}


def _speed(options: Options) -> Iterator[Row]:
    """Seconds and images a second beside the floors, against students side by side, steps, locations, precision."""
    config, device = options.config, options.device
    batches, steps, queries = (BATCHES[:2], STEPS[:2], (2,)) if options.quick else (BATCHES, STEPS, QUERIES)
    probe_batch = 2 if options.quick else 16
    works, operations = {}, {}
    for name in ("fp32", "bf16"):
        run, operations[name] = rate_probe(config, name, probe_batch, device)
        works[name] = run
    stream, traffic = stream_probe(config, probe_batch, device)
    times = interleaved({**works, "memory": stream}, device, options.rounds)
    rates = {name: spread([operations[name] / value for value in times[name]]) for name in operations}
    bandwidth = spread([traffic / value for value in times["memory"]])
    for name, rate in rates.items():
        yield {"name": f"rate of products in {name}", "per_second": rate}
    yield {"name": "bandwidth of the memory", "per_second": bandwidth}
    del works, stream

    def bound(precision: str, queries: int | None = None) -> dict[str, float]:
        return floor(config, rate=rates[precision]["median"], bandwidth=bandwidth["median"], queries=queries)

    precision, usual = options.chosen_precision, 2 if options.quick else USUAL_STEPS
    largest = batches[0]
    for batch in batches:
        if not _fits(options, batch):
            yield {"name": f"{batch} students side by side", "said": "do not fit into the memory that is free"}
            break
        yield _timed(options, batch, usual, None, bound(precision), sweep="batch")
        largest = batch
    middle = min(largest, 16)
    for count in steps:
        yield _timed(options, middle, count, None, bound(precision), sweep="steps")
    for places in queries:
        yield _timed(options, middle, usual, places, bound(precision, places), sweep="queries")
    other: Literal["fp32", "bf16"] = "fp32" if precision == "bf16" else "bf16"
    yield _timed(options.but(precision=other), middle, usual, None, bound(other), sweep="precision")
    yield _through_the_trainer(options, min(largest, 32), usual)


def _fits(options: Options, batch: int) -> bool:
    if options.device.type != "cuda":
        return True
    torch.cuda.empty_cache()
    trainer = TestTimeTrainer(options.config, AdaptConfig(precision=options.chosen_precision), device=options.device)
    free, _ = torch.cuda.mem_get_info(options.device)
    return batch * trainer._bytes_per_student() < 0.9 * free


def _timed(
    options: Options, batch: int, steps: int, queries: int | None, bound: dict[str, float], *, sweep: str
) -> Row:
    """Adaptations of one batch that is on the device: reset, load, steps, readout; and single steps by themselves."""
    device = options.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    engine = loaded_engine(options.config, options.chosen_precision, device, batch=batch, queries=queries)
    images, targets = images_and_targets(options.config, batch, device)

    def adapt() -> None:
        engine.reset()
        engine.load(images, targets)
        engine.run(steps)

    def ten() -> None:
        for _ in range(10):
            engine.advance()

    adapt()  # captures the graph
    times = interleaved({"whole": adapt, "steps": ten}, device, options.rounds)
    step = [value / 10 / batch for value in times["steps"]]
    return {
        "name": "adaptation",
        "sweep": sweep,
        "batch": batch,
        "steps": steps,
        "queries": queries or options.config.cells,
        "precision": options.chosen_precision,
        "step_seconds": spread(step),  # of one student
        "floor": bound,
        "ratio": spread([value / bound["seconds"] for value in step]),
        "images_per_second": spread([batch / value for value in times["whole"]]),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def _through_the_trainer(options: Options, batch: int, steps: int) -> Row:
    """What a caller of `TestTimeTrainer.adapt` meets: images and targets come from the CPU, answers go back."""
    adapt = AdaptConfig(steps=steps, precision=options.chosen_precision)
    trainer = TestTimeTrainer(options.config, adapt, device=options.device, batch_size=batch)
    images, targets = images_and_targets(options.config, batch, torch.device("cpu"))
    times = repeated(lambda: trainer.adapt(images, targets), options.device, options.rounds)
    return {
        "name": "TestTimeTrainer.adapt, images from the CPU",
        "batch": batch,
        "steps": steps,
        "images_per_second": spread([batch / value for value in times]),
    }


def _classify(options: Options, photograph: Path, clock: Clock) -> Iterator[Row]:
    """`apm classify` in a process of its own, twice, and the classifier again and again in this one."""
    preset = "small" if options.quick else options.preset
    command = [sys.executable, "-m", "apm", "classify", str(photograph), "--teacher", "embedded", "--labels", LABELS]
    command += ["--preset", preset, "--device", str(options.device), "--json", "--quiet"]
    cold, answers = [], []
    for _ in range(1 if options.quick else 2):
        begun = time.monotonic()
        done = _run(command, clock)
        cold.append(time.monotonic() - begun)
        if done.returncode:
            raise RuntimeError(done.stderr[-1500:])
        answers.append(json.loads(done.stdout)["top"][0]["label"])
    classifier = Classifier(
        "embedded", labels=LABELS.split(","), student=StudentOptions(preset=preset), device=str(options.device)
    )
    answers.append(classifier(photograph).top[0].label)
    warm = repeated(lambda: classifier(photograph), options.device, options.rounds)
    error = None if len(set(answers)) == 1 else f"the answers differ: {answers}"
    yield {"name": "apm classify, cold", "seconds": spread(cold), "answer": answers[0], "error": error}
    yield {"name": "classifier, warm", "seconds": spread(warm), "answer": answers[-1]}


def _bench(options: Options, clock: Clock) -> Iterator[Row]:
    """A run of `apm bench` under torch's launcher, a process for each GPU, and again: nothing is left to do then."""
    count = torch.cuda.device_count() if options.device.type == "cuda" else 1
    limit = 8 if options.quick else 128
    command = many(count, "apm", "bench", "digits")
    command += ["--teacher", "embedded", "--limit", str(limit), "--device", options.device.type]
    command += ["--method", "zero-shot", "--method", "apm", "--preset", "small" if options.quick else options.preset]
    with tempfile.TemporaryDirectory() as folder:
        for name in ("apm bench under torchrun", "the same run again, complete already"):
            begun = time.monotonic()
            done = _run([*command, "--out", str(Path(folder) / "run"), "--json"], clock)
            row: Row = {"name": name, "processes": count, "images": limit, "seconds": time.monotonic() - begun}
            yield {**row, "error": done.stderr[-1500:] if done.returncode else None}


def _run(command: Sequence[str], clock: Clock, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command; it is ended when the time is up."""
    return run_apart(command, cwd=cwd, timeout=max(1.0, clock.left))
