"""Colours laid on a photograph: its lightness stays, the whole of it is seen, seams and sizes do not matter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.color import lab2rgb, rgb2lab
from torch.nn import functional

from apm.errors import UsageError
from apm.pretrain import colouring
from apm.pretrain.colouring import chroma, colourise, lab, whole, with_chroma
from tests.pretraining import STUDENT, grey_student, picture


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def exact(image: Image.Image) -> np.ndarray:
    return rgb2lab(np.asarray(image) / 255)


@pytest.mark.parametrize("spread", [5, 60, 200])
def test_lightness_is_the_photographs_own_whatever_the_colours(spread: int) -> None:
    image = photograph(37, 23)
    found = np.random.default_rng(1).normal(0, spread, (4, 4, 2)).astype(np.float32)
    coloured = with_chroma(image, found)
    assert coloured.size == image.size
    assert np.abs(exact(coloured)[..., 0] - exact(image)[..., 0]).max() <= 0.51
    assert np.abs(exact(coloured)[..., 1:]).mean() > 2


def test_a_photographs_own_colours_give_it_back() -> None:
    image = photograph(30, 20)
    again = with_chroma(image.copy(), lab(np.asarray(image))[..., 1:])
    assert np.abs(np.asarray(again, dtype=int) - np.asarray(image)).max() <= 1


def test_colours_are_interpolated_between_the_places() -> None:
    found = np.random.default_rng(2).normal(0, 6, (4, 4, 2)).astype(np.float32)
    coloured = exact(with_chroma(Image.new("RGB", (44, 28), (128, 128, 128)), found))[..., 1:]
    planes = torch.from_numpy(found).permute(2, 0, 1)[None]
    wanted = functional.interpolate(planes, size=(28, 44), mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    assert np.abs(coloured - wanted.numpy()).max() < 0.7  # bytes of sRGB are so far apart here


def test_strips_leave_no_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    image, found = photograph(20, 33), np.random.default_rng(3).normal(0, 25, (4, 4, 2)).astype(np.float32)
    at_once = np.asarray(with_chroma(image, found), dtype=int)
    monkeypatch.setattr(colouring, "_STRIP", 20 * 4)
    assert np.abs(np.asarray(with_chroma(image, found), dtype=int) - at_once).max() <= 1


def test_colours_are_the_students_at_its_places() -> None:
    mine, image = grey_student(), picture(4, side=40)
    columns = mine.columns(whole(image, STUDENT.image_size)[None])
    grid = torch.arange(4.0).repeat_interleave(4), torch.arange(4.0).repeat(4)
    said = mine.field(columns, *grid)[1][0].clamp(0, 1).reshape(4, 4, 3).double().numpy()
    np.testing.assert_allclose(chroma(mine, columns, 4)[0], rgb2lab(said)[..., 1:], atol=2e-3)
    assert chroma(mine, columns, 9).shape == (1, 9, 9, 2)
    by_default, finer = (np.asarray(colourise(mine, image, places=places), dtype=int) for places in (None, 9))
    assert np.array_equal(by_default, np.asarray(with_chroma(image, chroma(mine, columns, 4)[0])))
    assert np.abs(by_default - finer).max() > 0


def test_the_whole_of_a_wide_photograph_is_seen_and_none_of_its_colours() -> None:
    mine, wide = grey_student(), photograph(60, 20)
    left = wide.copy()
    left.paste((0, 0, 0), (0, 0, 15, 20))  # outside of the central square
    right = wide.copy()
    right.paste((0, 0, 0), (45, 0, 60, 20))
    column = mine.columns(whole(wide, 16)[None])
    assert (mine.columns(whole(right, 16)[None]) - column).abs().max() > 0.1
    assert (mine.columns(whole(left, 16)[None]) - column).abs().max() > 0.1
    grey = wide.convert("L").convert("RGB")
    torch.testing.assert_close(mine.columns(whole(grey, 16)[None]), column, rtol=0, atol=0.05)
    first, second = (exact(colourise(mine, one))[..., 1:] for one in (wide, grey))
    assert np.abs(first - second).mean() < 1  # coloured or not, the photograph gets the same colours


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(UsageError, match=r"was trained on colours; `apm pretrain --grey-input` trains one"):
        colourise(grey_student(grey_input=False), picture(1))
    for places in (0, 1025):
        with pytest.raises(UsageError, match=f"must be from 1 to 1024, not {places}"):
            colourise(grey_student(), picture(1), places=places)


def test_lab_is_that_of_its_inverse() -> None:
    rgb = np.random.default_rng(4).random((5, 7, 3)).astype(np.float32)
    np.testing.assert_allclose(lab2rgb(lab(rgb).astype(np.float64)), rgb, atol=1e-4)
    bytes_ = (255 * rgb).astype(np.uint8)
    np.testing.assert_allclose(lab(bytes_), rgb2lab(bytes_), atol=1e-3)
