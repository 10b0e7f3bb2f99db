"""Augmented views: what they depend on, what they show, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp  # type: ignore[import-untyped, unused-ignore]
from torchvision.transforms import RandomResizedCrop

from apm.errors import UsageError
from apm.images.crops import ASPECT_RATIOS, crop_box, view_generator
from apm.test_time.views import augmented_view, pixels_id, views
from tests.fakes import FakeTeacher


@pytest.fixture
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_view_zero_is_the_teachers_own_preprocess(image: Image.Image) -> None:
    teacher = FakeTeacher()
    made = views(image, 3, teacher, seed=0, sample_id="a")
    assert made.shape == (3, 3, teacher.image_size, teacher.image_size)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made[0], teacher.preprocess(image), rtol=0, atol=0)


def test_an_image_is_named_by_its_pixels_alone(image: Image.Image) -> None:
    reshaped = Image.frombytes("RGB", image.size[::-1], image.tobytes())
    others = [image.rotate(180), image.convert("L"), image.crop((0, 0, 90, 59)), reshaped]
    assert pixels_id(image.copy()) == pixels_id(image)
    assert len({pixels_id(one) for one in (image, *others)}) == 5


def test_a_view_depends_on_seed_sample_and_index_alone(image: Image.Image) -> None:
    teacher = FakeTeacher()
    many = views(image, 9, teacher, seed=1, sample_id="a")
    np.random.seed(5)
    torch.manual_seed(5)
    assert torch.equal(views(image, 4, teacher, seed=1, sample_id="a"), many[:4])
    assert torch.equal(views(image, 9, teacher, seed=1, sample_id="a", start=6), many[6:])
    assert not torch.equal(views(image, 9, teacher, seed=2, sample_id="a")[1:], many[1:])
    assert not torch.equal(views(image, 9, teacher, seed=1, sample_id="b")[1:], many[1:])


def test_seed_index_and_sample_do_not_run_into_each_other() -> None:
    draws = [view_generator(*key).random() for key in [(1, "2|x", 3), (1, "x", 32), (13, "x", 2), (1, "\udcff", 3)]]
    assert len(set(draws)) == 4


def test_crops_lie_inside_and_keep_area_and_ratio() -> None:
    generator = np.random.default_rng(0)
    areas = []
    for _ in range(2000):
        left, top, right, bottom = crop_box(400, 300, generator, 0.25)
        assert 0 <= left < right <= 400
        assert 0 <= top < bottom <= 300
        areas.append((right - left) * (bottom - top) / (400 * 300))
        assert ASPECT_RATIOS[0] * 0.98 < (right - left) / (bottom - top) < ASPECT_RATIOS[1] * 1.02
    assert 0.24 < min(areas) < 0.27
    assert max(areas) > 0.9


@pytest.mark.parametrize(("width", "height"), [(400, 300), (37, 61), (1000, 50), (50, 1000), (201, 10), (3, 5)])
def test_a_view_is_torchvisions_random_resized_crop(width: int, height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    theirs = RandomResizedCrop(32)  # bilinear by default
    for index in range(1, 20):
        generator = view_generator(0, "a", index)
        left, top, right, bottom = crop_box(width, height, generator, 0.08)
        flipped = generator.random() < 0.5
        monkeypatch.setattr(theirs, "get_params", lambda *_, box=(top, left, bottom - top, right - left): box)
        expected = np.asarray(theirs(image))
        ours = augmented_view(image, index, seed=0, sample_id="a", size=32, mean=(0,) * 3, std=(1,) * 3)
        pixels = np.rint(ours.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        np.testing.assert_array_equal(pixels, expected[:, ::-1] if flipped else expected)


@pytest.mark.parametrize(("width", "height"), [(1000, 50), (50, 1000), (201, 3), (3, 202)])
def test_the_crop_of_an_image_too_narrow_for_any_draw_is_torchvisions(width: int, height: int) -> None:
    # Crops of the whole area fit only where the ratio of the image itself is allowed.
    top, left, h, w = RandomResizedCrop.get_params(Image.new("RGB", (width, height)), [1.0, 1.0], list(ASPECT_RATIOS))
    box = crop_box(width, height, np.random.default_rng(0), 1.0)
    assert box == (left, top, left + w, top + h)


def test_crops_are_drawn_as_torchvision_draws_them() -> None:
    image = Image.new("RGB", (123, 77))
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], list(ASPECT_RATIOS)) for _ in range(4000)])
    generator = np.random.default_rng(0)
    boxes = np.array([crop_box(123, 77, generator, 0.08) for _ in range(4000)])
    ours = np.stack([boxes[:, 1], boxes[:, 0], boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]], axis=1)
    for one, other in zip(ours.T, theirs.T, strict=True):  # top, left, height, width
        assert ks_2samp(one, other).pvalue > 1e-3


@pytest.mark.parametrize(("width", "height"), [(1000, 2), (2, 1000), (1, 1)])
def test_a_narrow_image_is_cropped_all_the_same(width: int, height: int) -> None:
    view = augmented_view(
        Image.new("RGB", (width, height), (255, 0, 0)), 1, seed=0, sample_id="", size=8, mean=(0,) * 3, std=(1,) * 3
    )
    torch.testing.assert_close(view, torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand(3, 8, 8))


def test_a_view_is_normalised_with_the_teachers_statistics() -> None:
    grey = Image.new("RGB", (20, 20), (51, 102, 204))
    view = augmented_view(grey, 1, seed=0, sample_id="", size=4, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    torch.testing.assert_close(view[:, 0, 0], torch.tensor([0.2, 0.8, 0.25]))


def test_views_are_flipped_about_half_the_time() -> None:
    ramp = Image.fromarray(np.tile(np.arange(0, 250, 5, dtype=np.uint8)[None, :, None], (50, 1, 3)))
    slopes = []
    for index in range(1, 201):
        view = augmented_view(ramp, index, seed=0, sample_id="ramp", size=8, mean=(0,) * 3, std=(1,) * 3)
        slopes.append(float(view[0, 0, -1] - view[0, 0, 0]))
    assert 75 <= sum(slope < 0 for slope in slopes) <= 125
    assert all(slope != 0 for slope in slopes)


@pytest.mark.parametrize(("count", "area"), [(0, 0.5), (2, 0.0), (2, 1.1)])
def test_impossible_views_are_refused(image: Image.Image, count: int, area: float) -> None:
    with pytest.raises(UsageError, match=str(count if count == 0 else area)):
        views(image, count, FakeTeacher(), seed=0, sample_id="a", min_area=area)


def test_a_teacher_whose_input_is_not_square_has_no_views(image: Image.Image) -> None:
    teacher = FakeTeacher()
    teacher.input_shape = (32, 48)  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=r"fake takes images of 48×32 pixels.*square input"):
        views(image, 2, teacher, seed=0, sample_id="a")
    assert len(views(image, 1, teacher, seed=0, sample_id="a")) == 1  # the image itself
