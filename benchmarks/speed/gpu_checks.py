"""Is the engine on this device the method? Against the plain form, against a CPU, and against itself.

Every check gives one distance, which must not exceed its limit. Limits are those of the tests (float32: rounding; after
steps Adam magnifies it; bfloat16 products: eight bits), and a check that compares the engine with itself, in the same
order of operations, allows nothing at all.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from apm.student.config import APMConfig
from apm.student.engine import Engine
from apm.student.model import APM, draw_parameters

from .options import Products, images_and_targets

log = logging.getLogger(__name__)

BATCHES = (1, 8, 32)
LIMITS = {
    "fp32": {"token": 1e-4, "gradient": 1e-4, "steps": 1e-3, "batch": 1e-3, "same": 1e-5},
    "bf16": {"token": 2e-2, "gradient": 5e-2, "steps": 5e-2, "batch": 2e-2, "same": 1e-5},
}
CANCELLING = 5.0
"""Gradients that are small differences of large terms may be so many times farther off."""

Found = tuple[str, Tensor, Tensor, float]
"""What is compared, what came out, what was expected, and how far apart they may be."""


@dataclass(frozen=True)
class Case:
    """What every check works on: a student of these sizes, with products in this precision, on this device."""

    config: APMConfig
    precision: Products
    device: torch.device
    steps: int = 10
    batch: int = 3
    lr: float = 1e-3  # larger than the default, so that a few steps go somewhere

    def engine(self, device: str | None = None, **options: Any) -> Engine:
        """An engine on this case's device (or another), with images and targets in it."""
        settings = {"batch": self.batch, "lr": self.lr, "precision": self.precision, "device": self.device} | options
        if device is not None:
            settings |= {"device": device, "precision": "fp32"}  # a CPU may have no bfloat16 to speak of
        engine = Engine(self.config, _drawn(self.config)[0], **settings)
        engine.load(*self.inputs(engine.batch))
        return engine

    def inputs(self, count: int) -> tuple[Tensor, Tensor]:
        """So many images and targets, on the CPU."""
        _, images, targets = _drawn(self.config)
        return images[:count], targets[:count]

    @property
    def limits(self) -> dict[str, float]:
        return LIMITS[self.precision]


@cache
def _drawn(config: APMConfig) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A student's first weights; images and targets for the largest batch."""
    parameters = draw_parameters(config, np.random.Generator(np.random.PCG64(0)))
    return parameters, *images_and_targets(config, max(BATCHES), torch.device("cpu"))


def run_checks(case: Case) -> list[dict[str, Any]]:
    """Make all checks.

    Returns:
        For each its name, precision, distance, limit, and whether it holds; a check that breaks fails with its error.
    """
    rows: list[dict[str, Any]] = []

    def note(name: str, distance: float | None, limit: float | None, error: str | None = None) -> None:
        if distance is not None and not math.isfinite(distance):
            distance = None
        held = distance is not None and limit is not None and distance <= limit
        row = {"part": "check", "name": name, "precision": case.precision, "limit": limit, "error": error}
        rows.append({**row, "distance": distance, "held": held})

    for check in CHECKS:
        name = check.__name__.replace("_", " ")
        log.info("check (%s): %s", case.precision, name)
        try:
            for what, got, expected, limit in check(case):
                note(what, apart(got, expected), limit)
        except Exception as error:  # one that breaks must not hide the others
            note(name, None, None, f"{type(error).__name__}: {error}"[:500])
    return rows


def apart(got: Tensor, expected: Tensor) -> float:
    """Distance of two tensors, wherever they are, relative to the expected length."""
    got, expected = got.detach().cpu().double(), expected.detach().cpu().double()
    return float((got - expected).norm()) / (float(expected.norm()) or 1.0)


def against_the_plain_form(case: Case) -> Iterator[Found]:
    """Against autograd on the CPU: token and every gradient before any step (float64), and the token after steps."""
    dim, engine, (image, target) = case.config.dim, case.engine(), case.inputs(1)
    engine.evaluate()
    engine.backward()
    model = APM(case.config).double()
    token = model(image.double())
    F.mse_loss(token, target.double()).backward()
    yield "token, against the plain form", engine.token[0], token[0], case.limits["token"]
    worst = 0.0
    for name, gradient in engine.gradients.items():
        expected = model.get_parameter(name).grad
        assert expected is not None, name
        if name.endswith("in_proj_bias"):  # the keys' bias has no gradient but rounding
            expected[dim : 2 * dim] = 0
        cancels = name.startswith(("readout.query", "readout.attention.in_proj", "column.filter.bias"))
        worst = max(worst, apart(gradient[0], expected) / (CANCELLING if cancels else 1))
    yield "every gradient, against autograd", torch.tensor(worst), torch.zeros(()), case.limits["gradient"]

    plain = APM(case.config)
    adam = torch.optim.Adam(plain.parameters(), lr=case.lr)
    for _ in range(case.steps):
        adam.zero_grad()
        F.mse_loss(plain(image), target).backward()
        adam.step()
    engine.reset()
    engine.run(case.steps)
    yield "token after the steps, against the plain form", engine.token[0], plain(image)[0], case.limits["steps"]


def steps_against_a_cpu(case: Case) -> Iterator[Found]:
    """Losses and tokens of all steps, all locations and few, against the engine in float32 on the CPU."""
    limit = case.limits["steps"]
    for what, queries in (("all locations", None), ("few locations", max(1, case.config.cells // 16))):
        engine, reference = case.engine(queries=queries), case.engine("cpu", queries=queries)
        losses, expected = engine.run(case.steps).losses, reference.run(case.steps).losses
        yield f"token after the steps, {what}, against a CPU", engine.token, reference.token, limit
        yield f"losses of the steps, {what}, against a CPU", losses, expected, limit


def the_graph_against_eager_steps(case: Case) -> Iterator[Found]:
    """Replaying the graph changes weights as calling each operation does; and it does change them."""
    replayed, eager = case.engine(), case.engine()
    before = replayed.rows.weight_rows.clone()
    for _ in range(case.steps):
        replayed.advance()
        eager.step()
    assert not torch.equal(replayed.rows.weight_rows, before), "the steps changed nothing"
    yield "graph replay, against eager steps", replayed.rows.weight_rows, eager.rows.weight_rows, case.limits["same"]


def everything_is_reset(case: Case) -> Iterator[Found]:
    """A second run after a reset, with another image in between, is the first one bit by bit."""
    engine = case.engine()
    images, targets = case.inputs(case.batch)
    first, token = engine.run(case.steps).losses.clone(), engine.token.clone()
    engine.reset()
    engine.load(images.flip(0), targets.flip(0))
    engine.run(2)
    rows = engine.rows
    for state in (rows.weight_rows, rows.gradient_rows, rows.first_moment, rows.second_moment, engine.updates):
        state.fill_(float("nan"))  # the worst that an interrupted run could leave
    engine.reset()
    engine.load(images, targets)
    yield "losses after a reset", engine.run(case.steps).losses, first, 0.0
    yield "token after a reset", engine.token, token, 0.0


def alone_and_in_batches(case: Case) -> Iterator[Found]:
    """An image's token is the same whatever is beside it. Kernels may differ by batch, hence rounding may."""
    tokens: list[Tensor] = []
    for batch in BATCHES:
        try:
            engine = case.engine(batch=batch)
        except torch.OutOfMemoryError:
            log.info("%d students side by side do not fit into this GPU's memory", batch)
            break
        engine.run(case.steps)
        tokens.append(engine.token[0].clone())
        if batch > 1:
            yield f"token alone, against a batch of {batch}", tokens[-1], tokens[0], case.limits["batch"]
        del engine


def frozen_samples(case: Case) -> Iterator[Found]:
    """One that has reached the tolerance, or is not finite, stays as it is; its neighbours go on."""
    free = case.engine()
    halfway = free.run(case.steps).losses[:, case.steps // 2]
    first = int(halfway.argmin())
    engine, short = case.engine(tolerance=float(halfway[first])), case.engine()
    engine.run(case.steps)
    made = int(engine.updates[first])
    assert 0 < made <= case.steps // 2 + 1, f"{made} of {case.steps} steps before the tolerance was reached"
    short.run(made)
    frozen, limit = engine.rows.weight_rows[first], case.limits["same"]
    yield "weights of a frozen sample", frozen, short.rows.weight_rows[first], limit

    broken = case.engine()
    broken.target[1] = float("inf")
    broken.run(case.steps)
    steps = torch.full((case.batch,), float(case.steps))
    steps[1] = 0
    yield "steps beside a sample that is not finite", broken.updates, steps, 0.0
    yield "token beside a sample that is not finite", broken.token[0], free.token[0], limit


CHECKS: tuple[Callable[[Case], Iterator[Found]], ...] = (
    against_the_plain_form,
    steps_against_a_cpu,
    the_graph_against_eager_steps,
    everything_is_reset,
    alone_and_in_batches,
    frozen_samples,
)
