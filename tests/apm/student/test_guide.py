"""Colours as a part of the query: their code, the engine against autograd, fields that follow edges of the image."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from apm import StudentOptions
from apm.errors import UsageError
from apm.student import matmul as precision
from apm.student.cells import Cells, shares_of
from apm.student.config import APMConfig
from apm.student.engine import Engine
from apm.student.field import SavedField
from apm.student.guide import FREQUENCIES, WIDTH, colour_code, guide_of
from apm.student.model import APM, draw_parameters
from apm.test_time.options import AdaptConfig
from apm.test_time.trainer import TestTimeTrainer
from tests.apm.student.test_engine import apart, draw, idle_where_autograd_is, plain, random_config
from tests.apm.student.test_engine_losses import ADAPT, MODEL, batch, draw_grids, plain_loss

GUIDED = dataclasses.replace(MODEL, guide="rgb")
MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def test_the_code_is_of_the_colours_at_the_place() -> None:
    colours = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    guide = guide_of((colours - MEAN) / STD, 2)
    torch.testing.assert_close(guide, colours)
    # in a grid of 2 cells a side: pixel (y, x) of 8 lies at row (y + 0.5) / 4 - 0.5
    rows, cols = torch.tensor([-0.375, 1.375, 0.125]), torch.tensor([1.375, 0.625, -0.375])
    code = colour_code(guide, rows, cols, 2)
    assert code.shape == (1, 3, WIDTH)
    for number, (y, x) in enumerate([(0, 7), (7, 4), (2, 0)]):
        angles = [[colours[0, c, y, x].item() * math.pi * 2**k for k in range(FREQUENCIES)] for c in range(3)]
        expected = [f(angle) for channel in angles for f in (math.sin, math.cos) for angle in channel]
        assert code[0, number].tolist() == pytest.approx(expected, abs=1e-4)
    between = colour_code(guide, torch.tensor([-0.375]), torch.tensor([-0.25]), 2)  # midway between two pixels
    mixed = colours.clone()
    mixed[..., 0, 0] = (colours[..., 0, 0] + colours[..., 0, 1]) / 2
    torch.testing.assert_close(between, colour_code(mixed, torch.tensor([-0.375]), torch.tensor([-0.375]), 2))
    assert guide_of(torch.zeros(1, 3, 56, 56), 4).shape == (1, 3, 16, 16)


def test_all_other_weights_are_drawn_alike() -> None:
    import numpy as np

    plain_weights, guided = (draw_parameters(config, np.random.default_rng(0)) for config in (MODEL, GUIDED))
    assert set(guided) - set(plain_weights) == {"mlp.guide.weight"}
    assert all(torch.equal(guided[name], value) for name, value in plain_weights.items())


@pytest.mark.parametrize("batched", [False, True], ids=["one-by-one", "batched"])
@pytest.mark.parametrize(
    ("distil", "rgb_weight", "readout"), [("cls", 0.0, "query"), ("grid", 0.0, "mean"), ("both", 0.5, "query")]
)
def test_loss_and_every_gradient(
    distil: str, rgb_weight: float, readout: str, batched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_one_by_one", lambda _: not batched)
    config = dataclasses.replace(random_config(1, readout), guide="rgb")
    parameters, images, targets = draw(config, 3, 1)
    grids = draw_grids(config, 3, 1)
    engine = Engine(config, parameters, batch=3, distil=distil, rgb_weight=rgb_weight)  # type: ignore[arg-type]
    engine.load(images, targets, None if distil == "cls" else grids)
    engine.evaluate()
    engine.backward()
    for b in range(3):
        model = plain(config, parameters).double()
        value = plain_loss(model, images[b].double(), targets[b].double(), grids[b].double(), distil, rgb_weight)
        value.backward()
        assert float(engine.loss[b]) == pytest.approx(value.item(), rel=2e-5)
        idle_where_autograd_is(engine, model, b, within=2e-5)
    assert engine.gradients["mlp.guide.weight"].any()


def test_drawn_locations_have_their_own_colours() -> None:
    config = dataclasses.replace(random_config(3, "mean"), guide="rgb")
    parameters, images, targets = draw(config, 2)
    engine = Engine(config, parameters, batch=2, lr=1e-3, queries=3, seed=5)
    engine.load(images, targets)
    drawn = engine._draw(3)
    assert drawn is not None
    history = engine.run(3)
    model = plain(config, parameters)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(3):
        adam.zero_grad()
        value = plain_loss(model, images[1], targets[1], torch.zeros(config.cells, config.dim), "cls", 0, drawn[step])
        value.backward()
        adam.step()
        assert float(history.losses[1, step]) == pytest.approx(value.item(), rel=1e-4)


def test_a_field_unfolds_as_the_plain_form_does_at_any_place() -> None:
    images, targets, grids = batch(3)
    adapt = dataclasses.replace(ADAPT, rgb_weight=0.0, steps=4)
    result = TestTimeTrainer(GUIDED, adapt, batch_size=2).adapt(images, targets, grids=grids, keep_field=True)
    model = APM(GUIDED, seed=adapt.seed)
    adam = torch.optim.Adam(model.parameters(), lr=adapt.lr)
    for _ in range(adapt.steps):
        adam.zero_grad()
        plain_loss(model, images[2], targets[2], grids[2], "both", 0).backward()
        adam.step()
    rows, cols = torch.tensor([0.0, 6.3, -0.5, 3.25]), torch.tensor([5.0, 0.2, 7.5, 3.75])
    with torch.no_grad():
        expected = model.field(images[2:], rows, cols)[0]
    assert apart(result.features(rows, cols)[2], expected) < 2e-4
    folded = result.folded
    assert isinstance(folded, SavedField) and folded.guide is not None
    assert apart(folded.double().features(rows, cols), folded.features(rows, cols)) < 1e-4


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16"}, {"queries": 9, "distil": "cls"}], ids=str)
def test_the_answer_is_the_same_alone_in_a_batch_and_in_reversed_order(changes: dict[str, Any]) -> None:
    images, targets, all_grids = batch(5)
    config = dataclasses.replace(ADAPT, rgb_weight=0.0, **changes)
    grids: Tensor | None = None if config.distil == "cls" else all_grids
    trainer = TestTimeTrainer(GUIDED, config, batch_size=3)
    together = trainer.adapt(images, targets, grids=grids)
    turned = trainer.adapt(images.flip(0), targets.flip(0), grids=None if grids is None else grids.flip(0))
    alone = TestTimeTrainer(GUIDED, config).adapt(
        images[3:4], targets[3:4], grids=None if grids is None else grids[3:4]
    )
    assert torch.equal(turned.tokens.flip(0), together.tokens) and torch.equal(alone.tokens, together.tokens[3:4])
    bare = TestTimeTrainer(MODEL, config).adapt(images, targets, grids=grids)
    assert not torch.equal(bare.tokens, together.tokens)


def test_a_guided_field_follows_an_edge_inside_the_cells_of_its_target() -> None:
    """A slanting edge between two colours, and a target of 2 × 2 cells that says how much of each is in them."""
    side = GUIDED.image_size
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    red = (x + 0.5 * y < 0.72 * side).float()
    images = (torch.stack((red, torch.zeros_like(red), 1 - red))[None] - MEAN) / STD
    one, other = torch.randn(2, GUIDED.dim, generator=torch.Generator().manual_seed(1))
    share = torch.nn.functional.avg_pool2d(red[None], GUIDED.patch_size).flatten()[:, None]  # (N, 1) of red
    shares = shares_of((0, 0, 1, 1), 2, 2, GUIDED.grid)
    cells = Cells(shares[None], (shares @ (share * one + (1 - share) * other))[None])
    pixels = (torch.stack((y, x), dim=-1).flatten(0, 1) + 0.5) / side
    agree = {}
    for config in (MODEL, GUIDED):
        adapt = AdaptConfig(steps=200, lr=3e-3, precision="fp32", distil="grid")
        trainer = TestTimeTrainer(dataclasses.replace(config, readout="mean"), adapt)
        result = trainer.adapt(images, torch.zeros(1, config.dim), grids=cells, keep_field=True)
        assert result.folded is not None
        field = result.folded.read(pixels)[0]
        agree[config.guide] = ((field @ (one - other) > 0).float() == red.flatten()).float().mean().item()
    assert agree["rgb"] > 0.97 > agree["none"] + 0.02, agree


def test_settings_reach_the_student() -> None:
    assert StudentOptions(guide="rgb").model(64).guide == "rgb" and StudentOptions().model(64).guide == "none"
    with pytest.raises(UsageError, match='Did you mean "rgb"'):
        StudentOptions(guide="rbg")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="guide"):
        APMConfig(guide="depth")  # type: ignore[arg-type]
