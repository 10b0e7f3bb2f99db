"""GLOM: published golden values, a slow loop from the equations, what follows from them, gradients."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import erf
from torch import Tensor
from torch.nn import functional as F

from apm.errors import UsageError
from apm.glom.config import GLOMConfig
from apm.glom.model import GLOM
from tests.places import GOLDEN

PATH = Path(os.environ.get("APM_GLOM_GOLDEN") or GOLDEN / "glom_seed0.npz")
SIZES = GLOMConfig(image_size=20, patch_size=4, dim=16, levels=4, radius=None)
TINY = GLOMConfig(image_size=6, patch_size=2, dim=5, levels=3, expansion=2, radius=None)
VARIANTS: dict[str, dict[str, Any]] = {
    "levels_all": {},
    "levels_others": {"consensus": "others"},
    "levels_local": {"radius": 1.5},
}


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(PATH) as file:
        return dict(file)


def weights_of(golden: dict[str, np.ndarray]) -> dict[str, Tensor]:
    names = {"tokens_weight": "tokens.weight", "tokens_bias": "tokens.bias"}
    names |= {name: name for name in ("positions", "initial_levels")}
    for net in ("bottom_up", "top_down"):
        for layer in (1, 2):
            names |= {f"{net}_{layer}_{kind}": f"{net}.{kind}{layer}" for kind in ("weight", "bias")}
    return {name: torch.from_numpy(golden[given]) for given, name in names.items()}


def drawn(config: GLOMConfig, seed: int = 0) -> GLOM:
    """In float64, with biases that are not zero."""
    model = GLOM(config, seed=seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_(generator=generator)
    return model


def pictures(config: GLOMConfig, count: int = 2, seed: int = 0) -> Tensor:
    shape = (count, 3, config.image_size, config.image_size)
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_golden(golden: dict[str, np.ndarray], name: str) -> None:
    model = GLOM(replace(SIZES, **VARIANTS[name]), seed=1)
    left = model.load_state_dict(weights_of(golden), strict=False)
    assert set(left.missing_keys) == {"pixels.weight", "pixels.bias"} and not left.unexpected_keys
    states = torch.stack(list(model.states(torch.from_numpy(golden["image"]), steps=6)))
    assert states.shape == golden[name].shape
    for found, wanted in zip(states, torch.from_numpy(golden[name]), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


def slow(model: GLOM, images: Tensor, steps: int) -> np.ndarray:
    """The equations, one number after the other: e_l ← mean of e_l, U_l, T_l and A."""
    config = model.config
    w = {name: value.numpy() for name, value in model.state_dict().items()}
    side, grid = config.patch_size, config.grid

    def net(kind: str, level: int, x: np.ndarray) -> np.ndarray:
        hidden = w[f"{kind}.weight1"][level] @ x + w[f"{kind}.bias1"][level]
        hidden = hidden * 0.5 * (1 + erf(hidden / math.sqrt(2)))
        return w[f"{kind}.weight2"][level] @ hidden + w[f"{kind}.bias2"][level]

    results = []
    for image in images.numpy():
        tokens = []
        for row in range(grid):
            for column in range(grid):
                patch = image[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
                vector = [patch[c, y, x] for y in range(side) for x in range(side) for c in range(3)]
                tokens.append(w["tokens.weight"] @ np.array(vector) + w["tokens.bias"])
        e = np.array([w["initial_levels"]] * config.places)
        for _ in range(steps):
            new = np.empty_like(e)
            for i in range(config.places):
                for level in range(config.levels):
                    terms = [e[i, level], net("bottom_up", level, e[i, level - 1] if level else tokens[i])]
                    if level + 1 < config.levels and config.top_down:
                        terms.append(net("top_down", level, e[i, level + 1] + w["positions"][i]))
                    if config.consensus != "none":
                        weights = []
                        for j in range(config.places):
                            other = e[j, level]
                            alike = e[i, level] @ other / np.sqrt(other @ other) / math.sqrt(config.dim)
                            if i == j and config.consensus == "others":
                                alike = -0.0005
                            far = math.hypot(i // grid - j // grid, i % grid - j % grid)
                            heard = config.radius is None or far <= config.radius
                            weights.append(math.exp(alike) if heard else 0.0)
                        terms.append(sum(a * e[j, level] for j, a in enumerate(weights)) / sum(weights))
                    new[i, level] = sum(terms) / len(terms)
            e = new
        results.append(e)
    return np.array(results)


@pytest.mark.parametrize(
    "change",
    [{}, {"consensus": "others"}, {"radius": 1.0}, {"consensus": "others", "radius": 1.5}, {"consensus": "none"},
     {"top_down": False}, {"levels": 1}, {"levels": 2, "image_size": 2}],
)  # fmt: skip
@torch.no_grad()
def test_it_is_the_slow_loop_of_the_equations(change: dict[str, Any]) -> None:
    config = replace(TINY, **change)
    model, images = drawn(config), pictures(config)
    for steps in (0, 1, 4):
        np.testing.assert_allclose(model(images, steps=steps).numpy(), slow(model, images, steps), atol=1e-12)


@torch.no_grad()
def test_steps_go_up_and_come_back_and_all_are_yielded() -> None:
    model, images = drawn(TINY), pictures(TINY)
    states = list(model.states(images))
    assert len(states) == 2 * TINY.levels + 1
    assert torch.equal(states[-1], model(images)) and torch.equal(states[2], model(images, steps=2))
    apart = [(state[0] - state[1]).abs().amax((0, 2)) > 1e-10 for state in states]  # the two images, per level
    assert [one.tolist() for one in apart[:4]] == [[False] * 3, [True, False, False], [True, True, False], [True] * 3]


@torch.no_grad()
def test_equal_columns_stay_equal_and_one_that_sees_another_thing_does_not() -> None:
    for change in ({}, {"consensus": "others"}, {"consensus": "none"}):
        model, images = drawn(replace(TINY, **change)), pictures(TINY)
        model.positions[:] = model.positions[0].clone()
        patches = model.patches(images)
        patches[:, [1, 4, 8]] = patches[:, [1]]  # three places see the same
        levels = model(model.images(patches))
        torch.testing.assert_close(levels[:, [4, 8]], levels[:, [1, 1]], rtol=0, atol=1e-13)
        assert (levels[:, 2] - levels[:, 1]).abs().amax((0, 2)).min() > 1e-6
    model = drawn(TINY)  # places of their own: the same whole gives another part at another place
    levels = model(model.images(patches))
    assert (levels[:, 4] - levels[:, 1]).abs().amax((0, 2)).min() > 1e-6


@torch.no_grad()
def test_the_order_of_images_and_their_company_do_not_matter() -> None:
    model, images = drawn(TINY), pictures(TINY, 4)
    together = model(images)
    torch.testing.assert_close(model(images[[2]]), together[[2]], rtol=0, atol=1e-13)
    torch.testing.assert_close(model(images.flip(0)).flip(0), together, rtol=0, atol=1e-13)


@torch.no_grad()
def test_one_level_that_hears_nothing_from_below_is_attention_alone() -> None:
    model = drawn(replace(TINY, levels=1))
    for parameter in model.bottom_up.parameters():
        parameter.zero_()
    levels = torch.from_numpy(np.random.default_rng(3).standard_normal((2, 9, 1, 5)))
    x = levels[:, :, 0]
    attended = F.scaled_dot_product_attention(x, F.normalize(x, dim=-1), x)
    opinions = model.opinions(levels, torch.zeros(2, 9, 5, dtype=torch.float64))
    torch.testing.assert_close(opinions.consensus[:, :, 0], attended, rtol=0, atol=1e-13)
    torch.testing.assert_close(model.step(levels, opinions)[:, :, 0], (x + attended) / 3, rtol=0, atol=1e-13)


@torch.no_grad()
def test_a_radius_below_one_leaves_each_place_alone_and_a_wide_one_changes_nothing() -> None:
    images = pictures(TINY)
    alone = drawn(replace(TINY, radius=0.5))
    levels = drawn(TINY)(images)
    torch.testing.assert_close(alone.consensus(levels), levels, rtol=0, atol=1e-13)
    torch.testing.assert_close(drawn(replace(TINY, radius=9.0))(images), levels, rtol=0, atol=1e-13)


@pytest.mark.parametrize("change", [{}, {"consensus": "others", "radius": 1.5}, {"levels": 1}])
def test_gradients_are_finite_differences(change: dict[str, Any]) -> None:
    config = replace(TINY, image_size=4, **change)
    model, images = drawn(config), pictures(config, 1)
    weigh = torch.from_numpy(np.random.default_rng(5).standard_normal((1, 4, config.levels, 5)))

    def loss() -> Tensor:
        return (model(images, steps=3) * weigh).sum()

    parameters = {name: p for name, p in model.named_parameters() if not name.startswith("pixels") and p.numel()}
    gradients = torch.autograd.grad(loss(), list(parameters.values()), allow_unused=True)
    checked = 0
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        if gradient is None:
            assert name == "positions" and config.levels == 1  # only top-down reads them
            continue
        flat = parameter.detach().view(-1)
        for index in range(0, len(flat), max(1, len(flat) // 6)):
            kept = flat[index].item()
            ends = []
            for moved in (kept + 1e-5, kept - 1e-5):
                flat[index] = moved
                with torch.no_grad():
                    ends.append(loss().item())
            flat[index] = kept
            assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(
                gradient.reshape(-1)[index].item(), rel=1e-6, abs=1e-8
            ), name
            checked += 1
    assert checked > 30


def test_patches_and_images_are_inverse_and_wrong_sizes_are_told() -> None:
    model, images = GLOM(TINY), pictures(TINY).float()
    assert torch.equal(model.images(model.patches(images)), images)
    with pytest.raises(UsageError, match=r"images \(B, 3, 6, 6\), not \(1, 3, 8, 8\)"):
        model(torch.zeros(1, 3, 8, 8))
    for change, message in (
        ({"levels": 0}, "1 or more"),
        ({"patch_size": 4}, "Patches of 4 pixels do not tile an image of 6"),
        ({"radius": 0.0}, "radius"),
        ({"consensus": "other"}, 'Did you mean "others"'),
    ):
        with pytest.raises(UsageError, match=message):
            replace(TINY, **change)


def test_the_seed_draws_the_weights() -> None:
    one, same, other = (GLOM(TINY, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["positions"], other["positions"])
