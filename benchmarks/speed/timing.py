"""Clocks: rounds in which everybody has a turn, medians and quartiles."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

log = logging.getLogger(__name__)

LONG = 3.0
"""A call that took so many seconds in the warm-up is announced in every round."""

Name = TypeVar("Name")
Work = Callable[[], object]
"""Something to be timed."""
Spread = dict[str, float | int]
Values = Sequence[float] | NDArray[np.float64]


def spread(values: Values) -> Spread:
    """Median, quartiles, minimum and number of some measurements, in their own unit."""
    q1, median, q3 = np.percentile(values, (25, 50, 75))
    return {"median": float(median), "q1": float(q1), "q3": float(q3), "min": float(min(values)), "n": len(values)}


def spreads(times: Mapping[Name, Values]) -> dict[Name, Spread]:
    """The spread of each of several things."""
    return {name: spread(values) for name, values in times.items()}


def seconds(run: Work, device: torch.device) -> float:
    """Wall time of one call, the work that it left to the GPU included."""
    synchronize(device)
    begun = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - begun


def interleaved(
    works: Mapping[Name, Work],
    device: torch.device,
    rounds: int,
    *,
    fewer: Mapping[Name, int] | None = None,
    warmup: bool = True,
) -> dict[Name, NDArray[np.float64]]:
    """Time all works in turn, round by round, each round starting with another one.

    What slows the machine down for a while then slows all of them down, and ratios within a round stay right. Those in
    ``fewer`` take part in so many of the first rounds only. Unless ``warmup`` is False, each is called once before.

    Returns:
        Seconds of every call, by name; the i-th is of round i.
    """
    expected = dict.fromkeys(works, 0.0)
    for name in works if warmup else ():
        log.info("warm-up: %s", name)
        expected[name] = seconds(works[name], device)
    names, times = list(works), {name: list[float]() for name in works}
    for turn in range(rounds):
        log.info("round %d of %d", turn + 1, rounds)
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if turn < (fewer or {}).get(name, rounds):
                if expected[name] >= LONG:
                    log.info("round %d of %d: %s, about %.0f s", turn + 1, rounds, name, expected[name])
                times[name].append(seconds(works[name], device))
    return {name: np.asarray(values) for name, values in times.items()}


def repeated(run: Work, device: torch.device, rounds: int) -> NDArray[np.float64]:
    """Seconds of each of so many calls, after one that is not timed."""
    return interleaved({"": run}, device, rounds)[""]


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
