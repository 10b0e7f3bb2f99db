"""Fewer queries a step, on real images: what reading N of the locations, new ones at each step, costs and saves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apm.student.config import APMConfig
from apm.student.engine import Engine
from apm.teachers import load_teacher
from apm.test_time.inputs import student_inputs
from apm.test_time.options import AdaptConfig
from apm.test_time.trainer import TestTimeTrainer
from apm.text.zeroshot import ZeroShotHead

from ..datasets import open_dataset
from ..studies.study import numbers
from ..tables.stats import mcnemar, standard_error
from .kind import argument, kind
from .machine import first_layer, six_products, stream_probe
from .options import Options, Record, loaded_engine
from .plots import at_sizes, column, curves
from .profile import ADAM_BYTES, step_flops, trained_parameters
from .tables import Row
from .timing import Spread, Work, interleaved, spread, spreads, synchronize

Answer = tuple[int, float, float]
"""The label predicted, the cosine to the teacher, the seconds."""


def _agreement(axes: Any, record: Row) -> None:
    rows = record["rows"]
    counts, errors = column(rows, "queries"), column(rows, "standard_error")
    axes.plot(counts, column(rows, "agreement"), "o-", label="agrees with the teacher")
    axes.errorbar(counts, column(rows, "accuracy"), yerr=errors, fmt="s-", capsize=2, label="accuracy")
    axes.axhline(record["summary"]["teacher_accuracy"], color="grey", linestyle=":", label="teacher's accuracy")
    axes.set(xlabel="locations a step", ylim=(-0.06, 1.06))
    at_sizes(axes, counts)
    axes.figure.legend(loc="outside lower center", ncols=3)


@kind(
    "| locations a step | agrees with the teacher | accuracy | lost / won against all | cosine to the teacher "
    "| one image | GFLOP a step |\n"
    "| {queries} | {agreement:.1%} | {accuracy:.1%} ± {standard_error:.1%} | {lost} / {won} (p = {mcnemar_p:.2g}) "
    "| {cosine:.4f} | {seconds} | {flops:G,.2f} |",
    "{images} images of {classes} classes, {steps} steps, {precision}; the teacher `{teacher}` itself: "
    "{teacher_accuracy:.1%}.",
    """
    | locations | six products     | Adam's traffic | one step      | ÷ their sum    |
    | {queries} | {step[products]} | {step[adam]}   | {step[whole]} | {step[ratio]:x} |

    Beside its products and Adam's traffic, a step has the first layer (its weights are read twice and their gradient
    written, whatever the number of locations), in bf16 the conversions of gradients and weights, and the readout.
    """,
    (
        lambda record: [{**row, **row["step"]} for row in record["rows"] if "first" in row["step"]],
        """
        | locations | first layer | readout   | Adam with all conversions |
        | {queries} | {first}     | {readout} | {update}                  |
        """,
    ),
    title="Fewer queries a step",
    shared={"teacher": "embedded", "root": None, "limit": 100, "steps": 50},
    own=argument("--counts", "the numbers of locations: 64,256", type=numbers),
    panels=[_agreement, curves("queries", {"seconds": ""}, "locations a step", "seconds per image")],
)
def queries(options: Options) -> Record:
    """Fewer queries a step, on real images: agreement, accuracy, seconds.

    The images are answered one by one, each with every N of ``counts`` in turn (None: powers of two from 8), and with
    all locations, which are read for the answer itself in any case. Labels are looked at here, after the answers.
    """
    dataset = open_dataset("folder", options.root, limit=options.limit)
    teacher = load_teacher(options.teacher, device=options.device)
    config = replace(options.config, dim=teacher.dim)
    counts = [*(options.counts or [2**k for k in range(3, 20) if 2**k < config.cells]), config.cells]
    head = ZeroShotHead.build(teacher, dataset.class_names, teacher.default_templates or dataset.templates)
    trainers = {}
    for count in counts:
        adapt = AdaptConfig(steps=options.steps, precision=options.chosen_precision, queries=_fewer(config, count))
        trainers[count] = TestTimeTrainer(config, adapt, device=options.device)

    def predicted(token: Tensor) -> int:
        return int(head.logits(token)[0].argmax())

    found: dict[int, list[Answer]] = {count: [] for count in counts}
    of_teacher = []
    for turn, sample in enumerate(dataset.samples):
        seen = student_inputs([sample.load()], teacher, trainers[counts[0]].model)
        of_teacher.append(predicted(seen.tokens))
        first = turn % len(counts)
        for count in counts[first:] + counts[:first]:
            if turn == 0:
                trainers[count].adapt(seen.pixels, seen.tokens)  # makes its buffers
            synchronize(options.device)
            begun = time.perf_counter()
            result = trainers[count].adapt(seen.pixels, seen.tokens)
            seconds = time.perf_counter() - begun
            found[count].append((predicted(result.tokens), float(result.final_cosines[0]), seconds))

    truth, theirs = np.array([sample.label for sample in dataset.samples]), np.array(of_teacher)
    with_all = np.array([prediction for prediction, _, _ in found[config.cells]]) == truth
    rows = []
    for count in counts:
        costs = {"flops": step_flops(config, count), "step": parts_of_a_step(options, config, count)}
        rows.append({"queries": count, **_scored(found[count], truth, theirs, with_all), **costs})
    settings: dict[str, Any] = {"dataset": dataset.name, "dataset_fingerprint": dataset.fingerprint}
    settings |= {"images": len(dataset.samples), "classes": len(dataset.class_names), "steps": options.steps}
    settings |= {"precision": options.chosen_precision, "teacher": teacher.identity}
    return options.found(rows, {"teacher_accuracy": float((theirs == truth).mean())}, **settings)


def _scored(
    answers: Sequence[Answer], truth: NDArray[np.int64], theirs: NDArray[np.int64], with_all: NDArray[np.bool_]
) -> Record:
    """Scores of the answers beside the truth, the teacher and a step of all locations."""
    predicted, cosines, seconds = map(np.array, zip(*answers, strict=True))
    correct = predicted == truth
    accuracy = float(correct.mean())
    lost, won = int((with_all & ~correct).sum()), int((~with_all & correct).sum())
    return {
        "agreement": float((predicted == theirs).mean()),
        "accuracy": accuracy,
        "standard_error": standard_error(accuracy, len(correct)),
        "lost": lost,  # correct with all locations, wrong with these; won the other way round
        "won": won,
        "mcnemar_p": mcnemar(lost, won),
        "cosine": spread(cosines),
        "seconds": spread(seconds),
    }


def parts_of_a_step(options: Options, config: APMConfig, count: int) -> dict[str, Spread]:
    """Seconds of one step of ``count`` locations beside what it cannot do without, in turn in the same rounds.

    Returns:
        ``products``: the six large products, bare; ``adam``: Adam's traffic at the bandwidth of scaling an array in
        place; ``whole``: the step; ``ratio``: the whole to the sum of the two, round by round. Where the rest goes:
        ``first``, the first layer's products; ``readout``, forward and backward; ``update``, what Adam's pass really
        takes, in bfloat16 with the widening of gradients and new copies of the weights.
    """
    precision, device = options.chosen_precision, options.device
    stream, traffic = stream_probe(config, 1, device)
    engine = loaded_engine(config, precision, device, queries=_fewer(config, count))
    engine.run(1)  # draws locations
    works = {
        "products": six_products(config, precision, 1, device, queries=count),
        "adam": stream,
        "whole": engine.advance,
        "first": first_layer(config, device),
        "readout": _readout(engine, count),
        "update": engine.update,
    }
    times = interleaved(works, device, options.rounds)
    times["adam"] = times["adam"] * (ADAM_BYTES * trained_parameters(config) / traffic)
    return spreads({**times, "ratio": times["whole"] / (times["products"] + times["adam"])})


def _readout(engine: Engine, count: int) -> Work:
    """The readout of so many locations, forward and backward, of made-up numbers."""
    config, device = engine.config, engine.device
    hidden = torch.rand(1, count, config.hidden[2], device=device)
    positions, d_token = (torch.rand(rows, config.dim, device=device) for rows in (count, 1))
    d_hidden = torch.empty_like(hidden)

    def run() -> None:
        engine.pooling.forward(hidden, positions)
        engine.pooling.backward(d_token, out=d_hidden)

    return run


def _fewer(config: APMConfig, count: int) -> int | None:
    """As the engine is told: None means all locations."""
    return None if count == config.cells else count
