"""Grey input: what the student sees, what it learns, what its checkpoint says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from apm.errors import UsageError
from apm.images.load import IMAGENET_MEAN, IMAGENET_STD, student_input
from apm.pretrain.cache import GridCache, build_cache
from apm.pretrain.checkpoint import read_checkpoint
from apm.pretrain.config import PretrainConfig
from apm.pretrain.images import open_images
from apm.pretrain.student import Student, grey
from apm.pretrain.trainer import Pretrainer
from apm.student.model import APM
from apm.student.position import grid_locations
from tests.pretraining import DATA, STUDENT, TRAINING, make_cache, make_folder, picture

GREY = replace(TRAINING, grey_input=True, held_out=0.25)
ALONE = {"data": "fake", "teacher": None, "grid_size": None}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> GridCache:
    """Images without a teacher's grids."""
    folder = tmp_path_factory.mktemp("data")
    return build_cache(open_images(make_folder(folder / "images")), None, folder / "cache", size=16)


def trainer(path: Path, cache: GridCache, config: PretrainConfig = GREY) -> Pretrainer:
    return Pretrainer(path, cache, STUDENT, config, data=ALONE, precision="fp32")


def photograph(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def pillows_grey(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")


def test_grey_is_the_luma_of_a_black_and_white_photograph() -> None:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    seen = grey(student_input(photograph(), 16)[None])
    pixels = 255 * (seen[0] * std + mean)
    torch.testing.assert_close(pixels[0], pixels[1], rtol=0, atol=1e-4)
    torch.testing.assert_close(pixels[0], pixels[2], rtol=0, atol=1e-4)
    wanted = torch.from_numpy(np.array(photograph().convert("L"), dtype=np.float32))
    assert (pixels[0] - wanted).abs().max() <= 0.51  # Pillow rounds to whole numbers
    torch.testing.assert_close(grey(seen), seen, rtol=0, atol=1e-5)


def test_colours_are_learned_of_grey_images_without_a_teacher(cache: GridCache, tmp_path: Path) -> None:
    mine = trainer(tmp_path / "c.safetensors", cache)
    numbers = np.array([7, 2])
    pixels = torch.from_numpy(cache.images[numbers]).double() / 255  # (2, 16, 16, 3)
    wanted = pixels.unflatten(1, (4, 4)).unflatten(3, (4, 4)).mean((2, 4)).flatten(1, 2)
    luma = (pixels @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)).float()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    seen = (luma[:, None] - mean) / std
    with torch.no_grad():
        (errors,) = mine.losses(numbers)
        guess = mine.model.rgb(seen, *grid_locations(STUDENT.grid))
    torch.testing.assert_close(errors, (guess - wanted.float()).square().mean((1, 2)), rtol=1e-5, atol=1e-7)
    assert mine.held_out_losses().keys() == {"rgb"} and mine.advance().keys() == {"rgb", "norm", "lr"}
    start = APM(STUDENT, seed=GREY.seed)
    trained = trainer(tmp_path / "d.safetensors", cache).model
    assert torch.equal(trained.mlp.head.bias, start.mlp.head.bias)  # no features to begin at
    colours = cache.images[mine.train].reshape(-1, 3).mean(0) / 255
    np.testing.assert_allclose(trained.rgb_head.layer3.bias.detach(), colours, rtol=1e-5)


def test_it_learns(cache: GridCache, tmp_path: Path) -> None:
    mine = trainer(tmp_path / "c.safetensors", cache, replace(GREY, steps=150))
    before = mine.losses(mine.train)[0].mean().item()
    for _ in range(150):
        mine.advance()
    assert mine.losses(mine.train)[0].mean().item() < 0.5 * before


def test_with_a_teacher_both_are_learned(tmp_path: Path) -> None:
    grids = make_cache(tmp_path)
    grey_one, other = (
        Pretrainer(tmp_path / f"{number}", grids, STUDENT, config, data=DATA, precision="fp32")
        for number, config in enumerate((GREY, replace(GREY, grey_input=False)))
    )
    numbers = np.arange(4)
    for one, two in zip(grey_one.losses(numbers), other.losses(numbers), strict=True):
        assert (one - two).abs().max() > 1e-7  # same weights, another input
    assert grey_one.advance().keys() == {"grid", "rgb", "norm", "lr"}


def test_an_interrupted_training_ends_in_the_same_bytes(cache: GridCache, tmp_path: Path) -> None:
    whole, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
    trainer(whole, cache).run()
    first = trainer(half, cache)
    for _ in range(3):
        first.advance()
    first.save()
    again = trainer(half, cache)
    assert again.step == 3
    again.run()
    assert half.read_bytes() == whole.read_bytes()


def test_the_checkpoint_says_that_the_input_is_grey(cache: GridCache, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    first = trainer(path, cache)
    first.advance()
    first.save()
    assert read_checkpoint(path).settings["grey_input"] is True
    with pytest.raises(UsageError, match="grey_input: True there, False here"):
        trainer(path, cache, replace(GREY, grey_input=False))
    student = Student.load(path)
    assert student.grey_input and student.describe().endswith("teacher none, seed 3, grey input")
    for number in range(3):  # red and grey of one luma are the same to it
        image = picture(number)
        torch.testing.assert_close(student.column(image), student.column(pillows_grey(image)), rtol=0, atol=0.02)
    coloured = student.model.column(student_input(picture(2), 16)[None])
    assert (student.column(picture(2)) - coloured).abs().max() > 0.02


def test_grey_input_without_colours_to_learn_is_refused() -> None:
    with pytest.raises(UsageError, match="Grey input is for learning colours: rgb_weight must be above 0"):
        PretrainConfig(grey_input=True, rgb_weight=0.0)
