"""The pointing game: on composites whose place is known, with a teacher that sees colours."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from apm.benchmarks.studies import composites, pointing
from apm.student.config import APMConfig
from apm.test_time.options import AdaptConfig
from apm.text.zeroshot import ZeroShotHead
from tests.fakes import FakeTeacher
from tests.places import ROOT

TINY = APMConfig(dim=16, image_size=32, patch_size=4, position_dim=32, hidden=(64, 48, 32), heads=2, rgb_hidden=8)
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class ColourTeacher(FakeTeacher):
    """Its grid is the mean colour of 8 × 8 parts, laid along fixed axes; names of colours lie on the same axes."""

    def __init__(self) -> None:
        super().__init__(16, name="colours")
        self.axes = torch.linalg.qr(torch.randn(16, 3, generator=torch.Generator().manual_seed(0)))[0].T  # (3, 16)

    def encode_grid(self, image: Image.Image, *, size: int | None = None) -> Tensor:
        pixels = np.asarray(image.convert("RGB").resize((8, 8), Image.Resampling.BOX), dtype=np.float32) / 255
        return torch.from_numpy(pixels) @ self.axes

    def encode_image(self, pixels: Tensor) -> Tensor:
        return (pixels.mean(dim=(2, 3)) + 1) / 2 @ self.axes

    def head(self) -> ZeroShotHead:
        return ZeroShotHead(tuple(COLOURS), self.axes, 20.0)


@dataclass(frozen=True)
class Sample:
    label: int

    def load(self) -> Image.Image:
        return Image.new("RGB", (50, 40), list(COLOURS.values())[self.label])


SAMPLES = [Sample(number % 3) for number in range(12)]


def test_composites_are_where_they_say() -> None:
    made = composites.composites(SAMPLES, 20, canvas=64, side=24, seed=0)
    assert len({one.box for one in made}) == 20
    for one in made:
        pixels = np.asarray(one.image).reshape(64, 64, 3)
        ours = (pixels == list(COLOURS.values())[one.label]).all(-1)
        rows, cols = np.flatnonzero(ours.any(1)), np.flatnonzero(ours.any(0))
        edges = (rows[0], cols[0], rows[-1] + 1, cols[-1] + 1)
        assert tuple(edge / 64 for edge in edges) == one.box and ours.sum() == 24 * 24
        assert one.label != one.background
        assert (pixels[~ours] == list(COLOURS.values())[one.background]).all()
    again = composites.composites(SAMPLES, 20, canvas=64, side=24, seed=0)
    assert [one.box for one in again] == [one.box for one in made]
    assert [one.box for one in composites.composites(SAMPLES, 20, canvas=64, side=24, seed=1)] != [o.box for o in made]


def test_no_photograph_is_pasted_twice_while_there_are_others() -> None:
    loaded: list[int] = []

    class Counted:
        def __init__(self, number: int) -> None:
            self.number, self.label = number, number % 2

        def load(self) -> Image.Image:
            loaded.append(self.number)
            return Image.new("RGB", (8, 8))

    composites.composites([Counted(number) for number in range(10)], 10, canvas=16, side=4)
    assert sorted(loaded[::2]) == list(range(10))  # pasted first, then its background


@pytest.mark.parametrize(
    ("place", "inside"),
    [((0.3, 0.6), True), ((0.25, 0.5), True), ((0.5, 0.6), False), ((0.3, 0.75), False), ((0.2, 0.6), False)],
)
def test_a_hit_is_a_place_in_the_box(place: tuple[float, float], inside: bool) -> None:
    box = (0.25, 0.5, 0.5, 0.75)
    assert composites.Composite(Image.new("RGB", (8, 8)), box, 0, 1).holds(place) is inside


@pytest.fixture(scope="module")
def played() -> dict[str, Any]:
    teacher = ColourTeacher()
    adapt = AdaptConfig(steps=150, lr=1e-3, precision="fp32")
    mapper = composites.Mapper(teacher, teacher.head(), TINY, adapt, size=16)
    return pointing.play(composites.composites(SAMPLES, 12, canvas=64, side=24), mapper)


@pytest.mark.slow
def test_what_is_fitted_to_the_grid_points_and_the_rest_does_not(played: dict[str, Any]) -> None:
    share = {source: float(np.mean(hits)) for source, hits in played["hits"].items()}
    assert set(share) == set(pointing.SOURCES)
    assert share["teacher's grid"] == 1
    assert min(share["field, grid"], share["field, both"]) > 0.8
    assert max(share["field, token"], share["random"]) < 0.5
    assert sum(played["token_says"].values()) == pytest.approx(1)


def test_the_label_of_a_composite_reaches_no_student() -> None:
    teacher = ColourTeacher()
    mapper = composites.Mapper(teacher, teacher.head(), TINY, AdaptConfig(steps=3, precision="fp32"), size=8)
    (one,) = composites.composites(SAMPLES, 1, canvas=64, side=24)
    maps = mapper(one.image)  # no label given; any label's map can be read afterwards
    by_label = [maps.of(label) for label in range(3)]
    assert not torch.equal(by_label[0]["field, grid"], by_label[1]["field, grid"])
    assert torch.equal(by_label[0]["attention, both"], by_label[1]["attention, both"])
    for values in by_label[0].values():
        assert values.shape == (8, 8) and values.isfinite().all()


def test_scores_are_shares_with_paired_tests() -> None:
    hits = {"a": [True] * 9 + [False], "random": [False] * 8 + [True] * 2, "centre": [True] * 9 + [False]}
    found = pointing.scores(hits)
    assert found["a"]["score"] == 0.9 and found["a"]["stderr"] == pytest.approx((0.9 * 0.1 / 10) ** 0.5)
    # 8 hits that random misses, and one the other way: 2·(1 + 9)/2⁹
    assert found["a"]["p_random"] == pytest.approx(20 / 512)
    assert found["a"]["p_centre"] == 1


def test_the_record_is_of_enough_composites() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "pointing-small.json").read_text())
    assert record["composites"] >= 200


@pytest.mark.parametrize(("flag", "count"), [("--composites", 3), ("--limit", 4)])
def test_the_command_plays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, count: int) -> None:
    for name, colour in COLOURS.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (30, 20), colour).save(tmp_path / "data" / name / "a.png")
    monkeypatch.setattr(pointing, "load_teacher", lambda name, device: ColourTeacher())
    record = tmp_path / "r.json"
    given = ["--root", str(tmp_path / "data"), "--steps", "1", "--size", "4", flag, str(count)]
    pointing.main([*given, "--record", str(record)])
    found = json.loads(record.read_text())
    assert found["composites"] == count and found["class_names"] == sorted(COLOURS)
    assert found["settings"]["steps"] == found["settings"]["token_steps"] == 1


@pytest.mark.slow
def test_sheets_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = ColourTeacher()
    adapt = AdaptConfig(steps=2, precision="fp32")

    def make(head: ZeroShotHead) -> composites.Mapper:
        return composites.Mapper(teacher, head, TINY, adapt, size=8)

    for name, colour in COLOURS.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (30, 20), colour).save(tmp_path / "data" / name / "a.png")
    with Image.open(pointing.sheet(tmp_path / "a.png", tmp_path / "data", make, teacher)) as drawn:
        assert drawn.width > 300 and drawn.height > 300
    monkeypatch.setattr(pointing, "PHOTOGRAPHS", {"chelsea.png": "cat", "coffee.png": "cup of coffee"})
    assert pointing.demo(tmp_path / "b.png", make, teacher).stat().st_size > 5000
