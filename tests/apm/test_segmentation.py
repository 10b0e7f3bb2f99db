"""Segmentation of whole images: tiles, the lattice, borders between places, small pieces, and what is measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from apm import Classifier, StudentOptions
from apm.errors import UsageError
from apm.segmentation import Probable, blended, parts_of, segment_image, tiles_of, without_small
from apm.student.field import SavedField
from apm.student.position import grid_locations
from apm.test_time.trainer import TestTimeTrainer
from apm.text.zeroshot import ZeroShotHead
from tests.apm.student.test_engine_losses import ADAPT, MODEL, batch
from tests.fakes import FakeTeacher

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def head(labels: tuple[str, ...] = tuple(COLOURS), scale: float = 50.0) -> ZeroShotHead:
    built = ZeroShotHead.build(FakeTeacher(3, default_labels=labels), labels, ("{}",))
    features = torch.tensor([COLOURS[label] for label in labels], dtype=torch.float32) / 255
    return replace(built, features=features, logit_scale=scale)


class Mirror:
    """A field that answers with the colour of its own tile at each place."""

    def __init__(self, tile: Image.Image) -> None:
        assert tile.width == tile.height
        self.pixels = torch.from_numpy(np.array(tile, dtype=np.float32) / 255)

    def read(self, points: Tensor) -> Tensor:
        assert points.min() >= 0 and points.max() <= 1
        rows, cols = (points * len(self.pixels)).long().clamp_max(len(self.pixels) - 1).unbind(1)
        return self.pixels[rows, cols][None] + 1e-4


def segmented(image: Image.Image, **changes: Any) -> Any:
    field: Any = Mirror
    return segment_image(image, field, changes.pop("head", None) or head(), **changes)


def three_bands(width: int, height: int) -> Image.Image:
    bands = np.array(list(COLOURS.values()), dtype=np.uint8)
    return Image.fromarray(np.broadcast_to(bands[np.arange(width) * 3 // width], (height, width, 3)).copy())


@pytest.mark.parametrize("size", [(40, 40), (41, 40), (40, 79), (121, 40), (3, 200), (2, 2)])
def test_tiles_cover_every_pixel_and_lie_inside(size: tuple[int, int]) -> None:
    covered = np.zeros(size[::-1], dtype=int)
    for left, top, side in tiles_of(*size):
        assert side == min(size) and left >= 0 and top >= 0 and left + side <= size[0] and top + side <= size[1]
        covered[top : top + side, left : left + side] += 1
    assert covered.min() >= 1 and covered.max() <= 2
    assert len(tiles_of(*size)) == -(-max(size) // min(size))
    starts = [left + top for left, top, _ in tiles_of(*size)]
    assert np.ptp(np.diff(starts)) <= 1 if len(starts) > 1 else starts == [0]  # evenly laid, from end to end


@pytest.mark.parametrize("size", [(90, 90), (300, 60), (130, 90), (60, 301)])
def test_the_map_is_the_image_s_own(size: tuple[int, int]) -> None:
    image = three_bands(*size)
    found = segmented(image, places=30)
    assert found.map.shape == size[::-1] and found.tiles == len(tiles_of(*size))
    truth = np.arange(size[0]) * 3 // size[0] + 1
    # off by half a place beside each border at most
    assert (found.map != truth).mean() < 2 * 0.5 * min(size) / 30 / size[0] + 0.02
    assert [part.label for part in sorted(found.parts, key=lambda part: part.value)] == list(COLOURS)
    assert sum(part.share for part in found.parts) == pytest.approx(1) and found.background == 0


def test_a_long_strip_has_a_bounded_lattice() -> None:
    found = segmented(three_bands(3000, 30), places=112)
    assert found.places == (20, 2048)


def test_where_tiles_overlap_the_one_whose_middle_is_nearer_counts_more() -> None:
    """Of 90 x 60 pixels the first tile says one thing, the second another; both see x from 30 to 60."""
    said = iter((torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])))

    def look(tile: Image.Image) -> Any:
        value = next(said)
        return lambda points: value.expand(len(points), 2)

    sums = blended(Image.new("RGB", (90, 60)), look, tiles_of(90, 60), 30)  # places of 2 pixels
    share = (sums[..., 0] / sums.sum(-1))[15]  # of the first, along the middle row
    assert (share[:15] == 1).all() and (share[30:] == 0).all()
    assert (share[15:30].diff() < 0).all() and share[22] == pytest.approx(0.5, abs=1e-5)
    assert share[15] > 0.95 and share[29] < 0.05


def test_between_places_probabilities_are_bilinear() -> None:
    values = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0))
    found = Probable(torch.tensor([0, 2, 5]), values).map((45, 31), torch.arange(10, 16, dtype=torch.int32))
    wanted = torch.nn.functional.interpolate(values[None], size=(31, 45), mode="bilinear", align_corners=False)[0]
    np.testing.assert_array_equal(found, np.array([10, 12, 15])[wanted.argmax(0).numpy()])


def test_borders_do_not_follow_the_lattice() -> None:
    """Between two places the border is where the probabilities cross, not midway in steps of a place."""
    y, x = np.mgrid[0:120, 0:120]
    slope = np.where((x + 0.4 * y < 84)[..., None], COLOURS["red"], COLOURS["blue"]).astype(np.uint8)
    found = segmented(Image.fromarray(slope), places=12, head=head(scale=3.0))
    border = (found.map == 1).sum(axis=1)
    assert len(set(border.tolist())) > 30  # 12 rows of places would give 12 values


def test_background_words_and_unsure_places_are_zero() -> None:
    image = three_bands(90, 60)
    found = segmented(image, background=("green",), places=30)
    assert found.labels == ("red", "blue") and {part.value for part in found.parts} == {1, 2}
    assert found.background == pytest.approx(1 / 3, abs=0.03) and (found.map[:, 40:50] == 0).all()
    grey = Image.new("RGB", (50, 50), (90, 90, 90))
    assert segmented(grey, min_probability=0.5).background == 1.0 and segmented(grey, min_probability=0.5).parts == ()
    assert segmented(grey).background == 0.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"background": ("sky",)}, '"sky" is not one of the labels'),
        ({"background": ("red", "green", "blue")}, "All labels are background"),
        ({"min_probability": 1.2}, "between 0 and 1"),
        ({"min_area": 1.0}, "below 1, not 1.0"),
        ({"places": 0}, "at least 1"),
    ],
)
def test_values_that_cannot_work_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        segmented(three_bands(20, 20), **changes)


def test_small_pieces_go_to_their_surroundings_and_the_largest_stays() -> None:
    found = np.ones((40, 50), dtype=np.int32)
    found[:, 30:] = 2
    clean = found.copy()
    found[5:8, 5:8] = 2  # 9 of 2000 pixels
    found[20:22, 40:42] = 0
    np.testing.assert_array_equal(without_small(found, 10 / 2000), clean)
    np.testing.assert_array_equal(without_small(found, 5 / 2000)[5:8, 5:8], 2)
    np.testing.assert_array_equal(without_small(found, 0), found)
    assert (without_small(found[:, ::-1], 0.99) == 1).all()


def test_regions_are_connected_by_sides_and_their_boxes_hold_them() -> None:
    found = np.zeros((10, 20), dtype=np.int32)
    found[1:4, 2:7] = 2
    found[4, 7] = 2  # touches by a corner only
    found[6:9, 10:20] = 1
    first, second = parts_of(found, ("cat", "dog"))
    assert (first.label, first.share, [r.box for r in first.regions]) == ("cat", 30 / 200, [(10, 6, 20, 9)])
    assert [r.box for r in second.regions] == [(2, 1, 7, 4), (7, 4, 8, 5)]
    assert [r.share for r in second.regions] == [15 / 200, 1 / 200] and second.share == pytest.approx(16 / 200)


def test_a_classifier_segments_tiles_each_by_a_student_of_its_own() -> None:
    student = StudentOptions(preset="small", steps=3, lr=1e-3, distil="grid", grid_views=3, precision="fp32")
    classifier = Classifier(FakeTeacher(), labels=["cat", "dog", "hen"], student=student, device="cpu")
    image = three_bands(90, 50)
    found = classifier.segment(image, places=20)
    assert (found.tiles, found.places, found.map.shape) == (2, (20, 36), (50, 90))
    # the left third of the left tile is seen by no other: as alone
    left = classifier.segment(image.crop((0, 0, 50, 50)), places=20, min_area=0)
    np.testing.assert_array_equal(classifier.segment(image, places=20, min_area=0).map[:, :30], left.map[:, :30])
    again = classifier.segment(image, places=20)
    np.testing.assert_array_equal(again.map, found.map)
    token = Classifier(FakeTeacher(), labels=["cat", "dog"], student=StudentOptions(preset="small"), device="cpu")
    with pytest.raises(UsageError, match="distil both or grid, not cls"):
        token.segment(image)


def test_a_saved_field_is_read_anywhere_in_any_order() -> None:
    images, targets, grids = batch(2)
    result = TestTimeTrainer(MODEL, ADAPT).adapt(images, targets, grids=grids, keep_field=True)
    field = result.folded
    assert isinstance(field, SavedField)
    rows, cols = grid_locations(MODEL.grid)
    middles = (torch.stack((rows, cols), dim=1) + 0.5) / MODEL.grid
    order = torch.randperm(len(middles), generator=torch.Generator().manual_seed(0))
    expected = field.features(rows.double(), cols.double())
    assert torch.equal(field.read(middles), expected)
    torch.testing.assert_close(field.read(middles[order]), expected[:, order], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(field.read([[0.3, 0.71]])[:, 0], field.read([[0, 1], [0.3, 0.71]])[:, 1])
    for wrong, words in (
        ([[0.5, 1.1]], "between 0 and 1"),
        ([0.5, 0.5], "shape \\(Q, 2\\)"),
        ([[float("nan"), 0]], "0 and 1"),
    ):
        with pytest.raises(UsageError, match=words):
            field.read(wrong)
