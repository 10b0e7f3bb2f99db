"""Fewer queries a step, on real images: what drawing N of the locations afresh at each step costs and saves."""

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
from apm.teachers.base import Teacher
from apm.test_time.inputs import student_inputs
from apm.test_time.options import AdaptConfig
from apm.test_time.trainer import TestTimeTrainer
from apm.text.zeroshot import ZeroShotHead

from ..datasets import Dataset
from ..tables.stats import mcnemar, standard_error
from .machine import six_products, stream_probe
from .options import Options, loaded_engine
from .profile import ADAM_BYTES, step_flops, trained_parameters
from .record import Recorder
from .timing import Work, interleaved, spread, synchronize


def sweep_queries(
    options: Options, teacher: Teacher, dataset: Dataset, counts: Sequence[int] | None = None, *, steps: int = 50
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
    config = _config(options, teacher)
    counts = [*(counts or [2**k for k in range(3, 20) if 2**k < config.cells]), config.cells]
    recorder = Recorder(
        "queries",
        options.record(
            precision=options.chosen_precision,
            teacher=teacher.identity,
            dataset=dataset.name,
            dataset_fingerprint=dataset.fingerprint,
            images=len(dataset.samples),
            classes=len(dataset.class_names),
            steps=steps,
        ),
        options.device,
    )
    head = ZeroShotHead.build(teacher, dataset.class_names, teacher.default_templates or dataset.templates)
    trainers = {count: _trainer(options, config, count, steps) for count in counts}
    found, theirs = _adapted(options, teacher, head, dataset, trainers)
    truth = np.asarray([sample.label for sample in dataset.samples])
    everywhere = found[config.cells]["prediction"] == truth
    rows = []
    for count in counts:
        predictions = found[count]["prediction"]
        right = predictions == truth
        lost, won = int((everywhere & ~right).sum()), int((~everywhere & right).sum())
        rows.append(
            {
                "queries": count,
                "agreement": float((predictions == theirs).mean()),
                "accuracy": float(right.mean()),
                "standard_error": standard_error(float(right.mean()), len(right)),
                "lost": lost,  # right with all locations, wrong with these; won the other way round
                "won": won,
                "mcnemar_p": mcnemar(lost, won),
                "cosine": spread(found[count]["cosine"].tolist()),
                "seconds": spread(found[count]["seconds"].tolist()),
                "flops": step_flops(config, count),
                "step": parts_of_a_step(options, config, count),
            }
        )
    return recorder.finish(rows, {"teacher_accuracy": float((theirs == truth).mean())})


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
    engine = loaded_engine(config, precision, device, queries=None if count == config.cells else count)
    engine.run(1)  # draws locations
    works = {
        "products": Work(six_products(config, precision, 1, device, queries=count), options.rounds),
        "adam": Work(stream, options.rounds),
        "whole": Work(engine.advance, options.rounds),
    }
    times = interleaved(works, device)
    passes = ADAM_BYTES * trained_parameters(config) / traffic
    times["adam"] = [seconds * passes for seconds in times["adam"]]
    least = (products + adam for products, adam in zip(times["products"], times["adam"], strict=True))
    times["ratio"] = [whole / floor for whole, floor in zip(times["whole"], least, strict=True)]
    return {name: spread(values) for name, values in times.items()}


def _config(options: Options, teacher: Teacher) -> APMConfig:
    return replace(options.config, dim=teacher.dim)


def _trainer(options: Options, config: APMConfig, count: int, steps: int) -> TestTimeTrainer:
    queries = None if count == config.cells else count
    adapt = AdaptConfig(steps=steps, precision=options.chosen_precision, queries=queries)
    return TestTimeTrainer(config, adapt, device=options.device)


def _prediction(head: ZeroShotHead, token: Tensor) -> int:
    return int(torch.argmax(head.logits(token)[0]))
