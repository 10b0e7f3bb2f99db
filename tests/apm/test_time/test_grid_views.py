"""Views whose grids are targets: drawn from seed and name alone, placed truly, and the same by every way to ask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from apm import Classifier, StudentOptions
from apm.errors import TeacherError, UsageError
from apm.student.cells import shares_of
from apm.test_time.grid_views import GridView, cut, grid_views, looks, view_cells
from apm.test_time.view_numbers import check_grid_views, number_of, parse_grid_views
from apm.test_time.views import pixels_id
from tests.fakes import FakeTeacher

WHOLE = GridView()


def picture(width: int = 60, height: int = 44, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def test_views_are_the_first_of_more_and_depend_on_name_and_seed_alone() -> None:
    many = grid_views(33, seed=1, sample_id="a")
    assert many[:8] == grid_views(8, seed=1, sample_id="a")
    assert many[0] == WHOLE and len({view.box for view in many}) == 33
    assert {view.flipped for view in many[1:]} == {False, True}
    for other in (grid_views(33, seed=2, sample_id="a"), grid_views(33, seed=1, sample_id="b")):
        assert other[0] == WHOLE and not {view.box for view in other[1:]} & {view.box for view in many[1:]}


def test_views_lie_in_the_square_and_cover_it_evenly() -> None:
    for name in "abcde":
        covered = torch.zeros(64)
        for view in grid_views(17, seed=0, sample_id=name)[1:]:
            top, left, bottom, right = view.box
            assert 0 <= top < bottom <= 1 and 0 <= left < right <= 1
            assert 0.4 <= bottom - top <= 0.8 and bottom - top == pytest.approx(right - left)
            covered += shares_of(view.box, 1, 1, 8)[0] * 64 * (bottom - top) ** 2
        assert covered.min() > 0.5 and covered.view(8, 8)[2:6, 2:6].min() > 2


@pytest.mark.parametrize("size", [(60, 44), (44, 61), (45, 60), (2, 3), (3, 2), (2, 2)])
def test_a_view_shows_the_part_that_it_says(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    edge = min(size)
    left, top = (size[0] - edge) / 2, (size[1] - edge) / 2
    for view in grid_views(20, seed=0, sample_id="a")[1:]:
        part, placed = cut(image, view)
        assert part.width == part.height >= 1
        assert min(placed.box) >= -1e-9 and max(placed.box) <= 1 + 1e-9
        x, y = round(left + placed.box[1] * edge), round(top + placed.box[0] * edge)
        shown = np.asarray(image)[y : y + part.height, x : x + part.width]
        assert np.array_equal(shown[:, ::-1] if view.flipped else shown, np.asarray(part))
        assert max(abs(a - b) for a, b in zip(placed.box, view.box, strict=True)) <= 1.5 / edge + 1e-9


def test_cells_say_what_the_teacher_says_of_their_places() -> None:
    """A teacher that tells mean colours: the shares of its cells, applied to the true colours, give its features."""
    teacher, image, side = FakeTeacher(image_size=32), picture(64, 64), 64
    cells = view_cells([image], teacher, side, 9, seed=0, sample_ids=["a"])
    assert cells.shares.shape == (1, 9 * 16, side * side) and cells.features.shape == (1, 9 * 16, teacher.dim)
    colours = torch.from_numpy((np.asarray(image, dtype=np.float32) / 255 - 0.5) / 0.5).reshape(-1, 3)
    expected = cells.shares[0] @ colours @ teacher.weights[:3]
    off = (cells.features[0] - expected).norm(dim=1) / expected.norm(dim=1).mean()
    assert off.mean() < 0.06
    turned = (cells.features[0].view(9, 4, 4, -1).flip(2).flatten(0, 2) - expected).norm(dim=1) / expected.norm(
        dim=1
    ).mean()
    assert turned.mean() > 0.3  # had the mirrored ones been laid wrongly, it would show


def test_every_view_s_grid_is_of_the_size_asked_for() -> None:
    teacher, image = FakeTeacher(), picture()
    seen = looks(image, teacher, 3, seed=0, sample_id="a", size=64)
    for view, grid in seen:
        part, _ = cut(image, GridView(view.box, view.flipped))
        assert grid.shape[:2] == (8, 8) and torch.equal(grid, teacher.encode_grid(part, size=64))
    cells = view_cells([image], teacher, 8, 3, seed=0, sample_ids=["a"], size=64)
    assert torch.equal(cells.features[0], torch.cat([grid.flatten(0, 1) for _, grid in seen]))


def test_tokens_are_of_the_parts() -> None:
    teacher, image = FakeTeacher(), picture()
    cells = view_cells([image], teacher, 8, "tokens:5", seed=0, sample_ids=["a"])
    assert cells.shares.shape == (1, 5, 64) and teacher.grid_calls == 0
    drawn = grid_views(5, seed=0, sample_id="a", sides=(0.2, 0.5))
    parts = [cut(image, view)[0] for view in drawn]
    expected = torch.cat([teacher.encode_image(teacher.preprocess(part)[None]) for part in parts])
    assert torch.equal(cells.features[0], expected)


def test_number_of_views() -> None:
    assert parse_grid_views("16") == 16 and number_of(16) == (16, False)
    assert number_of(parse_grid_views("tokens")) == (64, True) and number_of(parse_grid_views("tokens:3")) == (3, True)
    for wrong in ("0", "tokens:0", "tokens:", "token", "-1", "2.5", "tokens:x"):
        with pytest.raises(UsageError, match="a number of 1 or more, tokens, or tokens:N"):
            parse_grid_views(wrong)
    check_grid_views("", "tokens:7")


FAST = {"preset": "small", "steps": 2, "distil": "both", "precision": "fp32"}


def test_classifier_and_one_image_at_a_time_agree() -> None:
    teacher = FakeTeacher(dim=16)
    student = StudentOptions(grid_views=4, **FAST)  # type: ignore[arg-type]
    labels = ["cat", "dog"]
    classifier = Classifier(teacher, labels=labels, student=student, device="cpu", batch_size=2)
    images = [picture(seed=seed) for seed in range(3)]
    alone = [classifier(image) for image in images]
    kept = classifier.classify_with_field(images[1])
    assert kept.answer.adaptation is not None and alone[1].adaptation is not None
    assert kept.answer.adaptation.losses == alone[1].adaptation.losses
    grid_calls = teacher.grid_calls
    classifier.classify_with_field(images[0])
    assert teacher.grid_calls - grid_calls == 4  # the whole image's grid is shared with the picture that is drawn
    plain = Classifier(teacher, labels=labels, student=StudentOptions(**FAST), device="cpu")(images[0])  # type: ignore[arg-type]
    assert plain.adaptation is not None and alone[0].adaptation is not None
    assert plain.adaptation.losses != alone[0].adaptation.losses
    cells = view_cells([images[1]], teacher, 16, 4, seed=0, sample_ids=[pixels_id(images[1])])
    assert cells.shares.shape == (1, 4 * 16, 256)


def test_a_teacher_without_a_grid_gives_tokens() -> None:
    class Gridless(FakeTeacher):
        encode_grid = property()  # type: ignore[assignment]

    student = StudentOptions(grid_views="tokens:4", **FAST)  # type: ignore[arg-type]
    answer = Classifier(Gridless(), labels=["cat", "dog"], student=student, device="cpu")(picture())
    assert answer.error is None
    with pytest.raises(TeacherError, match="has no grid"):
        Classifier(Gridless(), labels=["cat", "dog"], student=StudentOptions(**FAST), device="cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"grid_views": 4, "distil": "cls"}, "add distil=both"),
        ({"grid_views": 4, "distil": "both", "queries": 9}, "leave one out"),
        ({"grid_views": 0, "distil": "both"}, 'grid_views is "0"'),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        StudentOptions(**settings)  # type: ignore[arg-type]
