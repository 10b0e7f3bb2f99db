"""Measures of islands, on fields whose islands are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from apm.errors import ImageError, UsageError
from apm.student import islands


@pytest.fixture
def quadrants() -> np.ndarray:
    """A field of 6 × 8: four rectangles of 2 or 4 rows by 3 or 5 columns, each of one vector, at right angles."""
    field = np.zeros((6, 8, 4))
    for number, (rows, cols) in enumerate(
        [
            (slice(0, 2), slice(0, 3)),
            (slice(0, 2), slice(3, 8)),
            (slice(2, 6), slice(0, 3)),
            (slice(2, 6), slice(3, 8)),
        ]
    ):
        field[rows, cols, number] = 1.0 + number  # the length plays no part
    return field


def test_four_quadrants_are_four_regions_of_known_sizes(quadrants: np.ndarray) -> None:
    labels = islands.regions(quadrants, 0.9)
    assert sorted(np.bincount(labels.ravel()).tolist()) == [6, 10, 12, 20]
    assert len({labels[0, 0], labels[0, 7], labels[5, 0], labels[5, 7]}) == 4
    found = islands.measure(quadrants)
    assert (found.regions, found.largest) == (4, 20 / 48)
    # 42 + 40 pairs of neighbours; 6 cross between columns 2 and 3, 8 between rows 1 and 2, with cosine 0
    assert found.cosine == pytest.approx((82 - 14) / 82)


def test_equal_parts_that_do_not_touch_are_two_regions() -> None:
    field = np.zeros((3, 5, 2))
    field[..., 0] = 1
    field[:, 2] = (0, 1)
    assert islands.measure(field).regions == 3
    corners = np.zeros((2, 2, 2))
    corners[0, 0, 0] = corners[1, 1, 0] = corners[0, 1, 1] = corners[1, 0, 1] = 1
    assert islands.measure(corners).regions == 4  # the diagonal is no neighbour
    assert islands.measure(corners).regions == corners.shape[0] * corners.shape[1]


def test_neighbours_cosines_are_exact() -> None:
    angles = np.radians([[0, 30, 90], [60, 90, 270]])
    right, below = islands.neighbour_cosines(np.stack([np.cos(angles), np.sin(angles)], axis=-1) * 7)
    np.testing.assert_allclose(right, np.cos(np.radians([[30, 60], [30, 180]])), atol=1e-12)
    np.testing.assert_allclose(below, np.cos(np.radians([[60, 60, 180]])), atol=1e-12)


@pytest.mark.parametrize(("threshold", "regions"), [(0.86, 1), (0.88, 3), (-1.0, 1)])
def test_the_threshold_joins_from_its_value_on(threshold: float, regions: int) -> None:
    angles = np.radians([[0, 30, 60]])  # cos 30° = 0.866
    field = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    assert islands.measure(field, threshold=threshold).regions == regions


def test_a_constant_field_is_one_region_at_any_threshold() -> None:
    field = np.full((4, 4, 3), 1 / 3, dtype=np.float32)
    assert islands.measure(field, threshold=1.0).regions == 1
    centred = islands.measure(field, centred=True)  # nothing is left, and nothing agrees with nothing
    assert (centred.cosine, centred.regions) == (0, 16)


def test_centred_measures_see_what_a_common_part_hides(quadrants: np.ndarray) -> None:
    shifted = quadrants + 100
    assert islands.measure(shifted).regions == 1
    assert islands.measure(shifted, centred=True).regions == 4


@pytest.mark.parametrize("bad", [np.ones((3, 4)), np.ones((0, 4, 2)), np.full((2, 2, 2), np.nan)])
def test_what_is_no_field_is_told(bad: np.ndarray) -> None:
    with pytest.raises(UsageError, match=r"field"):
        islands.measure(bad)


def test_a_threshold_that_is_no_cosine_is_told(quadrants: np.ndarray) -> None:
    with pytest.raises(UsageError, match=r"1\.5"):
        islands.measure(quadrants, threshold=1.5)


def test_clusters_find_the_quadrants_and_agree_with_them(quadrants: np.ndarray) -> None:
    noisy = quadrants + 0.01 * np.random.default_rng(0).standard_normal(quadrants.shape)
    found = islands.clusters(noisy, 4)
    assert islands.agreement(found, islands.regions(quadrants, 0.9)) == pytest.approx(1)
    # a common part and the scale make no difference
    np.testing.assert_array_equal(islands.clusters(1e-4 * noisy + 3, 4), found)
    assert islands.clusters(quadrants, 40).max() == 3  # no more clusters than there are vectors
    assert islands.clusters(np.ones((5, 5, 2)), 4).max() == 0


def test_agreement_is_about_0_by_chance_and_1_for_the_same() -> None:
    rng = np.random.default_rng(0)
    one = rng.integers(0, 5, (40, 40))
    assert islands.agreement(one, 4 - one) == pytest.approx(1)
    assert abs(islands.agreement(one, rng.integers(0, 5, (40, 40)))) < 0.02


def test_contrast_is_exact_and_is_not_gained_by_being_compact(quadrants: np.ndarray) -> None:
    field = np.zeros((4, 4, 3))
    field[:, :2, 0], field[:, 2:, 1], field[..., 2] = 1, 1, 50  # halves, and a part that all share
    halves = np.repeat([[0, 0, 1, 1]], 4, axis=0)
    assert islands.boundary_contrast(field, halves) == pytest.approx(2)  # 1 within, -1 across
    rows = halves.T
    # of 4 across these rows none crosses the halves; of 20 within, 4 do and have a cosine of -1
    assert islands.boundary_contrast(field, rows) == pytest.approx(12 / 20 - 1)
    with pytest.raises(UsageError, match="no contrast"):
        islands.boundary_contrast(field, np.zeros((4, 4)))


def test_superpixels_follow_the_image() -> None:
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[:32, :32], pixels[:32, 32:], pixels[32:, :32], pixels[32:, 32:] = 0, (255, 0, 0), (0, 255, 0), 255
    found = islands.superpixels(Image.fromarray(pixels), 8, 4)
    assert found.shape == (8, 8)
    expected = np.kron([[0, 1], [2, 3]], np.ones((4, 4), dtype=int))
    assert islands.agreement(found, expected) == pytest.approx(1)


def test_one_superpixel_alone_is_refused() -> None:
    image = Image.new("RGB", (64, 64), "white")
    for column in range(8, 64, 16):  # strips thinner than any superpixel
        image.paste("black", (column, 0, column + 8, 64))
    with pytest.raises(ImageError, match="of 4 superpixels only one is seen at 16 × 16 locations"):
        islands.superpixels(image, 16, 4)


def test_random_targets_have_the_lengths_and_other_directions() -> None:
    target = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 6)[:, None]
    drawn = islands.random_like(target, 0)
    torch.testing.assert_close(drawn.norm(dim=-1), target.norm(dim=-1))
    assert torch.cosine_similarity(drawn, target, dim=-1).abs().max() < 0.5
    assert torch.equal(drawn, islands.random_like(target, 0))
    assert not torch.equal(drawn, islands.random_like(target, 1))


def test_shuffled_patches_are_the_same_patches_elsewhere() -> None:
    tiles = np.arange(16, dtype=np.uint8).reshape(4, 4) * 15
    image = Image.fromarray(np.kron(tiles, np.ones((6, 6), dtype=np.uint8))).convert("RGB")
    mixed = islands.shuffle_patches(image, 4, seed=0)
    assert mixed.size == image.size
    values = np.asarray(mixed)[3::6, 3::6, 0]
    assert sorted(values.ravel().tolist()) == sorted(tiles.ravel().tolist())
    assert (values != tiles).sum() > 8
    assert (np.asarray(mixed)[::6, ::6, 0] == values).all()  # whole patches
    assert np.array_equal(mixed, islands.shuffle_patches(image, 4, seed=0))
    assert not np.array_equal(mixed, islands.shuffle_patches(image, 4, seed=1))
    assert islands.shuffle_patches(image.crop((0, 0, 22, 22)), 4, seed=0).size == (24, 24)


def test_the_embedding_is_the_same_for_the_same_seed_and_parts_the_parts(quadrants: np.ndarray) -> None:
    noisy = quadrants + 0.01 * np.random.default_rng(0).standard_normal(quadrants.shape)
    laid = islands.embed(noisy, seed=3, perplexity=5)
    assert laid.shape == (48, 2)
    np.testing.assert_array_equal(laid, islands.embed(noisy, seed=3, perplexity=5))
    labels = islands.regions(quadrants, 0.9).ravel()
    centres = np.stack([laid[labels == label].mean(axis=0) for label in range(4)])
    nearest = ((laid[:, None] - centres) ** 2).sum(-1).argmin(1)
    assert (nearest == labels).mean() > 0.95
    assert not islands.embed(np.ones((4, 4, 3))).any()


def test_variation_knows_directions_and_rows_and_columns() -> None:
    rows, cols, direction = np.sin(np.arange(6.0)), np.cos(2 * np.arange(5.0)), np.array([3.0, -1.0, 2.0])
    added = rows[:, None] + cols
    assert islands.variation(7 + added[..., None] * direction) == pytest.approx((1, 1))
    times = (rows - rows.mean())[:, None] * (cols - cols.mean())  # a product of both is no sum
    assert islands.variation(times[..., None] * direction) == pytest.approx((1, 0))
    three = np.zeros((4, 4, 2))
    three[:, :2, 0], three[:2, :, 1] = 2, 1  # by columns along one axis, and half as much by rows along the other
    assert islands.variation(three) == pytest.approx((0.8, 1))
    assert islands.variation(np.ones((3, 3, 2))) == (0, 0)
