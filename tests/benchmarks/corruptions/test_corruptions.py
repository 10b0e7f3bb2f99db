"""The corruptions against what the reference gives, and against what they promise."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage import color, transform
from torchvision.transforms import CenterCrop, Compose, Resize

from apm.benchmarks.corruptions import CORRUPTIONS, centre_crop, corrupt, corrupt_image
from apm.benchmarks.corruptions.blur import _MOTION, blur_levels_along, clipped_zoom, motion_kernel
from apm.benchmarks.corruptions.digital import brightness, displace, elastic_transform
from apm.benchmarks.corruptions.weather import frost_texture, plasma
from apm.errors import UsageError
from tests.places import GOLDEN

REFERENCE = Path(os.environ.get("APM_CORRUPTIONS_GOLDEN") or GOLDEN / "corruptions_cat.npz")

MAGICK = GOLDEN / "motion_blur_magick.npz"
"""What ImageMagick gives; written by tests/benchmarks/make_motion_golden.py."""
FIXED = ("brightness", "contrast", "defocus_blur", "jpeg_compression", "pixelate", "zoom_blur")
RANDOM = (
    "gaussian_noise",
    "impulse_noise",
    "fog",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("shot_noise", "glass_blur", "motion_blur", "snow")),
)
DRAWS = 24  # as many as the golden file's figures were made of
UNUSED = np.random.Generator(np.random.PCG64(0))


@pytest.fixture(scope="module")
def golden() -> dict[str, NDArray[np.generic]]:
    with np.load(REFERENCE) as arrays:
        return {name: arrays[name] for name in arrays.files}


def figures(pictures: list[NDArray[np.uint8]], image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(draws, 3): mean, standard deviation, mean absolute change of each picture."""
    return np.array([(p.mean(), p.std(), np.abs(p.astype(float) - image).mean()) for p in pictures])


def assert_agree(ours: NDArray[np.float64], theirs: NDArray[np.floating], names: str) -> None:
    """Compare means over as many draws on both sides: 4.5 standard errors of the difference, plus a tenth of a level.

    The file gives the spread of the change only; the spread of the two other figures is taken from our own draws.
    """
    spread = ours.std(axis=0)
    spread[2] = max(spread[2], theirs[3])
    allowed = 4.5 * spread * np.sqrt(2 / DRAWS) + 0.1
    off = np.abs(ours.mean(axis=0) - theirs[:3])
    assert (off <= allowed).all(), f"{names}: off by {off}, allowed {allowed}"


@pytest.mark.parametrize("name", FIXED)
def test_fixed_corruption_equals_the_reference(name: str, golden: dict[str, NDArray[np.uint8]]) -> None:
    allowed = 2.0 if name == "jpeg_compression" else 0.1  # the codec may differ between builds; arithmetic may not
    for level, expected in zip((1, 3, 5), golden[name], strict=True):
        ours = corrupt(golden["image"], name, level, seed=0, image_id="cat")
        assert np.abs(ours.astype(float) - expected).mean() <= allowed, f"{name} level {level}"


@pytest.mark.parametrize("name", RANDOM)
def test_random_corruption_has_the_figures_of_the_reference(name: str, golden: dict[str, NDArray[np.uint8]]) -> None:
    image = golden["image"]
    for level, expected in enumerate(golden[f"{name}_stats"], start=1):
        pictures = [corrupt(image, name, level, seed=7, image_id=str(draw)) for draw in range(DRAWS)]
        assert_agree(figures(pictures, image), expected, f"{name} level {level}")


@pytest.mark.slow
def test_elastic_displacement_has_the_figures_of_its_other_variant(golden: dict[str, NDArray[np.uint8]]) -> None:
    # The file's figures of elastic_transform are of the variant in the imagecorruptions package: no affine map, and the
    # parameters below. Ours is ImageNet-C's own (`test_elastic_transform_is_…`); both share the displacement.
    image = golden["image"]
    for alpha, expected in zip((12.5, 16.25, 21.25, 25.0, 30.0), golden["elastic_transform_stats"], strict=True):
        rng = np.random.Generator(np.random.PCG64(3))
        moved = [displace(image.astype(np.float32) / 255, alpha, 2.24, 1.12, rng) for _ in range(DRAWS)]
        pictures = [(np.clip(m, 0, 1) * 255 + 1e-3).astype(np.uint8) for m in moved]
        assert_agree(figures(pictures, image), expected, f"displacement {alpha}")


@pytest.mark.slow
def test_frost_is_near_the_reference_though_its_pictures_are_drawn(golden: dict[str, NDArray[np.uint8]]) -> None:
    # Loose on purpose: five drawn pictures stand for five photographs. Half the spread over draws, and 5 grey levels.
    image = golden["image"]
    for level, expected in enumerate(golden["frost_stats"], start=1):
        ours = figures([corrupt(image, "frost", level, seed=7, image_id=str(i)) for i in range(4 * DRAWS)], image)
        assert (np.abs(ours.mean(axis=0) - expected[:3]) <= expected[3] / 2 + 5).all(), f"level {level}"
        assert abs(ours[:, 1].mean() - expected[1]) < 4, "contrast"


@pytest.mark.parametrize("sigma", [2.44, 170.8])
def test_displacement_equals_filtering(sigma: float) -> None:
    image = np.random.default_rng(0).random((48, 40, 3), dtype=np.float32)
    ours = displace(image, 20.0, sigma, 1.0, np.random.default_rng(1))
    draws = np.random.default_rng(1).uniform(-1, 1, size=(2, 48, 40))
    dx, dy = (20 * ndimage.gaussian_filter(draw, sigma, mode="reflect", truncate=3) for draw in draws)
    rows, columns = np.mgrid[:48, :40]
    for channel in range(3):
        expected = ndimage.map_coordinates(image[..., channel], [rows + dy, columns + dx], order=1, mode="reflect")
        np.testing.assert_allclose(ours[..., channel], expected, atol=2e-4)


@pytest.mark.parametrize(
    ("level", "alpha", "sigma", "reach"),
    [
        (1, 488, 170.8, 24.4),
        (2, 488, 19.52, 48.8),
        (3, 12.2, 2.44, 4.88),
        (4, 17.08, 2.44, 4.88),
        (5, 29.28, 2.44, 4.88),
    ],
)
def test_elastic_transform_is_an_affine_map_of_three_points_then_the_displacement(
    level: int, alpha: float, sigma: float, reach: float
) -> None:
    rows, columns = np.mgrid[:224, :224].astype(np.float32) / 300
    image = np.stack([rows, columns, 0.3 + rows * columns], axis=2)
    rng, same = np.random.default_rng(5), np.random.default_rng(5)
    ours = elastic_transform(image, level, rng)
    corners = np.array([[186, 186], [186, 38], [38, 38]], dtype=float)  # (x, y): the centre ± a third
    moved = corners + same.uniform(-reach, reach, size=(3, 2))
    backward = transform.estimate_transform("affine", moved, corners).params
    y, x = np.mgrid[:224, :224]
    source_x, source_y, _ = np.tensordot(backward, np.stack([x, y, np.ones_like(x)]), axes=1)
    warped = [ndimage.map_coordinates(image[..., c], [source_y, source_x], order=1, mode="mirror") for c in range(3)]
    expected = displace(np.stack(warped, axis=2).astype(np.float32), alpha, sigma, 1.0, same)
    assert np.abs(ours - expected).mean() < 1e-4


def test_zoom_equals_scipys() -> None:
    image = np.random.default_rng(0).random((224, 224, 2), dtype=np.float32)
    kept = int(np.ceil(224 / 1.13))
    first = (224 - kept) // 2
    enlarged = ndimage.zoom(image[first : first + kept, first : first + kept], (1.13, 1.13, 1), order=1)
    trim = (len(enlarged) - 224) // 2
    np.testing.assert_allclose(clipped_zoom(image, 1.13), enlarged[trim : trim + 224, trim : trim + 224], atol=1e-5)


def test_brightness_equals_the_way_through_hsv() -> None:
    image = np.random.default_rng(0).random((8, 8, 3), dtype=np.float32)
    image[0] = 0
    hsv = color.rgb2hsv(image)
    hsv[..., 2] = np.clip(hsv[..., 2] + 0.3, 0, 1)
    np.testing.assert_allclose(brightness(image, 3, UNUSED), color.hsv2rgb(hsv), atol=1e-6)


def test_motion_kernel_is_one_sided_and_sums_to_one() -> None:
    kernel = motion_kernel(10, 3.0, 0.0)
    assert kernel.sum() == pytest.approx(1, abs=1e-6)
    row, column = np.argwhere(kernel == kernel.max())[0]
    assert (row, column) == (21, 21)
    assert kernel[21, :21].sum() == 0 and kernel[21, 21:].sum() == pytest.approx(1, abs=1e-6)
    assert np.count_nonzero(motion_kernel(10, 3.0, 90.0).sum(axis=0)) == 1


def test_motion_blur_equals_imagemagicks() -> None:
    with np.load(MAGICK) as arrays:
        image, angles, pictures = arrays["image"], arrays["angles"], arrays["pictures"]
    for (radius, sigma), row in zip(_MOTION, pictures, strict=True):
        for degrees, expected in zip(angles, row, strict=True):
            ours = blur_levels_along(image.astype(np.float32) / np.float32(255), radius, sigma, float(degrees)) * 255
            off = np.abs(np.rint(ours) - expected)
            # One value may fall the other way: sums in another order differ in their last bit.
            assert off.max() <= 1 and np.count_nonzero(off) <= 1, f"{radius}x{sigma}, {degrees} degrees"


def test_plasma_spans_zero_to_one_and_gets_smoother_with_decay() -> None:
    rough, smooth = (plasma(64, decay, np.random.default_rng(0)) for decay in (1.4, 2.0))
    assert rough.min() == smooth.min() == 0 and rough.max() == smooth.max() == 1
    assert np.abs(np.diff(rough)).mean() > 2 * np.abs(np.diff(smooth)).mean()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruption_depends_on_seed_and_id_and_nothing_else(name: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    kept = image.copy()
    first = corrupt(image, name, 3, seed=1, image_id="a")
    other = corrupt(image, name, 3, seed=1, image_id="b")
    again = corrupt(image, name, 3, seed=1, image_id="a")
    assert first.dtype == np.uint8 and first.shape == image.shape
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(image, kept)
    reseeded = corrupt(image, name, 3, seed=2, image_id="a")
    for different in (other, reseeded):
        assert np.array_equal(first, different) == (name in FIXED)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_higher_level_changes_more_on_the_whole(name: str, golden: dict[str, NDArray[np.uint8]]) -> None:
    image = golden["image"]

    def change(level: int) -> float:
        draws = 1 if name in FIXED else 6
        pictures = [corrupt(image, name, level, seed=0, image_id=str(i)) for i in range(draws)]
        return float(figures(pictures, image)[:, 2].mean())

    if name == "elastic_transform":  # levels 1 and 2 bend the whole image, 3 to 5 its detail: two scales
        assert change(2) > change(1) and change(5) > change(3)
    else:
        assert change(5) > change(1)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_oblong_images_work(name: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 72, 3), dtype=np.uint8)
    assert corrupt(image, name, 5, seed=0, image_id="x").shape == image.shape


def test_frost_textures_are_five_different_pictures() -> None:
    means = [frost_texture(index).mean() for index in range(5)]
    assert all(b - a > 0.04 for a, b in itertools.pairwise(means))


def test_wrong_names_levels_and_images_are_refused() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(UsageError, match='Did you mean "gaussian_noise"'):
        corrupt(image, "gausian_noise", 1, seed=0, image_id="x")
    for level in (0, 6):
        with pytest.raises(UsageError, match=f"level {level}"):
            corrupt(image, "fog", level, seed=0, image_id="x")
    for bad in (image[..., 0], image.astype(float), image[:20]):
        with pytest.raises(UsageError, match="Expected an image"):
            corrupt(bad, "fog", 1, seed=0, image_id="x")


@pytest.mark.parametrize("resize", [256, 224])
def test_centre_crop_equals_torchvisions(resize: int) -> None:
    rng = np.random.default_rng(resize)
    theirs = Compose([Resize(resize), CenterCrop(224)])  # bilinear and antialiased by default
    for width, height in rng.integers(40, 520, size=(60, 2)).tolist():
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        np.testing.assert_array_equal(centre_crop(image, resize=resize), theirs(image), f"{width}×{height}")


def test_centre_crop_keeps_the_middle() -> None:
    wide = Image.new("RGB", (600, 300), "red")
    wide.paste("blue", (270, 0, 330, 300))
    cropped = np.asarray(centre_crop(wide))
    assert cropped.shape == (224, 224, 3)
    assert tuple(cropped[112, 112]) == (0, 0, 255) and tuple(cropped[112, 0]) == (255, 0, 0)
    ramp = Image.linear_gradient("L").convert("RGB")  # 256×256, black at the top, white at the bottom
    assert np.asarray(centre_crop(ramp))[0, 0, 0] == 16 and np.asarray(centre_crop(ramp, resize=224))[0, 0, 0] <= 1
    assert corrupt_image(wide, "contrast", 1, seed=0, image_id="w").size == (224, 224)
