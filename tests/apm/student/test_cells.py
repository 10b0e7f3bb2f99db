"""Targets in the cells of views: shares by counting, loss and gradients by autograd, and the guarantees of steps."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from apm.errors import UsageError
from apm.student import matmul as precision
from apm.student.cells import Cells, robust_loss, shares_of
from apm.student.config import APMConfig
from apm.student.engine import Engine
from apm.student.model import APM
from apm.student.position import grid_locations
from apm.test_time.options import AdaptConfig
from apm.test_time.trainer import TestTimeTrainer
from tests.apm.student.test_engine import draw, idle_where_autograd_is, plain, random_config
from tests.apm.student.test_engine_losses import ADAPT, MODEL, alive, batch, plain_loss

ROWS = 7


def draw_cells(config: APMConfig, count: int, seed: int = 0) -> Cells:
    rng = np.random.default_rng(seed)
    shares = rng.random((count, ROWS, config.cells)) * (rng.random((count, ROWS, config.cells)) < 0.4)
    shares[..., 0] += 0.1
    shares /= shares.sum(axis=2, keepdims=True)
    features = rng.standard_normal((count, ROWS, config.dim)) * rng.choice([0.3, 3], size=(count, ROWS, 1))
    return Cells(torch.from_numpy(shares.astype(np.float32)), torch.from_numpy(features.astype(np.float32)))


def plain_cells_loss(
    model: APM, image: Tensor, cells: Cells, row: int, target: Tensor, distil: str, rgb: float
) -> Tensor:
    """The field's means over the cells, by the plain form; the losses of token and colours beside it."""
    field = model.field(image[None], *grid_locations(model.config.grid))[0]  # (N, D)
    wanted = cells.features[row].to(field)
    loss = robust_loss(cells.shares[row].to(field) @ field, wanted, cells.spread()[row].to(field))
    if distil == "both":
        loss = loss + (model(image[None])[0] - target).square().mean()
    if rgb:
        loss = (
            loss
            + plain_loss(model, image, target, field, "cls", rgb)
            - plain_loss(model, image, target, field, "cls", 0)
        )
    return loss


@pytest.mark.parametrize("box", [(0.0, 0.0, 1.0, 1.0), (0.25, 0.5, 0.5, 0.75), (0.1, 0.33, 0.47, 0.7)])
@pytest.mark.parametrize("flipped", [False, True])
def test_shares_are_the_areas_that_counting_finds(box: tuple[float, float, float, float], flipped: bool) -> None:
    height, width, side, fine = 3, 2, 8, 600
    top, left, bottom, right = box
    counted = np.zeros((height * width, side * side))
    y = top + (np.arange(fine) + 0.5) / fine * (bottom - top)
    x = left + (np.arange(fine) + 0.5) / fine * (right - left)
    rows = (np.arange(fine) * height // fine)[:, None] * width
    cols = np.arange(fine) * width // fine
    places = (y * side).astype(int)[:, None] * side + (x * side).astype(int)
    np.add.at(counted, (rows + (width - 1 - cols if flipped else cols), places), 1)
    counted /= counted.sum(axis=1, keepdims=True)
    shares = shares_of(box, height, width, side, flipped=flipped)
    assert shares.sum(dim=1) == pytest.approx(1)
    np.testing.assert_allclose(shares, counted, atol=4 / fine)


def test_views_that_disagree_have_less_weight_than_those_that_agree() -> None:
    said = torch.tensor([[0.0], [0.0], [0.0], [10.0]])
    values = torch.linspace(-1, 11, 1201)

    def best(spread: float) -> float:
        losses = [robust_loss(value.expand(4, 1), said, torch.tensor(spread)).item() for value in values]
        return values[int(np.argmin(losses))].item()

    assert best(1e6) == pytest.approx(2.5, abs=0.02)  # their mean
    assert best(1e-3) == pytest.approx(0, abs=0.02)  # what most say
    small = robust_loss(torch.zeros(1, 1), torch.full((1, 1), 0.01), torch.tensor(1.0))
    assert small.item() == pytest.approx(1e-4, rel=1e-4)


def test_the_spread_is_a_quarter_of_the_variance_of_what_is_wanted() -> None:
    cells = draw_cells(MODEL, 3)
    offset = Cells(cells.shares, cells.features + torch.arange(MODEL.dim))  # the mean of each number is no spread
    wanted = cells.features.var(dim=1, correction=0).mean(dim=1) / 4
    torch.testing.assert_close(cells.spread(), wanted)
    torch.testing.assert_close(offset.spread(), wanted, rtol=1e-4, atol=0)


def test_features_that_are_all_alike_have_a_spread_above_zero() -> None:
    shares = torch.full((3, 2, 4), 0.25)
    features = torch.stack((torch.ones(2, 5), torch.zeros(2, 5), torch.full((2, 5), math.nan)))
    spread = Cells(shares, features).spread()
    assert spread[0] > 0 and spread[1] > 0 and spread[2].isnan()


CASES = [("grid", 0.0, "mean"), ("both", 0.0, "query"), ("both", 0.0, "mean"), ("both", 0.7, "query")]


@pytest.mark.parametrize("batched", [False, True], ids=["one-by-one", "batched"])
@pytest.mark.parametrize(("distil", "rgb_weight", "readout"), CASES)
def test_loss_and_every_gradient(
    distil: str, rgb_weight: float, readout: str, batched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_one_by_one", lambda _: not batched)
    for seed in range(2):
        config = random_config(seed, readout)
        parameters, images, targets = draw(config, 3, seed)
        parameters, cells = alive(parameters), draw_cells(config, 3, seed)
        engine = Engine(config, parameters, batch=3, distil=distil, rgb_weight=rgb_weight, view_cells=ROWS)  # type: ignore[arg-type]
        engine.load(images, targets, cells)
        engine.rows.gradient_rows.fill_(math.nan)  # whatever is not written would be seen
        engine.evaluate()
        engine.backward()
        for b in range(3):
            model = plain(config, parameters).double()
            value = plain_cells_loss(model, images[b].double(), cells, b, targets[b].double(), distil, rgb_weight)
            value.backward()
            assert float(engine.loss[b]) == pytest.approx(value.item(), rel=2e-6)
            idle_where_autograd_is(engine, model, b)


def cells_of(count: int) -> Cells:
    return draw_cells(MODEL, count, 3)


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16"}, {"distil": "grid", "rgb_weight": 0.0}], ids=str)
def test_the_answer_is_the_same_alone_in_a_batch_and_in_reversed_order(changes: dict[str, object]) -> None:
    config = dataclasses.replace(ADAPT, **changes)  # type: ignore[arg-type]
    model = dataclasses.replace(MODEL, readout="mean") if config.distil == "grid" else MODEL
    images, targets, _ = batch(5)
    cells = cells_of(5)
    trainer = TestTimeTrainer(model, config, batch_size=3)
    together = trainer.adapt(images, targets, grids=cells, snapshots=(6,))
    back = torch.arange(4, -1, -1)
    turned = trainer.adapt(
        images.flip(0), targets.flip(0), grids=Cells(cells.shares[back], cells.features[back]), snapshots=(6,)
    )
    alone = TestTimeTrainer(model, config).adapt(images[3:4], targets[3:4], grids=cells[3:4], snapshots=(6,))
    for name in ("tokens", "losses"):
        assert torch.equal(getattr(turned, name), getattr(together, name)[back])
        assert torch.equal(getattr(alone, name), getattr(together, name)[3:4])
    assert torch.equal(alone.fields[6], together.fields[6][3:4])
    assert (together.final_losses < together.losses[:, 0]).all()


def test_targets_of_another_kind_or_number_leave_nothing_behind() -> None:
    images, targets, grids = batch(2)
    trainer, fresh = (TestTimeTrainer(MODEL, ADAPT) for _ in range(2))
    first = trainer.adapt(images, targets, grids=cells_of(2))
    fewer = Cells(cells_of(2).shares[:, :4], cells_of(2).features[:, :4])
    trainer.adapt(images, targets, grids=fewer)
    plain_grid = trainer.adapt(images, targets, grids=grids)
    assert torch.equal(trainer.adapt(images, targets, grids=cells_of(2)).tokens, first.tokens)
    assert torch.equal(fresh.adapt(images, targets, grids=grids).tokens, plain_grid.tokens)
    assert not torch.equal(plain_grid.tokens, first.tokens)


def test_a_view_that_is_not_finite_is_flagged_and_hurts_no_other() -> None:
    images, targets, _ = batch(3)
    cells = cells_of(3)
    clean = TestTimeTrainer(MODEL, ADAPT).adapt(images, targets, grids=cells)
    cells.features[1, 2, 3] = math.nan
    result = TestTimeTrainer(MODEL, ADAPT, batch_size=3).adapt(images, targets, grids=cells)
    assert result.finite.tolist() == [True, False, True]
    assert torch.equal(result.tokens[[0, 2]], clean.tokens[[0, 2]])


@pytest.mark.slow
def test_a_field_that_is_fitted_to_parts_knows_more_than_one_fitted_to_the_whole() -> None:
    """A pattern finer than the grid of the whole: only zoomed views can tell it."""
    side = MODEL.grid
    rng = np.random.default_rng(0)
    truth = torch.from_numpy(np.kron(rng.standard_normal((side // 2, side // 2)), np.ones((2, 2)))).float()
    truth = truth.flatten()[:, None] * torch.randn(MODEL.dim, generator=torch.Generator().manual_seed(0))
    boxes = [(0.0, 0.0, 1.0, 1.0)] + [(y, x, y + 0.5, x + 0.5) for y in (0, 0.25, 0.5) for x in (0, 0.25, 0.5)]
    images, targets, _ = batch(1)
    off = []
    for some in (boxes[:1], boxes):
        shares = torch.cat([shares_of(box, 2, 2, side) for box in some])
        config = AdaptConfig(steps=400, lr=3e-3, precision="fp32", distil="grid")
        trainer = TestTimeTrainer(dataclasses.replace(MODEL, readout="mean"), config)
        cells = Cells(shares[None], (shares @ truth)[None])
        field = trainer.adapt(images, targets, grids=cells, snapshots=(400,)).fields[400][0]
        off.append(((field - truth).square().mean() / truth.square().mean()).item())
    assert off[1] < 0.7 * off[0], off


@pytest.mark.parametrize(
    ("changes", "cells", "words"),
    [
        ({}, Cells(torch.zeros(1, 2, 5), torch.zeros(1, 2, MODEL.dim)), "shares \\(1, R, 64\\)"),
        ({}, Cells(torch.zeros(1, 0, 64), torch.zeros(1, 0, MODEL.dim)), "R, 64"),
        ({"queries": 4}, Cells(torch.zeros(1, 2, 64), torch.zeros(1, 2, MODEL.dim)), "leave out queries"),
        ({"distil": "cls"}, Cells(torch.zeros(1, 2, 64), torch.zeros(1, 2, MODEL.dim)), 'it is "cls"'),
    ],
)
def test_cells_that_cannot_be_used_are_refused(changes: dict[str, object], cells: Cells, words: str) -> None:
    images, targets, _ = batch(1)
    trainer = TestTimeTrainer(MODEL, dataclasses.replace(ADAPT, **changes))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=words):
        trainer.adapt(images, targets, grids=cells)
