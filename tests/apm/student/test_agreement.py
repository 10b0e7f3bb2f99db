"""Agreement between columns, against loops and autograd: neighbours, value, every gradient, steps, what it does."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from apm.errors import UsageError
from apm.student import matmul as precision
from apm.student.agreement import neighbours
from apm.student.engine import Engine
from apm.student.model import APM
from apm.student.position import grid_locations
from apm.test_time.options import AdaptConfig, IslandOptions, StudentOptions
from apm.test_time.trainer import TestTimeTrainer
from tests.apm.student.test_cells import ROWS, draw_cells, plain_cells_loss
from tests.apm.student.test_engine import LR, apart, draw, idle_where_autograd_is, plain, random_config
from tests.apm.student.test_engine_losses import ADAPT, MODEL, alive, batch, draw_grids
from tests.apm.student.test_engine_losses import plain_loss as other_losses
from tests.counters import Allocations

CASES = [
    {"distil": "cls", "readout": "query"},
    {"distil": "grid", "readout": "mean"},
    {"distil": "both", "readout": "query", "rgb_weight": 0.7},
    {"distil": "both", "readout": "mean", "view_cells": ROWS},
]


def plain_loss(field: Tensor, grid: int) -> Tensor:
    """As GLOM says it, place by place: field (N, D)."""
    losses = []
    for i, feature in enumerate(field):
        near = [j for j in range(len(field)) if i != j and math.dist(divmod(i, grid), divmod(j, grid)) <= 2]
        others = field[near].detach()
        attention = (others @ feature.detach() / len(feature) ** 0.5).softmax(dim=0)
        losses.append((feature - attention @ others).square().mean())
    return torch.stack(losses).mean()


def test_neighbours_are_those_within_two_cells() -> None:
    near = neighbours(6)
    assert near.shape == (36, 36) and torch.equal(near, near.T) and not near.diagonal().any()
    assert near.sum(dim=1).view(6, 6)[2, 2:4].tolist() == [12, 12] and int(near[0].sum()) == 5
    assert near[0].nonzero()[:, 0].tolist() == [1, 2, 6, 7, 12]


def plain_total(model: APM, image: Tensor, target: Tensor, wanted: Any, b: int, weight: float, case: dict[str, Any]):  # type: ignore[no-untyped-def]
    """All losses of the image of row `b`, by the plain form."""
    rgb = case.get("rgb_weight", 0.0)
    if "view_cells" in case:
        value = plain_cells_loss(model, image, wanted, b, target, case["distil"], rgb)
    else:
        value = other_losses(model, image, target, wanted[b].to(image), case["distil"], rgb)
    field = model.field(image[None], *grid_locations(model.config.grid))[0]
    return value + weight * plain_loss(field, model.config.grid)


def made(
    case: dict[str, Any], count: int, seed: int, weight: float
) -> tuple[Engine, dict[str, Tensor], tuple[Any, ...]]:
    """An engine of a case, its first weights, and what it was loaded with."""
    config = random_config(seed, case["readout"])
    parameters, images, targets = draw(config, count, seed)
    parameters = alive(parameters)
    wanted = draw_cells(config, count, seed) if "view_cells" in case else draw_grids(config, count, seed)
    options = {name: value for name, value in case.items() if name != "readout"}
    engine = Engine(config, parameters, batch=count, lr=LR, agree=weight, **options)
    engine.load(images, targets, wanted)
    return engine, parameters, (images, targets, wanted)


@pytest.mark.parametrize("batched", [False, True], ids=["one-by-one", "batched"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_every_gradient(
    case: dict[str, Any], count: int, batched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_one_by_one", lambda _: not batched)
    weight = 3000.0  # the field of such a student hardly differs from place to place
    engine, parameters, (images, targets, wanted) = made(case, count, 1, weight)
    engine.rows.gradient_rows.fill_(math.nan)  # whatever is not written would be seen
    engine.evaluate()
    engine.backward()
    for b in range(count):
        model = plain(engine.config, parameters).double()
        double = images[b].double(), targets[b].double()
        value = plain_total(model, *double, wanted, b, weight, case)
        value.backward()
        others = plain_total(model, *double, wanted, b, 0.0, case)
        assert (value - others).item() > 0.05 * value.item()
        assert float(engine.loss[b]) == pytest.approx(value.item(), rel=5e-6)
        idle_where_autograd_is(engine, model, b, within=2e-5)


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_ten_steps(case: dict[str, Any]) -> None:
    engine, parameters, (images, targets, wanted) = made(case, 2, 1, 3000.0)
    history = engine.run(10)
    for b in range(2):
        model = plain(engine.config, parameters)
        adam = torch.optim.Adam(model.parameters(), lr=LR)
        for step in range(10):
            adam.zero_grad()
            value = plain_total(model, images[b], targets[b], wanted, b, 3000.0, case)
            value.backward()
            adam.step()
            assert float(history.losses[b, step]) == pytest.approx(value.item(), rel=1e-4)
        with torch.no_grad():
            assert apart(engine.token[b], model(images[b : b + 1])[0]) < 1e-4


def test_a_step_makes_no_large_tensors() -> None:
    engine, _, _ = made(CASES[1], 2, 3, 1.0)
    engine.step()
    counts = []
    for _ in range(3):
        with Allocations() as allocations:
            engine.step()
        counts.append((allocations.bytes, allocations.largest))
    assert counts[0] == counts[1] == counts[2]  # nothing grows


def test_neighbours_grow_alike_the_more_the_greater_the_weight() -> None:
    images, targets, grids = batch(1)
    model = dataclasses.replace(MODEL, readout="mean")

    def unlike(weight: float) -> float:
        config = AdaptConfig(steps=100, lr=3e-3, precision="fp32", distil="grid", agree=weight)
        field = TestTimeTrainer(model, config).adapt(images, targets, grids=grids, snapshots=(100,)).fields[100][0]
        field = field.unflatten(0, (model.grid, model.grid))
        between = (field[1:] - field[:-1]).square().mean() + (field[:, 1:] - field[:, :-1]).square().mean()
        return float(between / (field - field.mean(dim=(0, 1))).square().mean())

    without, little, much = (unlike(weight) for weight in (0.0, 0.5, 5.0))
    assert much < 0.7 * little and little < 0.9 * without


def test_what_does_not_go_together_is_refused() -> None:
    assert IslandOptions(agree=0.5).student() == StudentOptions(
        **{name: getattr(IslandOptions, name) for name in ("preset", "steps", "lr", "seed")}, queries="all", agree=0.5
    )
    with pytest.raises(UsageError, match=r"agree=0\.5 needs all locations, but queries=9 reads only some"):
        TestTimeTrainer(MODEL, dataclasses.replace(ADAPT, agree=0.5, queries=9))
    with pytest.raises(UsageError, match="agree must be 0 or a positive number, not nan"):
        AdaptConfig(agree=math.nan)


def test_memory_is_counted() -> None:
    plainly, agreeing = (
        TestTimeTrainer(MODEL, dataclasses.replace(ADAPT, agree=weight))._bytes_per_student() for weight in (0.0, 0.5)
    )
    assert agreeing - plainly == pytest.approx(4 * MODEL.cells * (MODEL.cells + MODEL.dim), rel=0.02)
