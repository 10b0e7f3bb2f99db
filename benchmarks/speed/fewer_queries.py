"""Fewer queries a step, on real images: what reading N of the locations, new ones at each step, costs and saves."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apm.student.config import APMConfig
from apm.teachers import load_teacher
from apm.teachers.base import Teacher
from apm.test_time.inputs import student_inputs
from apm.test_time.options import AdaptConfig
from apm.test_time.trainer import TestTimeTrainer
from apm.text.zeroshot import ZeroShotHead

from ..datasets import Dataset, open_dataset
from ..studies.study import numbers
from ..tables.stats import mcnemar, standard_error
from .kind import Given, Kind
from .machine import six_products, stream_probe
from .options import Options, loaded_engine
from .plots import at_sizes, column, draw_curves
from .profile import ADAM_BYTES, step_flops, trained_parameters
from .tables import Columns, ratio_text, table
from .timing import interleaved, spread, synchronize


def sweep_queries(
    options: Options, teacher: Teacher, dataset: Dataset, counts: Sequence[int] | None, *, steps: int
) -> dict[str, Any]:
    """Agreement with the teacher, accuracy and seconds against N, the locations read at each step.

    The images are answered one by one, each with every N in turn. All locations are read for the answer itself.

    Args:
        options: sizes; the student's ``dim`` is the teacher's.
        teacher: whose token the students are overfit to.
        dataset: labelled images; the labels are looked at here, after the answers.
        counts: the N to compare; all of the locations come on top. None: powers of two from 8.
        steps: of each adaptation.
    """
    config = replace(options.config, dim=teacher.dim)
    counts = [*(counts or [2**k for k in range(3, 20) if 2**k < config.cells]), config.cells]
    head = ZeroShotHead.build(teacher, dataset.class_names, teacher.default_templates or dataset.templates)
    trainers = {}
    for count in counts:
        adapt = AdaptConfig(steps=steps, precision=options.chosen_precision, queries=_fewer(config, count))
        trainers[count] = TestTimeTrainer(config, adapt, device=options.device)
    found, theirs = _adapted(options, teacher, head, dataset, trainers)
    truth = np.asarray([sample.label for sample in dataset.samples])
    everywhere = found[config.cells]["prediction"] == truth
    rows = []
    for count in counts:
        predictions = found[count]["prediction"]
        correct = predictions == truth
        accuracy = float(correct.mean())
        lost, won = int((everywhere & ~correct).sum()), int((~everywhere & correct).sum())
        rows.append(
            {
                "queries": count,
                "agreement": float((predictions == theirs).mean()),
                "accuracy": accuracy,
                "standard_error": standard_error(accuracy, len(correct)),
                "lost": lost,  # correct with all locations, wrong with these; won the other way round
                "won": won,
                "mcnemar_p": mcnemar(lost, won),
                "cosine": spread(found[count]["cosine"].tolist()),
                "seconds": spread(found[count]["seconds"].tolist()),
                "flops": step_flops(config, count),
                "step": parts_of_a_step(options, config, count),
            }
        )
    return options.found(
        rows,
        {"teacher_accuracy": float((theirs == truth).mean())},
        precision=options.chosen_precision,
        teacher=teacher.identity,
        dataset=dataset.name,
        dataset_fingerprint=dataset.fingerprint,
        images=len(dataset.samples),
        classes=len(dataset.class_names),
        steps=steps,
    )


def _adapted(
    options: Options,
    teacher: Teacher,
    head: ZeroShotHead,
    dataset: Dataset,
    trainers: Mapping[int, TestTimeTrainer],
) -> tuple[dict[int, dict[str, NDArray[np.float64]]], NDArray[np.int64]]:
    """Adapt to each image with each trainer in turn, another one first each time.

    Returns:
        For each trainer the images' ``seconds``, ``prediction`` and ``cosine``; the teacher's predictions.
    """
    found: dict[int, dict[str, list[float]]] = {
        count: {"seconds": [], "prediction": [], "cosine": []} for count in trainers
    }
    counts, theirs = list(trainers), []
    for turn, sample in enumerate(dataset.samples):
        seen = student_inputs([sample.load()], teacher, trainers[counts[0]].model)
        image, target = seen.pixels, seen.tokens
        theirs.append(_prediction(head, target))
        first = turn % len(counts)
        for count in counts[first:] + counts[:first]:
            if turn == 0:
                trainers[count].adapt(image, target)  # makes its buffers
            synchronize(options.device)
            begun = time.perf_counter()
            result = trainers[count].adapt(image, target)
            found[count]["seconds"].append(time.perf_counter() - begun)
            found[count]["prediction"].append(_prediction(head, result.tokens))
            found[count]["cosine"].append(float(result.final_cosines[0]))
    arrays = {count: {name: np.asarray(values) for name, values in of.items()} for count, of in found.items()}
    return arrays, np.asarray(theirs)


def parts_of_a_step(options: Options, config: APMConfig, count: int) -> dict[str, dict[str, float | int]]:
    """Seconds of one step of ``count`` locations beside what it cannot do without, in turn in the same rounds.

    Returns:
        ``products``: the six large products, bare; ``adam``: Adam's traffic at the bandwidth of scaling an array in
        place; ``whole``: the step; ``ratio``: the whole to the sum of the two, round by round.
    """
    precision, device = options.chosen_precision, options.device
    stream, traffic = stream_probe(config, 1, device)
    engine = loaded_engine(config, precision, device, queries=_fewer(config, count))
    engine.run(1)  # draws locations
    works = {
        "products": six_products(config, precision, 1, device, queries=count),
        "adam": stream,
        "whole": engine.advance,
    }
    times = interleaved(works, device, options.rounds)
    passes = ADAM_BYTES * trained_parameters(config) / traffic
    times["adam"] = [seconds * passes for seconds in times["adam"]]
    floors = (products + adam for products, adam in zip(times["products"], times["adam"], strict=True))
    times["ratio"] = [whole / floor for whole, floor in zip(times["whole"], floors, strict=True)]
    return {name: spread(values) for name, values in times.items()}


def _fewer(config: APMConfig, count: int) -> int | None:
    """As the engine is told: None means all locations."""
    return None if count == config.cells else count


def _prediction(head: ZeroShotHead, token: Tensor) -> int:
    return int(torch.argmax(head.logits(token)[0]))


def _measure(given: Given) -> dict[str, Any]:
    teacher = load_teacher(given.teacher, device=given.device)
    dataset = open_dataset("folder", given.root, limit=given.limit)
    return sweep_queries(Options.of(given), teacher, dataset, given.counts, steps=given.steps)


def _table(record: Mapping[str, Any]) -> str:
    settings = record["settings"]
    answers: Columns = {
        "locations a step": "queries",
        "agrees with the teacher": lambda row: f"{row['agreement']:.1%}",
        "accuracy": lambda row: f"{row['accuracy']:.1%} ± {row['standard_error']:.1%}",
        "lost / won against all": lambda row: f"{row['lost']} / {row['won']} (p = {row['mcnemar_p']:.2g})",
        "cosine to the teacher": lambda row: f"{row['cosine']['median']:.4f}",
        "one image": "seconds",
        "GFLOP a step": lambda row: f"{row['flops'] / 1e9:,.2f}",
    }
    parts: Columns = {
        "locations": "queries",
        "six products": "products",
        "Adam's traffic": "adam",
        "one step": "whole",
        "÷ their sum": lambda row: ratio_text(row["ratio"]),
    }
    steps = ({"queries": row["queries"], **row["step"]} for row in record["rows"])
    return (
        f"{table(answers, record['rows'])}\n"
        f"{settings['images']} images of {settings['classes']} classes, {settings['steps']} steps, "
        f"{settings['precision']}; the teacher `{settings['teacher']}` itself: "
        f"{record['summary']['teacher_accuracy']:.1%}.\n"
        f"\n{table(parts, steps)}{REST}"
    )


REST = """
Beside its products and Adam's traffic, a step has the first layer (its weights are read twice and their gradient
written, whatever the number of locations), in bf16 the weights' copies and the widening of their gradients, and the
readout.
"""


def _plot(figure: Any, record: Mapping[str, Any]) -> None:
    left, right = figure.subplots(1, 2)
    rows = record["rows"]
    counts, errors = column(rows, "queries"), column(rows, "standard_error")
    left.plot(counts, column(rows, "agreement"), "o-", label="agrees with the teacher")
    left.errorbar(counts, column(rows, "accuracy"), yerr=errors, fmt="s-", capsize=2, label="accuracy")
    left.axhline(record["summary"]["teacher_accuracy"], color="grey", linestyle=":", label="teacher's accuracy")
    left.set(xlabel="locations a step", ylim=(-0.06, 1.06))
    at_sizes(left, counts)
    draw_curves(right, rows, "queries", {"seconds": ""}, xlabel="locations a step", ylabel="seconds per image")
    figure.legend(loc="outside lower center", ncols=3)


QUERIES = Kind(
    name="queries",
    question="fewer queries a step, on real images: agreement, accuracy, seconds",
    title="Fewer queries a step",
    shared={"teacher": "embedded", "root": None, "limit": 100, "steps": 50},
    arguments=lambda parser: parser.add_argument("--counts", type=numbers, help="the numbers of locations: 64,256"),
    measure=_measure,
    table=_table,
    plot=_plot,
)
