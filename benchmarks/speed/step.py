"""One step, beside the floor: engine, plain form, published loop and optimiser, in turn in one run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from apm.student.model import APM

from .machine import floor, rate_probe, six_products, stream_probe
from .options import Options, images_and_targets, loaded_engine
from .profile import (
    ADAM_BYTES,
    measured_flops,
    middle_flops,
    plain_flops,
    published_flops,
    step_flops,
    trained_parameters,
)
from .published_loop import TEXTS, TOWERS, PublishedLoop, random_towers
from .record import Recorder
from .timing import Work, interleaved, spread


def measure_step(options: Options, *, published_rounds: int = 2) -> dict[str, Any]:
    """Record the seconds of a step of every form, and their ratios to the floor of the same round.

    Args:
        options: sizes and device. With ``batch`` B the engine steps B students at once, and its seconds and the rates
            are those of B; seconds are told per student.
        published_rounds: rounds that the published loop takes part in (0: none); it is slow.
    """
    config, device, batch = options.config, options.device, options.batch
    settings = {"batch": batch, "published_rounds": published_rounds, "precisions": list(options.precisions)}
    recorder = Recorder("step", options.record(**settings), device)
    works: dict[str, Work] = {}
    operations: dict[str, int] = {}
    flops = {
        "six products": middle_flops(config),
        "engine": step_flops(config),
        "optimiser": 0,
        "plain form": plain_flops(config),
    }
    for precision in options.precisions:
        run, operations[precision] = rate_probe(config, precision, batch, device)
        works[f"rate {precision}"] = Work(run, options.rounds)
        works[f"six products {precision}"] = Work(six_products(config, precision, batch, device), options.rounds)
        engine = loaded_engine(config, precision, device, batch=batch)
        works[f"engine {precision}"] = Work(engine.advance, options.rounds)
        works[f"optimiser {precision}"] = Work(engine.update, options.rounds)
    run, traffic = stream_probe(config, batch, device)
    works["memory"] = Work(run, options.rounds)
    works["plain form fp32"] = Work(_plain(options), options.rounds)
    if published_rounds:
        towers = None if options.quick else random_towers(device)
        published = PublishedLoop(config, *images_and_targets(config, 1, device), towers=towers)
        works["published fp32"] = Work(published.step, published_rounds)
        flops["published"] = published_flops(config) + (measured_flops(towers) if towers else 0)
        recorder.settings |= {"published_towers": TOWERS, "published_texts": TEXTS} if towers else {}
    times = interleaved(works, device)

    floors: dict[str, list[dict[str, float]]] = {
        precision: [
            floor(config, rate=operations[precision] / rate, bandwidth=traffic / memory)
            for rate, memory in zip(times[f"rate {precision}"], times["memory"], strict=True)
        ]
        for precision in options.precisions
    }
    return recorder.finish(
        list(_rows(times, flops, floors, batch)), _summary(options, times, operations, traffic, floors)
    )


def _rows(
    times: Mapping[str, list[float]],
    flops: Mapping[str, int],
    floors: Mapping[str, list[dict[str, float]]],
    batch: int,
) -> Iterator[dict[str, Any]]:
    """One row a form and precision, per student."""
    for name, values in times.items():
        kind, _, products = name.rpartition(" ")
        if kind not in flops:
            continue
        students = 1 if kind in ("plain form", "published") else batch
        row: dict[str, Any] = {
            "name": kind,
            "precision": products,
            "seconds": spread([value / students for value in values]),
            "flops": flops[kind],
        }
        if kind != "optimiser" and products in floors:
            least = [one["seconds"] for one in floors[products]]
            row["ratio_to_floor"] = spread([a / students / b for a, b in zip(values, least, strict=False)])
        yield row


def _summary(
    options: Options,
    times: dict[str, list[float]],
    operations: dict[str, int],
    traffic: int,
    floors: dict[str, list[dict[str, float]]],
) -> dict[str, Any]:
    def ratio(above: str, below: str, students: int = 1) -> dict[str, float | int]:
        """Of the rounds that both took part in; the engine's time is that of all its students."""
        return spread([students * a / b for a, b in zip(times[above], times[below], strict=False)])

    result: dict[str, Any] = {
        "middle_flops": middle_flops(options.config),
        "adam_bytes": ADAM_BYTES * trained_parameters(options.config),
        "bandwidth": spread([traffic / seconds for seconds in times["memory"]]),
        "auto_precision": options.chosen_precision if options.precision == "auto" else None,
    }
    for precision in options.precisions:
        result[precision] = {
            "rate": spread([operations[precision] / seconds for seconds in times[f"rate {precision}"]]),
            "floor": {
                part: spread([one[part] for one in floors[precision]]) for part in ("compute", "memory", "seconds")
            },
            "optimiser_share": ratio(f"optimiser {precision}", f"engine {precision}"),
            "plain_over_engine": ratio("plain form fp32", f"engine {precision}", options.batch),
        }
        if "published fp32" in times:
            result[precision]["published_ratio"] = ratio("published fp32", f"engine {precision}", options.batch)
    return result


def _plain(options: Options) -> Any:
    """One step of the plain form with autograd and torch's Adam."""
    image, target = images_and_targets(options.config, 1, options.device)
    model = APM(options.config).to(options.device)
    adam = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step() -> None:
        adam.zero_grad()
        F.mse_loss(model(image), target).backward()
        adam.step()

    return step
