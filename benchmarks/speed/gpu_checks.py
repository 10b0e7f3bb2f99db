"""Is the engine on this device the method? Against the plain form, against a CPU, and against itself.

Every check gives one distance, which must not exceed its limit. Limits are those of the tests (float32: rounding; after
steps Adam magnifies it; bfloat16 products: eight bits), and a check that compares the engine with itself, in the same
order of operations, allows nothing at all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from apm.student.config import APMConfig
from apm.student.engine import Engine
from apm.student.model import APM, draw_parameters

from .options import images_and_targets

log = logging.getLogger(__name__)

BATCHES = (1, 8, 32)
LIMITS = {
    "fp32": {"token": 1e-4, "gradient": 1e-4, "steps": 1e-3, "batch": 1e-3},
    "bf16": {"token": 2e-2, "gradient": 5e-2, "steps": 5e-2, "batch": 2e-2},
}
CANCELLING = 5.0
"""Gradients that are small differences of large terms may be so many times farther off."""


@dataclass(frozen=True)
class Case:
    """What every check works on: a student of these sizes, with products in this precision, on this device."""

    config: APMConfig
    precision: Literal["fp32", "bf16"]
    device: torch.device
    steps: int = 10
    batch: int = 3
    lr: float = 1e-3  # larger than the default, so that a few steps go somewhere

    def engine(self, device: torch.device | str | None = None, **options: Any) -> Engine:
        """An engine on this case's device (or another), with images and targets in it."""
        settings = {"batch": self.batch, "lr": self.lr, "precision": self.precision, "device": self.device} | options
        if device is not None:
            settings |= {"device": device, "precision": "fp32"}  # a CPU may have no bfloat16 to speak of
        engine = Engine(self.config, self.parameters(), **settings)
        images, targets = self.inputs()
        engine.load(images[: engine.batch], targets[: engine.batch])
        return engine

    def parameters(self) -> dict[str, Tensor]:
        """The student's first weights, on the CPU."""
        return _drawn(self.config)[0]

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Images and targets for the largest batch, on the CPU."""
        return _drawn(self.config)[1]


@cache
def _drawn(config: APMConfig) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    parameters = draw_parameters(config, np.random.Generator(np.random.PCG64(0)))
    return parameters, images_and_targets(config, max(BATCHES), torch.device("cpu"))


Check = Callable[[Case], Iterator[tuple[str, float, float]]]


def run_checks(case: Case) -> list[dict[str, Any]]:
    """Make all checks.

    Returns:
        For each its name, precision, distance, limit, and whether it holds; a check that breaks fails with its error.
    """
    rows: list[dict[str, Any]] = []

    def note(name: str, distance: float | None, limit: float | None, error: str | None = None) -> None:
        held = distance is not None and limit is not None and distance <= limit  # never where it is not a number
        finite = distance is not None and np.isfinite(distance)
        rows.append(
            {
                "part": "check",
                "name": name,
                "precision": case.precision,
                "distance": distance if finite else None,
                "limit": limit,
                "held": held,
                "error": error,
            }
        )

    for check in CHECKS:
        name = check.__name__.replace("_", " ")
        log.info("check (%s): %s", case.precision, name)
        try:
            for what, distance, limit in check(case):
                note(what, distance, limit)
        except Exception as error:  # one that breaks must not hide the others
            note(name, None, None, f"{type(error).__name__}: {error}"[:500])
    return rows


def apart(got: Tensor, expected: Tensor) -> float:
    """Distance of two tensors, wherever they are, relative to the expected length."""
    got, expected = got.detach().cpu().double(), expected.detach().cpu().double()
    length = float(expected.norm())
    return float((got - expected).norm()) / length if length else float(got.norm())


def against_the_plain_form(case: Case) -> Iterator[tuple[str, float, float]]:
    """Against autograd on the CPU: token and every gradient before any step (float64), and the token after steps."""
    limits, dim = LIMITS[case.precision], case.config.dim
    engine = case.engine()
    engine.evaluate()
    engine.backward()
    images, targets = case.inputs()
    model = APM(case.config).double()
    token = model(images[:1].double())
    F.mse_loss(token, targets[:1].double()).backward()
    yield "token, against the plain form", apart(engine.token[0], token[0]), limits["token"]
    worst = 0.0
    for name, gradient in engine.gradients.items():
        expected = model.get_parameter(name).grad
        assert expected is not None, name
        if name.endswith("in_proj_bias"):  # the keys' bias has no gradient but rounding
            expected[dim : 2 * dim] = 0
        cancels = name.startswith(("readout.query", "readout.attention.in_proj", "column.filter.bias"))
        worst = max(worst, apart(gradient[0], expected) / (CANCELLING if cancels else 1))
    yield "every gradient, against autograd", worst, limits["gradient"]

    plain = APM(case.config)
    adam = torch.optim.Adam(plain.parameters(), lr=case.lr)
    for _ in range(case.steps):
        adam.zero_grad()
        F.mse_loss(plain(images[:1]), targets[:1]).backward()
        adam.step()
    engine.reset()
    engine.run(case.steps)
    with torch.no_grad():
        yield (
            "token after the steps, against the plain form",
            apart(engine.token[0], plain(images[:1])[0]),
            limits["steps"],
        )


def steps_against_a_cpu(case: Case) -> Iterator[tuple[str, float, float]]:
    """Losses and tokens of all steps, all locations and few, against the engine in float32 on the CPU."""
    limit = LIMITS[case.precision]["steps"]
    for what, queries in (("all locations", None), ("few locations", max(1, case.config.cells // 16))):
        engine, reference = case.engine(queries=queries), case.engine("cpu", queries=queries)
        history, expected = engine.run(case.steps), reference.run(case.steps)
        yield f"token after the steps, {what}, against a CPU", apart(engine.token, reference.token), limit
        yield f"losses of the steps, {what}, against a CPU", apart(history.losses, expected.losses), limit


def the_graph_against_eager_steps(case: Case) -> Iterator[tuple[str, float, float]]:
    """Replaying the graph changes weights as calling each operation does; and it does change them."""
    replayed, eager = case.engine(), case.engine()
    before = replayed.rows.weight_rows.clone()
    for _ in range(case.steps):
        replayed.advance()
        eager.step()
    assert not torch.equal(replayed.rows.weight_rows, before), "the steps changed nothing"
    yield (
        "graph replay, against eager steps",
        apart(replayed.rows.weight_rows, eager.rows.weight_rows),
        LIMITS["fp32"]["steps"] / 100,
    )


def everything_is_reset(case: Case) -> Iterator[tuple[str, float, float]]:
    """A second run after a reset, with another image in between, is the first one bit by bit."""
    engine = case.engine()
    images, targets = case.inputs()
    first = engine.run(case.steps).losses.clone()
    token = engine.token.clone()
    engine.reset()
    engine.load(images[: case.batch].flip(0), targets[: case.batch].flip(0))
    engine.run(2)
    rows = engine.rows
    for state in (rows.weight_rows, rows.gradient_rows, rows.first_moment, rows.second_moment, engine.updates):
        state.fill_(float("nan"))  # the worst that an interrupted run could leave
    engine.reset()
    engine.load(images[: case.batch], targets[: case.batch])
    again = engine.run(case.steps).losses
    yield "losses after a reset", apart(again, first), 0.0
    yield "token after a reset", apart(engine.token, token), 0.0


def alone_and_in_batches(case: Case) -> Iterator[tuple[str, float, float]]:
    """An image's token is the same whatever is beside it. Kernels may differ by batch, hence rounding may."""
    alone = None
    for batch in BATCHES:
        try:
            engine = case.engine(batch=batch)
        except torch.OutOfMemoryError:
            log.info("%d students side by side do not fit into this GPU's memory", batch)
            break
        engine.run(case.steps)
        if alone is None:
            alone = engine.token[0].clone()
        else:
            yield (
                f"token alone, against a batch of {batch}",
                apart(engine.token[0], alone),
                LIMITS[case.precision]["batch"],
            )
        del engine


def frozen_samples(case: Case) -> Iterator[tuple[str, float, float]]:
    """One that has reached the tolerance, or is not finite, stays as it is; its neighbours go on."""
    free = case.engine()
    losses = free.run(case.steps).losses
    halfway = losses[:, case.steps // 2]
    first = int(halfway.argmin())
    engine = case.engine(tolerance=float(halfway[first]))
    engine.run(case.steps)
    made = int(engine.updates[first])
    assert 0 < made <= case.steps // 2 + 1, f"{made} of {case.steps} steps before the tolerance was reached"
    short = case.engine()
    short.run(made)
    limit = LIMITS["fp32"]["steps"] / 100
    yield "weights of a frozen sample", apart(engine.rows.weight_rows[first], short.rows.weight_rows[first]), limit

    broken = case.engine()
    broken.target[1] = float("inf")
    broken.run(case.steps)
    steps = torch.tensor([float(case.steps)] * case.batch)
    steps[1] = 0
    yield "steps beside a sample that is not finite", apart(broken.updates, steps), 0.0
    yield "token beside a sample that is not finite", apart(broken.token[0], free.token[0]), limit


CHECKS: tuple[Check, ...] = (
    against_the_plain_form,
    steps_against_a_cpu,
    the_graph_against_eager_steps,
    everything_is_reset,
    alone_and_in_batches,
    frozen_samples,
)
