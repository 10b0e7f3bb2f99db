"""Sizes of regions against the loss: fields whose regions are known, moments at thresholds, correlations."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from apm.benchmarks.studies import islands_loss as study
from apm.benchmarks.studies import region_sizes
from apm.student import islands
from tests.benchmarks.studies.test_pointing import ColourTeacher


def test_thresholds_are_passed_once_each_and_the_lowest_is_the_last() -> None:
    passing = study.Passing(1e-3)
    seen = [
        (step, loss) for step, loss in enumerate([0.5, 0.2, 0.09, 0.08, 2e-2, 5e-3, 0.2, 2e-4]) if passing(step, loss)
    ]
    assert seen == [(2, 0.09), (4, 2e-2), (5, 5e-3), (7, 2e-4)]
    assert passing.last == 1e-3 and not passing(8, 1e-9)
    exactly = study.Passing(1e-3)
    assert exactly(0, 0.01) and exactly.last == pytest.approx(0.01)
    grid = study.Passing(1e-3, of_first=True)
    eighth = 10 ** (-1 / 8)
    assert [grid(step, 4.0 * eighth**k) for step, k in enumerate([0, 0.5, 1.01, 1.5, 3.2])] == [0, 0, 1, 0, 1]
    assert grid.last == pytest.approx(4.0 * eighth**3)


def test_sizes_do_not_depend_on_the_fields_length_but_on_what_differs() -> None:
    rng = np.random.default_rng(0)
    part = np.arange(8)[:, None] // 4 * 2 + np.arange(8) // 4  # four squares
    field = rng.normal(size=(4, 6))[part] + 1e-4 * rng.normal(size=(8, 8, 6))
    centred = field - field.mean(axis=(0, 1))
    for share in (1 / 2, 1 / 4):
        for scale in (1, 1e-6):
            assert islands.agreement(region_sizes.joined(scale * centred, share), part) == pytest.approx(1)
    assert (
        region_sizes.joined(centred, 10).max() == 0
        and region_sizes.joined(rng.normal(size=(8, 8, 6)), 1e-3).max() == 63
    )
    ends = np.where(part == 3, 0, part)  # two squares of one cluster touch at a corner alone
    assert region_sizes.pieces(ends).max() == 3 and islands.agreement(region_sizes.pieces(ends), part) == pytest.approx(
        1
    )


@pytest.mark.parametrize(("down", "across"), [(1, 0), (0, 4), (3, 4)])
def test_the_frequency_of_a_wave_is_its_own(down: int, across: int) -> None:
    middle = (np.arange(16) + 0.5) / 16
    wave = np.cos(2 * np.pi * down * middle)[:, None] * np.cos(2 * np.pi * across * middle)
    assert region_sizes.frequency(wave[..., None] * np.array([1.0, -2.0])) == pytest.approx(math.hypot(down, across))


def test_correlations_tell_images_apart() -> None:
    losses = (0.1, 0.01, 1e-3, 1e-4)
    runs = [list(zip(losses, sizes, strict=True)) for sizes in ((9, 8, 3, 2), (1, 2, 3, 3), (4, 4, 4, 4))]
    found = study.correlation([*runs, runs[0][:2], []])
    assert (found["smaller"], found["larger"], found["constant"]) == (1, 1, 3)
    ranks = np.corrcoef([4, 3, 2, 1], [1, 2, 3.5, 3.5])[0, 1]
    assert found["mean"] == pytest.approx([(1 + ranks) / 2, (1 - ranks) / 2])  # of two values half their difference
    assert study.correlation(runs[2:])["mean"] is None


@pytest.mark.slow
def test_a_study_of_colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.pretraining import picture

    teacher = ColourTeacher()
    monkeypatch.setattr(study, "load_teacher", lambda name, device: teacher)
    for number in range(3):
        folder = tmp_path / "images" / f"class {number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        picture(number, 32).save(folder / f"{number}.png")
    left_out = [name for name in study.CONDITIONS if name not in ("image", "grid")]
    given = [*("--root", str(tmp_path / "images"), "--steps", "70", "--until", "3e-3", "--limit", "2")]
    options = study.STUDY.read([*given, "--rows", str(tmp_path / "rows.jsonl"), "--without", *left_out])
    record = study.measure(options)
    assert record["images"] == {"image": 2, "grid": 2} and list(record["correlation"]) == ["image", "grid"]
    assert set(record["moments"]["image"]) >= {"1.0e-02", "3.0e-03"} and record["last"]["image"]["loss"] <= 3e-3
    for of in record["moments"]["image"].values():
        assert 1 <= of["½ spread"][0] <= of["cosine 0.9"][0] == 256  # nearly constant: one region
        assert 1 <= of["¼ spread"][0] <= of["½ spread"][0] and of["directions"][0] >= 1 and of["spread"][0] < 0.1
    assert record["rounding"] < 1e-3
    assert record["late"]["image"]["cosine 0.9"] == {"mean": None, "smaller": 0, "larger": 0, "constant": 2}
    assert record["ratio"]["image"]["cosine 0.9"] == [1, 0]
    lines = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:4]))  # the second image's grid is missing
    again = study.measure(options)
    assert {**again, "seconds": 0} == {**record, "seconds": 0}
    text = study.table([{**record, "command": "c", "date": "d"}])
    assert "**small student**, 16 × 16 locations, 2 images." in text and "| 1.0e-02 | 2 |" in text
    assert study._last([[], []]) == {"without": 2, "loss": None, "step": None}
