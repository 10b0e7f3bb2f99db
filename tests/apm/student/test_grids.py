"""Resampling of grids, and the grids of image towers against what the towers themselves pool."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from apm.errors import TeacherError, UsageError
from apm.images.load import IMAGENET_MEAN, IMAGENET_STD, central_square, load_image, normalised, student_input
from apm.student.field import resample
from apm.student.position import grid_locations
from apm.teachers import Teacher, load_teacher
from apm.teachers.base import GridTeacher
from apm.teachers.grid_towers import GridTower
from apm.teachers.openclip import CONVOLUTIONAL_GRID_SIZE
from tests.fakes import FakeTeacher

TEXT: dict[str, Any] = {"context_length": 8, "vocab_size": 40, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}


def tower(size: int = 32, **vision: Any) -> tuple[nn.Module, GridTower]:
    """Build a random image tower with weights large enough to matter, and what reads its grid."""
    torch.manual_seed(0)
    logging.getLogger().addHandler(logging.NullHandler())
    vision_cfg = open_clip.CLIPVisionCfg(**{"image_size": size, **vision})
    visual = open_clip.CustomTextCLIP(24, vision_cfg, open_clip.CLIPTextCfg(**TEXT)).visual.eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in visual.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return visual, GridTower(visual, name="tiny", image_size=size)


def timm_tower(name: str, size: int, pool: str = "avg", proj: str = "linear") -> tuple[nn.Module, GridTower]:
    return tower(size, timm_model_name=name, timm_model_pretrained=False, timm_pool=pool, timm_proj=proj)


def pixels(size: int = 32, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


# --- resampling -------------------------------------------------------------------------------------------------------


def test_resampling_is_bilinear_between_cell_centres() -> None:
    generator = np.random.default_rng(0)
    grid = generator.standard_normal((2, 3, 5, 4))
    side = 7
    rows, cols = (axis.numpy() for axis in grid_locations(side))
    got = resample(torch.from_numpy(grid), side)
    assert got.shape == (2, 49, 4)
    for place in range(side**2):
        y = np.clip((rows[place] + 0.5) / side * 3 - 0.5, 0, 2)
        x = np.clip((cols[place] + 0.5) / side * 5 - 0.5, 0, 4)
        top, left = min(int(y), 1), min(int(x), 3)
        dy, dx = y - top, x - left
        above = (1 - dx) * grid[:, top, left] + dx * grid[:, top, left + 1]
        below = (1 - dx) * grid[:, top + 1, left] + dx * grid[:, top + 1, left + 1]
        np.testing.assert_allclose(got[:, place].numpy(), (1 - dy) * above + dy * below, atol=1e-12)


def test_resampling_to_the_same_grid_changes_nothing_and_keeps_the_order() -> None:
    grid = torch.arange(4 * 4 * 3, dtype=torch.float32).view(4, 4, 3)
    assert torch.equal(resample(grid, 4), grid.reshape(16, 3))
    assert torch.equal(resample(grid.expand(2, 5, 4, 4, 3), 4)[1, 2], grid.reshape(16, 3))
    assert torch.equal(resample(torch.full((1, 1, 3), 2.0), 3), torch.full((9, 3), 2.0))


@pytest.mark.parametrize(("shape", "side"), [((4, 3), 2), ((0, 4, 3), 2), ((2, 2, 3), 0)])
def test_what_is_no_grid_is_refused(shape: tuple[int, ...], side: int) -> None:
    with pytest.raises(UsageError, match="A grid"):
        resample(torch.zeros(shape), side)


def test_the_central_square_is_the_students(picture: Path) -> None:
    image = load_image(picture).image
    assert torch.equal(student_input(image, 28), normalised(central_square(image, 28), IMAGENET_MEAN, IMAGENET_STD))
    inner = image.crop((8, 0, 40, 32))  # 48×32
    assert np.array_equal(np.asarray(central_square(image, 32)), np.asarray(inner))


# --- towers -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("block_type", [None, "custom"])
def test_a_transformers_grid_is_the_last_blocks_value_path(block_type: str | None) -> None:
    visual, grid = tower(**VIT, block_type=block_type)
    images = pixels()
    x = visual._embeds(images)
    x = visual.transformer.resblocks[0](x)
    block = visual.transformer.resblocks[1]
    _, _, weight = block.attn.in_proj_weight.chunk(3)
    _, _, bias = block.attn.in_proj_bias.chunk(3)
    x = x + block.attn.out_proj(F.linear(block.ln_1(x), weight, bias))
    x = x + block.mlp(block.ln_2(x))
    expected = visual.ln_post(x) @ visual.proj
    got = grid(images)
    assert got.shape == (2, 4, 4, 24)
    torch.testing.assert_close(got.flatten(1, 2), expected[:, 1:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_position_codes_are_interpolated_for_another_size_and_stay_as_they_were() -> None:
    visual, grid = tower(**VIT)
    before = copy.deepcopy(visual.state_dict())
    own = grid(pixels(32))
    larger, state = (
        open_clip.CLIP(24, open_clip.CLIPVisionCfg(**{**VIT, "image_size": 56}), open_clip.CLIPTextCfg(**TEXT)),
        {},
    )
    state = {f"visual.{name}": value.clone() for name, value in visual.state_dict().items()}
    open_clip.model.resize_pos_embed(state, larger)  # open_clip's own way to another size
    larger.visual.load_state_dict({name.removeprefix("visual."): value for name, value in state.items()})
    larger.visual.eval()
    expected = GridTower(larger.visual, name="larger", image_size=56)(pixels(56))
    assert expected.shape == (2, 7, 7, 24)
    torch.testing.assert_close(grid(pixels(56)), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(grid(pixels(32)), own)
    assert all(torch.equal(before[name], value) for name, value in visual.state_dict().items())


AVERAGE = {
    "resnet": (64, ("test_resnet", 64)),
    "resnet, pool unnamed": (64, ("test_resnet", 64, "")),
    "transformer": (160, ("test_vit", 160, "avg")),
}


@torch.no_grad()
@pytest.mark.parametrize("case", AVERAGE)
def test_the_mean_of_an_average_pooled_towers_grid_is_its_token(case: str) -> None:
    size, arguments = AVERAGE[case]
    visual, grid = timm_tower(*arguments)
    images = pixels(size)
    got, token = grid(images).mean(dim=(1, 2)), visual(images)
    assert token.std() > 0.01
    torch.testing.assert_close(got, token, rtol=1e-5, atol=1e-5 * float(token.abs().max()))


@torch.no_grad()
def test_the_mean_of_an_average_pooled_transformers_grid_is_its_token() -> None:
    visual, grid = tower(**VIT, pool_type="avg")
    torch.testing.assert_close(grid(pixels()).mean(dim=(1, 2)), visual(pixels()), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_larger_input_gives_a_convolutional_tower_a_finer_grid_of_the_same_content() -> None:
    visual, grid = timm_tower("test_resnet", 64)
    assert grid.is_convolutional
    assert grid(pixels(64)).shape == (2, 2, 2, 24) and grid(pixels(160)).shape == (2, 5, 5, 24)
    torch.testing.assert_close(grid(pixels(160)).mean(dim=(1, 2)), visual(pixels(160)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_timm_transformer_takes_other_sizes_on_a_copy() -> None:
    visual, grid = timm_tower("test_vit", 160, "token")
    before = copy.deepcopy(visual.state_dict())
    assert not grid.is_convolutional
    own = grid(pixels(160))
    assert own.shape == (2, 10, 10, 24) and grid(pixels(96)).shape == (2, 6, 6, 24)
    assert torch.equal(grid(pixels(160)), own)
    assert all(torch.equal(before[name], value) for name, value in visual.state_dict().items())
    assert torch.equal(visual(pixels(160)), visual(pixels(160)))


@torch.no_grad()
def test_a_pooling_by_attention_is_asked_of_each_location_alone() -> None:
    """As in SigLIP: the pool's value path."""
    visual, grid = timm_tower("test_vit2", 160, "map", "none")
    trunk = visual.trunk
    assert trunk.attn_pool is not None
    tokens = trunk.forward_features(pixels(160))[0, trunk.num_prefix_tokens :]
    ignored = torch.zeros(trunk.num_prefix_tokens, tokens.shape[1])  # the trunk itself leaves these out of its pooling
    expected = torch.stack([trunk.forward_head(torch.cat((ignored, token[None]))[None])[0] for token in tokens])
    torch.testing.assert_close(grid(pixels(160))[0].flatten(0, 1), visual.head(expected), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_clips_resnet_gives_each_locations_value() -> None:
    visual, grid = tower(64, layers=(1, 1, 1, 1), width=8, head_width=32)
    images = pixels(64)
    maps = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(images)))))
    tokens = maps.flatten(2).mT + visual.attnpool.positional_embedding[1:]
    expected = visual.attnpool.c_proj(visual.attnpool.v_proj(tokens))
    got = grid(images)
    assert grid.is_convolutional and got.shape == (2, 2, 2, 24)
    torch.testing.assert_close(got.flatten(1, 2), expected, rtol=1e-5, atol=1e-5)
    assert grid(pixels(96)).shape == (2, 3, 3, 24)


def test_a_tower_without_a_grid_says_so() -> None:
    _, pooled = tower(**VIT, attentional_pool=True, attn_pooler_heads=2, attn_pooler_queries=4)
    with pytest.raises(TeacherError, match=r'"tiny" has no grid: its transformer pools by attention'):
        pooled(pixels())
    with pytest.raises(TeacherError, match="its image tower is a Linear"):
        GridTower(nn.Linear(2, 2), name="tiny", image_size=32)(pixels())
    _, grid = timm_tower("test_vit", 160)
    with pytest.raises(TeacherError, match=r"no grid at 100×100 pixels .* its own input is 160×160"):
        grid(pixels(100))


# --- teachers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded() -> Teacher:
    return load_teacher("embedded")


def test_the_embedded_teachers_grid_is_its_map(embedded: Teacher, photographs: dict[str, Path]) -> None:
    image = load_image(photographs["cat"]).image
    assert embedded.grid_size == CONVOLUTIONAL_GRID_SIZE > embedded.image_size
    grid = embedded.encode_grid(image)
    assert grid.shape == (6, 6, embedded.dim) and grid.dtype == torch.float32 and not grid.requires_grad
    assert grid.norm(dim=-1).std() > 0.1  # not normalised
    square = central_square(image, 300)
    coarse = embedded.encode_grid(square, size=embedded.image_size)
    token = embedded.encode_image(embedded.preprocess(square)[None])[0]
    assert coarse.shape == (3, 3, embedded.dim)
    torch.testing.assert_close(coarse.mean(dim=(0, 1)), token, rtol=1e-5, atol=1e-5)


def test_cells_are_where_the_image_has_them(embedded: Teacher, photographs: dict[str, Path]) -> None:
    """A change in one of 6 × 6 places changes the cells there most, within one cell; outside the square, none."""
    image = load_image(photographs["cat"]).image  # 451×300; its square starts at column 75, a place has 50 pixels
    before = embedded.encode_grid(image)
    for row, column in ((1, 5), (1, 0), (4, 0), (4, 5)):
        changed = image.copy()
        left, top = 75 + 50 * column, 50 * row
        changed.paste((255, 0, 0), (left, top, left + 50, top + 50))
        where = (embedded.encode_grid(changed) - before).norm(dim=-1)
        found = divmod(int(where.argmax()), 6)
        assert max(abs(found[0] - row), abs(found[1] - column)) <= 1
    outside = image.copy()
    outside.paste((255, 0, 0), (0, 0, 70, 300))
    assert torch.equal(embedded.encode_grid(outside), before)


def test_a_size_of_nothing_is_an_error(embedded: Teacher) -> None:
    with pytest.raises(TeacherError, match="no grid at 0×0 pixels"):
        embedded.encode_grid(Image.new("RGB", (20, 20)), size=0)


def test_teachers_and_fakes_keep_the_protocol(embedded: Teacher) -> None:
    for teacher in (embedded, FakeTeacher()):
        assert isinstance(teacher, Teacher) and isinstance(teacher, GridTeacher)
    assert FakeTeacher().encode_grid(Image.new("RGB", (9, 9))).shape == (4, 4, 16)
