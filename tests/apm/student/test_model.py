"""The plain form: sizes, weights, and that any location can be asked alone, in any order and any number."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from apm.errors import UsageError
from apm.student.config import PRESETS, APMConfig
from apm.student.model import APM, draw_parameters, parameter_shapes, unfold
from apm.student.position import grid_locations, position_code

TINY = APMConfig(dim=16, image_size=20, patch_size=4, position_dim=12, hidden=(24, 20, 16), heads=4, rgb_hidden=8)


def tiny(**changes: object) -> APMConfig:
    return dataclasses.replace(TINY, init_std=0.2, **changes)  # type: ignore[arg-type]


def images(config: APMConfig, count: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, config.image_size, config.image_size, generator=generator)


@torch.no_grad()
def test_queries_one_by_one_shuffled_and_all_at_once_agree() -> None:
    config = tiny()
    model, x = APM(config), images(config)
    rows, cols = grid_locations(config.grid)
    together = model.field(x, rows, cols)
    alone = torch.cat([model.field(x, rows[i : i + 1], cols[i : i + 1]) for i in range(config.cells)], dim=1)
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-6)
    order = torch.randperm(config.cells, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model.field(x, rows[order], cols[order]), together[:, order], rtol=1e-5, atol=1e-6)
    some = order[:7]
    torch.testing.assert_close(model.rgb(x, rows[some], cols[some]), model.rgb(x, rows, cols)[:, some])
    torch.testing.assert_close(model(x, rows[order], cols[order]), model(x), rtol=1e-5, atol=1e-6)
    assert together.std(dim=1).min() > 1e-3  # they do differ from location to location


@torch.no_grad()
def test_locations_between_the_cells_can_be_asked() -> None:
    model, x = APM(tiny()), images(TINY)
    near, exact = model.field(x, [1.001], [2.0]), model.field(x, [1], [2])
    assert 0 < (near - exact).abs().max() < 0.01


def test_unfold_lays_the_column_at_every_location() -> None:
    column = torch.randn(3, 25)
    positions = position_code([0, 4, 2], [1, 1, 3], 12)
    queries = unfold(column, positions)
    assert queries.shape == (3, 3, 37)
    for b in range(3):
        for q in range(3):
            assert torch.equal(queries[b, q], torch.cat((column[b], positions[q])))


@torch.no_grad()
def test_the_column_is_one_filter_over_the_patches() -> None:
    config = tiny()
    model, x = APM(config), images(config)
    column = model.column(x)
    assert column.shape == (2, config.cells)
    kernel, bias = model.column.filter.weight[0], model.column.filter.bias
    patch = x[1, :, 4:8, 12:16]  # row 1, column 3
    torch.testing.assert_close(column[1, 1 * config.grid + 3], (patch * kernel).sum() + bias[0])


@torch.no_grad()
@pytest.mark.parametrize("readout", ["query", "mean"])
@pytest.mark.parametrize("dim", [16, 40, 100])
def test_any_width_of_token(readout: str, dim: int) -> None:
    config = tiny(dim=dim, readout=readout)
    model, x = APM(config), images(config)
    assert model(x).shape == (2, dim)
    if readout == "mean":
        torch.testing.assert_close(model(x), model.field(x, *grid_locations(config.grid)).mean(dim=1))


@torch.no_grad()
def test_colours_come_from_feature_column_and_position() -> None:
    config = tiny()
    model, x = APM(config), images(config)
    colours = model.rgb(x, *grid_locations(config.grid))
    assert colours.shape == (2, config.cells, 3)
    assert colours.min() >= 0 and colours.max() > 0


@pytest.mark.parametrize("readout", ["query", "mean"])
def test_every_parameter_is_drawn_small_and_in_order(readout: str) -> None:
    config = APMConfig.preset("small", dim=64, readout=readout)  # type: ignore[arg-type]
    model = APM(config, seed=3)
    drawn = draw_parameters(config, np.random.Generator(np.random.PCG64(3)))
    assert list(drawn) == list(parameter_shapes(config))
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == parameter_shapes(config)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, drawn[name]) and parameter.requires_grad and parameter.dtype == torch.float32
    flat = torch.cat([value.flatten() for value in drawn.values()]) / config.init_std
    assert abs(flat.mean()) < 0.01 and abs(flat.std() - 1) < 0.01
    biases = torch.cat([value for name, value in drawn.items() if name.endswith("bias")])
    assert biases.std() == pytest.approx(config.init_std, rel=0.1)  # biases too
    assert not torch.equal(APM(config, seed=4).mlp.head.weight, model.mlp.head.weight)


def test_the_paper_has_22_8_million_parameters() -> None:
    shapes = parameter_shapes(APMConfig.preset("paper", dim=768)).values()
    assert sum(int(np.prod(shape)) for shape in shapes) == pytest.approx(22.8e6, rel=2e-3)


def test_presets() -> None:
    paper = APMConfig.preset("paper", dim=512)
    assert paper == APMConfig() and (paper.grid, paper.cells, paper.position_dim) == (32, 1024, 1024)
    small = APMConfig.preset("small", dim=256, readout="mean")
    assert (small.grid, small.cells, small.hidden, small.readout) == (16, 256, (1024, 512, 256), "mean")
    assert set(PRESETS) == {"paper", "small"}
    with pytest.raises(UsageError, match=r'Unknown preset "papr".*Did you mean "paper"'):
        APMConfig.preset("papr", dim=512)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "dim=0"),
        ({"hidden": (1, 2)}, "three"),
        ({"image_size": 450}, "14 pixels do not tile an image of 450"),
        ({"position_dim": 1022}, "1022"),
        ({"dim": 500}, "500"),
        ({"readout": "qery"}, 'Did you mean "query"'),
        ({"init_std": 0.0}, "init_std"),
    ],
)
def test_sizes_that_cannot_go_together_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        APMConfig(**changes)  # type: ignore[arg-type]
