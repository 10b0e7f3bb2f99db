"""Students that stand in for layers: held to the plain form of their queries, trained, resumed, put to use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from apm.errors import UsageError
from apm.images.load import student_input
from apm.pretrain.cache import GridCache, build_cache
from apm.pretrain.config import PretrainConfig
from apm.pretrain.images import open_images
from apm.pretrain.layers import LayerTokens, LayerTrainer
from apm.pretrain.stand_in import STAND_IN, ShortTower, StandIn, StandInSizes, at_their_places
from apm.pretrain.student import Student
from apm.student.position import position_code
from apm.teachers.cut_towers import Layers
from tests.apm.teachers.test_cut_towers import tiny_timm
from tests.pretraining import make_folder, picture

CONFIG = PretrainConfig(steps=6, batch_size=4, lr=1e-2, warmup=2, held_out=0.25, seed=3, locations=3, rgb_weight=0.0)
SMALL = {"position_dim": 8, "hidden": (64, 48, 32)}


@pytest.fixture(scope="module")
def layers() -> Layers:
    return Layers(tiny_timm())


def made(layers: Layers, first: int, last: int, **changes: Any) -> StandInSizes:
    return replace(StandInSizes.between(layers, first, last, preset="small"), **SMALL, **changes)


def trainer(layers: Layers, folder: Path, first: int, last: int, **changes: Any) -> LayerTrainer:
    """A trainer of 12 pictures, its checkpoint and cache in `folder`."""
    tokens = LayerTokens(layers, first, last)
    cache = build_cache(open_images(folder.parent / "images"), tokens, folder / "cache", size=32)
    data = {"teacher": layers.teacher.identity, "from_layer": first, "target_layer": last}
    sizes = made(layers, first, last, **{key: changes.pop(key) for key in ("local",) if key in changes})
    path = folder / f"{first}-{last}.safetensors"
    return LayerTrainer(path, cache, sizes, replace(CONFIG, **changes), data=data, tokens=tokens, precision="fp32")


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("first", [0, 1])
def test_answers_are_the_plain_forms(layers: Layers, first: int, local: bool) -> None:
    sizes = made(layers, first, 2, local=local)
    model, shape = StandIn(sizes, seed=1), layers.shapes[2]
    given = torch.randn((2, 3, 32, 32) if first == 0 else (2, shape.tokens, shape.width))
    maps = given if first == 0 else given[:, shape.prefix :].mT.reshape(2, -1, shape.side, shape.side)
    grid, block = sizes.grid, sizes.side // sizes.places
    column = torch.zeros(2, grid * grid)
    for y in range(grid):
        for x in range(grid):
            k = sizes.patch_size
            part = maps[:, :, y * k : (y + 1) * k, x * k : (x + 1) * k]
            column[:, y * grid + x] = (part * model.column.weight).sum((1, 2, 3)) + model.column.bias
    found = model(given)
    assert found.shape == (2, shape.tokens, shape.width)
    assert shape.prefix > 1, "registers"
    for number in range(shape.tokens):
        place = number - shape.prefix
        row, col = divmod(place, shape.side) if place >= 0 else (0, 0)
        y, x = ((axis + 0.5) * grid / shape.side - 0.5 if place >= 0 else -1.0 - number for axis in (row, col))
        query = [column, position_code([y], [x], 8).expand(2, -1)]
        if local and place >= 0:
            there = maps[:, :, row * block : (row + 1) * block, col * block : (col + 1) * block]
            query.append(there.flatten(1))  # channel by channel
        elif local:
            query.append(given[:, number] if first else torch.zeros(2, sizes.local_width))
        answer = torch.cat(query, dim=1)
        for layer in (model.layer1, model.layer2, model.layer3):
            answer = layer(answer).relu()
        torch.testing.assert_close(found[:, number], model.head(answer), rtol=1e-4, atol=1e-5)
    some = torch.tensor([7, 0, 5])
    torch.testing.assert_close(model(given, some, at_places=model.places_part()), found[:, some])


def test_parameters_have_the_shapes_that_checkpoints_are_held_to(layers: Layers) -> None:
    for first, local in ((0, False), (1, True)):
        sizes = made(layers, first, 2, local=local)
        model = StandIn(sizes)
        assert {name: tuple(one.shape) for name, one in model.state_dict().items()} == STAND_IN.shapes(sizes)
        assert torch.equal(StandIn(sizes, seed=4).head.weight, StandIn(sizes, seed=4).head.weight)
        assert not torch.equal(StandIn(sizes, seed=4).head.weight, model.head.weight)


def test_a_coarser_layer_is_given_all_that_lies_in_its_places() -> None:
    tokens = torch.arange(16.0).view(1, 16, 1)
    found = at_their_places(tokens, 4, 2, 0)
    assert found[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    with_class = at_their_places(torch.cat((torch.tensor([[[9.0]]]), tokens), dim=1), 4, 2, 1)
    assert with_class[0, 0].tolist() == [9, 0, 0, 0] and torch.equal(with_class[:, 1:], found)
    assert at_their_places(tokens, 4, 2, 1)[0, 0].tolist() == [0, 0, 0, 0]
    with pytest.raises(UsageError, match=r"3 locations per side do not tile 4\. Leave out --local"):
        StandInSizes(side=4, patch_size=1, places=3, local=True)


def test_what_is_kept_is_what_the_teacher_holds(layers: Layers, tmp_path: Path) -> None:
    make_folder(tmp_path / "images", 4)
    tokens = LayerTokens(layers, 0, 1, 2)
    cache = build_cache(open_images(tmp_path / "images"), tokens, tmp_path / "cache", size=32)
    assert tokens.which == (1, 2) and "layers 1 2" in tokens.identity
    seen = torch.stack([layers.pixels(picture(number)) for number in (0, 2)])  # a/00.png, a/02.png
    for layer in (1, 2):
        read = tokens.read(cache, layer, np.array([0, 1]))
        torch.testing.assert_close(read, layers.until(seen, layer), rtol=2e-3, atol=2e-3)  # kept in float16


@pytest.mark.slow
@pytest.mark.parametrize(("first", "local"), [(0, False), (1, True)])
def test_learns_goes_on_exactly_and_stands_in(layers: Layers, tmp_path: Path, first: int, local: bool) -> None:
    make_folder(tmp_path / "images")
    whole = trainer(layers, tmp_path / "a", first, 2, local=local, steps=40)
    before = whole.losses(whole.train).mean().item()
    whole.run()
    assert whole.losses(whole.train).mean().item() < 0.8 * before
    cut = trainer(layers, tmp_path / "b", first, 2, local=local, steps=40)
    for _ in range(15):
        cut.advance()
    cut.save()
    again = trainer(layers, tmp_path / "b", first, 2, local=local, steps=40)
    assert again.step == 15
    again.run()
    assert (tmp_path / "a" / whole.path.name).read_bytes() == (tmp_path / "b" / whole.path.name).read_bytes()

    tower = ShortTower.load(whole.path, layers)
    images: list[Image.Image] = [picture(number) for number in (50, 51)]
    pixels = torch.stack([layers.pixels(image) for image in images])
    given = torch.stack([student_input(image, 32) for image in images]) if first == 0 else layers.until(pixels, first)
    expected = layers.finish(whole.model(given).detach(), 2)
    torch.testing.assert_close(tower.answer(tower.inputs(images)), expected, rtol=1e-4, atol=1e-5)
    right = ShortTower(layers, 0, 2, lambda _: layers.until(pixels, 2))
    torch.testing.assert_close(right.answer(pixels), layers.teacher.model(pixels))  # type: ignore[attr-defined]

    other = Layers(tiny_timm(global_pool="avg"))
    other.teacher.identity = "timm:other@0"
    with pytest.raises(UsageError, match=r"replaces layers of timm:tiny@\w+, not of timm:other@0"):
        ShortTower.load(whole.path, other)
    with pytest.raises(
        UsageError,
        match="is not a checkpoint of `apm pretrain` but of another network, made by `apm pretrain --target-layer`",
    ):
        Student.load(whole.path)
    with pytest.raises(UsageError, match="target_layer: 2 there, 1 here"):
        tokens, data = whole.tokens, {**whole.settings, "target_layer": 1}
        LayerTrainer(whole.path, whole.cache, whole.model.config, whole.config, data=data, tokens=tokens)


def test_begins_at_the_mean_and_measures_shares_of_the_variance(layers: Layers, tmp_path: Path) -> None:
    make_folder(tmp_path / "images", 8)
    one = trainer(layers, tmp_path / "a", 0, 2)
    cache: GridCache = one.cache
    wanted = one.tokens.read(cache, 2, one.train).double()
    torch.testing.assert_close(one.model.head.bias.detach().double(), wanted.mean((0, 1)), rtol=1e-4, atol=1e-5)
    assert one.moments[1] == pytest.approx(float(wanted.var((0, 1), correction=0).mean()), rel=1e-6)
    torch.testing.assert_close(one.token_means().double(), wanted.mean(0), rtol=1e-4, atol=1e-5)
    assert one.losses(one.train).mean().item() < 1.2  # a random pattern about the mean would add its own variance
    with torch.no_grad():
        one.model.head.weight.zero_()
    assert one.losses(one.train).mean().item() == pytest.approx(1, rel=1e-4)
