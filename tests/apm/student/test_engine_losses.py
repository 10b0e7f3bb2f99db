"""Losses of the field against the plain form and autograd: values, every gradient, steps, reset, snapshots."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apm.errors import UsageError
from apm.student import matmul as precision
from apm.student.config import APMConfig
from apm.student.engine import Engine
from apm.student.model import APM
from apm.student.position import grid_locations, position_code
from apm.test_time.options import AdaptConfig
from apm.test_time.trainer import AdaptResult, TestTimeTrainer
from tests.apm.student.test_engine import REDUCED, apart, cancels, draw, idle_where_autograd_is, plain, random_config

LR = 1e-3
CASES = [
    (distil, rgb_weight, readout)
    for distil in ("cls", "grid", "both")
    for rgb_weight in (0.0, 0.7)
    for readout in ("query", "mean")
    if (distil, readout) != ("grid", "query") and (distil, rgb_weight) != ("cls", 0.0)
]
every_loss = pytest.mark.parametrize(("distil", "rgb_weight", "readout"), CASES)


def draw_grids(config: APMConfig, count: int, seed: int = 0) -> Tensor:
    shape = (count, config.cells, config.dim)
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def alive(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Open the colour head's ReLUs, which a draw may have shut for good: there would be no gradient to compare."""
    return {
        name: value.abs() + 0.3 if name.startswith("rgb_head.") and name.endswith("bias") else value
        for name, value in parameters.items()
    }


def plain_loss(
    model: APM,
    image: Tensor,
    target: Tensor,
    grid: Tensor,
    distil: str,
    rgb_weight: float,
    where: Tensor | slice = slice(None),
) -> Tensor:
    """As the paper writes it, for one image (3, S, S) and the locations of the grid that `where` numbers."""
    rows, cols = (axis[where] for axis in grid_locations(model.config.grid))
    loss = torch.zeros((), dtype=image.dtype)
    if distil != "grid":
        loss = loss + (model(image[None], rows, cols)[0] - target).square().mean()
    if distil != "cls":
        loss = loss + (model.field(image[None], rows, cols)[0] - grid[where]).square().mean()
    if rgb_weight:
        pooled = F.avg_pool2d(image[None], model.config.patch_size)[0].flatten(1).T  # (N, 3)
        loss = loss + rgb_weight * (model.rgb(image[None], rows, cols)[0] - pooled[where]).square().mean()
    return loss


def grid_engine(config: APMConfig, parameters: dict[str, Tensor], count: int, **options: Any) -> Engine:
    return Engine(config, parameters, batch=count, lr=LR, **options)


@pytest.mark.parametrize("batched", [False, True], ids=["one-by-one", "batched"])
@pytest.mark.parametrize("count", [1, 3])
@every_loss
def test_loss_and_every_gradient(
    distil: str, rgb_weight: float, readout: str, count: int, batched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_one_by_one", lambda _: not batched)
    for seed in range(2):
        config = random_config(seed, readout)
        parameters, images, targets = draw(config, count, seed)
        parameters, grids = alive(parameters), draw_grids(config, count, seed)
        engine = grid_engine(config, parameters, count, distil=distil, rgb_weight=rgb_weight)
        engine.load(images, targets, grids)
        engine.rows.gradient_rows.fill_(math.nan)  # whatever is not written would be seen
        engine.evaluate()
        engine.backward()
        assert set(engine.gradients) == {n for n in parameters if rgb_weight or not n.startswith("rgb_head.")}
        for b in range(count):
            model = plain(config, parameters).double()  # so that all the rounding seen is the engine's
            value = plain_loss(model, images[b].double(), targets[b].double(), grids[b].double(), distil, rgb_weight)
            value.backward()
            assert float(engine.loss[b]) == pytest.approx(value.item(), rel=2e-6, abs=1e-7)
            with torch.no_grad():
                assert apart(engine.token[b], model(images[b : b + 1].double())[0]) < 2e-6
            for name in idle_where_autograd_is(engine, model, b):
                assert distil == "cls" or name.startswith("readout."), name
                assert model.get_parameter(name).grad is None, name


@every_loss
def test_twenty_steps(distil: str, rgb_weight: float, readout: str) -> None:
    config = random_config(11, readout)
    parameters, images, targets = draw(config, 2)
    parameters, grids = alive(parameters), draw_grids(config, 2)
    engine = grid_engine(config, parameters, 2, distil=distil, rgb_weight=rgb_weight)
    engine.load(images, targets, grids)
    history = engine.run(20, snapshots=(0, 7, 20))
    assert sorted(history.fields) == [0, 7, 20]
    rows, cols = grid_locations(config.grid)
    for b in range(2):
        model = plain(config, parameters)
        adam = torch.optim.Adam(model.parameters(), lr=LR)
        for step in range(21):
            with torch.no_grad():
                field = model.field(images[b : b + 1], rows, cols)[0]
            if step in history.fields:
                assert apart(history.fields[step][b], field) < 1e-4
            if step == 20:
                break
            adam.zero_grad()
            value = plain_loss(model, images[b], targets[b], grids[b], distil, rgb_weight)
            value.backward()
            adam.step()
            assert float(history.losses[b, step]) == pytest.approx(value.item(), rel=1e-4, abs=1e-6)
        with torch.no_grad():
            assert apart(engine.token[b], model(images[b : b + 1])[0]) < 1e-4
        assert history.losses[b, -1] < history.losses[b, 0]


@pytest.mark.parametrize(("distil", "rgb_weight"), [("grid", 0.0), ("both", 0.5)])
def test_drawn_locations_are_the_plain_form_at_these_locations(distil: str, rgb_weight: float) -> None:
    config = random_config(3, "mean")
    parameters, images, targets = draw(config, 2)
    parameters, grids = alive(parameters), draw_grids(config, 2)
    engine = grid_engine(config, parameters, 2, distil=distil, rgb_weight=rgb_weight, queries=3, seed=5)
    engine.load(images, targets, grids)
    drawn = engine._draw(4)
    assert drawn is not None and not torch.equal(drawn[0], drawn[1])
    history = engine.run(4)
    model = plain(config, parameters)
    adam = torch.optim.Adam(model.parameters(), lr=LR)
    for step in range(4):
        adam.zero_grad()
        value = plain_loss(model, images[1], targets[1], grids[1], distil, rgb_weight, drawn[step])
        value.backward()
        adam.step()
        assert float(history.losses[1, step]) == pytest.approx(value.item(), rel=1e-5)
    with torch.no_grad():
        expected = plain_loss(model, images[1], targets[1], grids[1], distil, rgb_weight)
    assert float(engine.loss[1]) == pytest.approx(expected.item(), rel=1e-4)  # in the end, of all locations


def test_bf16_products_stay_near_float32() -> None:
    config = dataclasses.replace(REDUCED, readout="mean", init_std=0.05)  # at 0.01 this colour head is dead
    parameters, images, targets = draw(config, 1)
    grids = draw_grids(config, 1)
    engines = [Engine(config, parameters, precision=p, distil="both", rgb_weight=1.0) for p in ("fp32", "bf16")]
    fields = []
    for engine in engines:
        engine.load(images, targets, grids)
        engine.evaluate()
        engine.backward()
    fp32, bf16 = engines
    for name, gradient in fp32.gradients.items():
        assert apart(bf16.gradients[name], gradient) < (0.1 if cancels(name) else 0.03), name
    for engine in engines:
        engine.reset()
        fields.append(engine.run(20, snapshots=(20,)))
    assert torch.allclose(fields[1].losses, fields[0].losses, rtol=0.01)
    assert apart(fields[1].fields[20], fields[0].fields[20]) < 0.03


@pytest.mark.parametrize("precision_name", ["fp32", "bf16"])
def test_reset_restores_everything_bit_by_bit(precision_name: str) -> None:
    config = random_config(4, "query")
    parameters, images, targets = draw(config, 2)
    grids = draw_grids(config, 2)
    engine = grid_engine(config, parameters, 2, distil="both", rgb_weight=0.5, precision=precision_name)
    engine.load(images, targets, grids)
    first = engine.run(5, snapshots=(5,))
    rows = engine.rows
    for state in (rows.weight_rows, rows.gradient_rows, rows.first_moment, rows.second_moment, engine.updates):
        state.fill_(math.nan)  # the worst that an interrupted run could leave, the colour head's moments included
    losses = engine._field_losses
    assert losses is not None
    for buffer in (losses._field, losses._d_field, losses._sums, losses._d_sums, losses._r1, losses._d1, losses._d_rgb):
        buffer.fill_(math.nan)
    engine.reset()
    for name, value in engine.weights.items():
        assert torch.equal(value, parameters[name].expand_as(value)), name
    assert any(name.startswith("rgb_head.") for name in engine.weights)
    again = engine.run(5, snapshots=(5,))
    assert torch.equal(again.losses, first.losses) and torch.equal(again.fields[5], first.fields[5])


MODEL = APMConfig(
    dim=24, image_size=24, patch_size=3, position_dim=32, hidden=(96, 64, 48), heads=4, rgb_hidden=6, init_std=0.1
)
ADAPT = AdaptConfig(steps=6, lr=1e-3, precision="fp32", distil="both", rgb_weight=0.3)


def batch(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, MODEL.image_size, MODEL.image_size, generator=generator)
    targets = torch.randn(count, MODEL.dim, generator=generator)
    return images, targets, torch.randn(count, MODEL.cells, MODEL.dim, generator=generator)


def same(a: AdaptResult, b: AdaptResult, pick: Any) -> None:
    for name in ("tokens", "losses", "cosines", "final_losses", "steps"):
        assert torch.equal(getattr(a, name), getattr(b, name)[pick]), name
    assert list(a.fields) == list(b.fields) == [0, 2, 6]
    for step, field in a.fields.items():
        assert torch.equal(field, b.fields[step][pick])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16"},
        {"queries": 9},
        {"distil": "grid"},
        {"distil": "cls"},
        {"agree": 3},
        {"tolerance": 2.04},
    ],
    ids=["fp32", "bf16", "queries", "grid", "cls", "agree", "tolerance"],
)
def test_the_answer_is_the_same_alone_in_a_batch_and_in_reversed_order(changes: dict[str, Any]) -> None:
    config = dataclasses.replace(ADAPT, **changes)
    model = dataclasses.replace(MODEL, readout="mean") if config.distil == "grid" else MODEL
    images, targets, some_grids = batch(5)
    grids = None if config.distil == "cls" else some_grids
    trainer = TestTimeTrainer(model, config, batch_size=3)
    together = trainer.adapt(images, targets, grids=grids, snapshots=[2, 0, 6])
    assert together.finite.all()
    turned = trainer.adapt(
        images.flip(0), targets.flip(0), grids=None if grids is None else grids.flip(0), snapshots=(0, 2, 6)
    )
    same(turned, together, torch.arange(4, -1, -1))
    alone = TestTimeTrainer(model, config).adapt(
        images[3:4], targets[3:4], grids=None if grids is None else grids[3:4], snapshots=(0, 2, 6)
    )
    same(alone, together, slice(3, 4))
    if "tolerance" in changes:
        assert together.steps.min() < together.steps.max()  # else it would show nothing


def test_snapshots_and_a_kept_field_change_no_answer() -> None:
    images, targets, grids = batch(2)
    trainer = TestTimeTrainer(MODEL, ADAPT)
    bare = trainer.adapt(images, targets, grids=grids)
    rich = trainer.adapt(images, targets, grids=grids, keep_field=True, snapshots=range(7))
    assert torch.equal(bare.tokens, rich.tokens) and torch.equal(bare.losses, rich.losses)
    assert bare.fields == {} and list(rich.fields) == list(range(7))
    torch.testing.assert_close(rich.fields[6], rich.features(*grid_locations(MODEL.grid)), rtol=1e-5, atol=1e-5)
    distances = [(field - grids).square().mean().item() for field in rich.fields.values()]
    assert distances == sorted(distances, reverse=True)


def test_an_early_stop_repeats_the_last_field() -> None:
    images, targets, grids = batch(1)
    config = dataclasses.replace(ADAPT, tolerance=1e3)
    result = TestTimeTrainer(MODEL, config).adapt(images, targets, grids=grids, snapshots=(0, 4))
    assert result.steps.tolist() == [0]
    assert torch.equal(result.fields[0], result.fields[4])


def test_a_grid_that_is_not_finite_is_flagged_and_hurts_no_other() -> None:
    images, targets, grids = batch(3)
    clean = TestTimeTrainer(MODEL, ADAPT).adapt(images, targets, grids=grids)
    grids[1, 5, 2] = math.nan
    result = TestTimeTrainer(MODEL, ADAPT, batch_size=3).adapt(images, targets, grids=grids, snapshots=(6,))
    assert result.finite.tolist() == [True, False, True]
    assert torch.equal(result.tokens[[0, 2]], clean.tokens[[0, 2]])
    assert result.tokens[1].isnan().all() and result.fields[6][1].isnan().all()
    assert result.fields[6][[0, 2]].isfinite().all()


@pytest.mark.slow
def test_the_field_follows_its_grid() -> None:
    """What one token cannot do: the field becomes this image's own, place by place."""
    images, targets, grids = batch(1)
    near = {}
    for distil in ("cls", "grid"):
        config = AdaptConfig(steps=400, lr=3e-3, precision="fp32", distil=distil)  # type: ignore[arg-type]
        trainer = TestTimeTrainer(dataclasses.replace(MODEL, readout="mean"), config)
        result = trainer.adapt(images, targets, grids=grids if distil == "grid" else None, snapshots=(400,))
        near[distil] = float(torch.cosine_similarity(result.fields[400], grids, dim=2).mean())
        torch.testing.assert_close(result.tokens, result.fields[400].mean(dim=1), rtol=1e-4, atol=1e-5)
    assert near["grid"] > 0.9
    assert near["cls"] < 0.2


def test_attention_is_that_of_torchs_own_module() -> None:
    images, targets, grids = batch(3)
    result = TestTimeTrainer(MODEL, ADAPT, batch_size=2).adapt(images, targets, grids=grids, keep_field=True)
    rows, cols = [0.0, 7.0, 3.5, 2.0, -0.5], [5.0, 0.0, 1.0, 2.25, 7.5]
    model = APM(MODEL, seed=ADAPT.seed)
    adam = torch.optim.Adam(model.parameters(), lr=ADAPT.lr)
    for _ in range(ADAPT.steps):
        adam.zero_grad()
        plain_loss(model, images[2], targets[2], grids[2], "both", 0.3).backward()
        adam.step()
    with torch.no_grad():
        keys = model.field(images[2:], rows, cols) + position_code(rows, cols, MODEL.dim)
        readout = model.readout
        query = readout.query.expand(1, 1, -1)
        _, expected = readout.attention(query, keys, keys, need_weights=True, average_attn_weights=False)
    got = result.attention(rows, cols)
    assert got.shape == (3, MODEL.heads, 5)
    torch.testing.assert_close(got[2], expected[0, :, 0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.sum(dim=2), torch.ones(3, MODEL.heads))
    assert got.std(dim=2).min() > 1e-3  # else any attention would do


def test_what_does_not_go_together_is_refused() -> None:
    images, targets, grids = batch(2)
    mean = dataclasses.replace(MODEL, readout="mean")
    with pytest.raises(UsageError, match='the object query is not trained: choose readout="mean"'):
        TestTimeTrainer(MODEL, AdaptConfig(distil="grid"))
    with pytest.raises(UsageError, match='loss="cosine" is a loss of the token'):
        AdaptConfig(distil="grid", loss="cosine")
    with pytest.raises(UsageError, match=r'Unknown distil "grids"\. Did you mean "grid"'):
        AdaptConfig(distil="grids")  # type: ignore[arg-type]
    for weight in (-0.1, math.nan, math.inf):
        with pytest.raises(UsageError, match="rgb_weight must be 0 or a positive number"):
            AdaptConfig(rgb_weight=weight)
    trainer = TestTimeTrainer(MODEL, ADAPT)
    with pytest.raises(UsageError, match="and none are given"):
        trainer.adapt(images, targets)
    with pytest.raises(UsageError, match=r"grids must have shape \(2, 64, 24\)"):
        trainer.adapt(images, targets, grids=grids[:, :-1])
    with pytest.raises(UsageError, match=r"snapshots must lie between 0 and the 6 steps; got \[7\]"):
        trainer.adapt(images, targets, grids=grids, snapshots=[7])
    plainly = TestTimeTrainer(mean, AdaptConfig(steps=1))
    with pytest.raises(UsageError, match="has no use for those given"):
        plainly.adapt(images, targets, grids=grids)
    with pytest.raises(UsageError, match='readout="query"'):
        plainly.adapt(images, targets, keep_field=True).attention([0.0], [0.0])
    with pytest.raises(UsageError, match="keep_field=True"):
        plainly.adapt(images, targets).attention([0.0], [0.0])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_replayed_graph_is_the_eager_loop() -> None:
    config = random_config(7, "query")
    parameters, images, targets = draw(config, 3)
    grids = draw_grids(config, 3)
    engines = [grid_engine(config, parameters, 3, distil="both", rgb_weight=0.5, device=d) for d in ("cpu", "cuda")]
    for engine in engines:
        engine.load(images, targets, grids)
    expected = engines[0].run(20, snapshots=(3, 20))
    for _ in range(2):  # the capture, then a replay of the same graph
        engines[1].reset()
        history = engines[1].run(20, snapshots=(3, 20))
        assert torch.allclose(history.losses.cpu(), expected.losses, rtol=1e-3)
        assert all(apart(history.fields[k].cpu(), field) < 1e-3 for k, field in expected.fields.items())
