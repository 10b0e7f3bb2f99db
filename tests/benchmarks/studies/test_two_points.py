"""Two objects told apart: where they are pasted, how far maps fall between them, and what coarse reading loses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from apm.benchmarks.studies import two_points
from apm.benchmarks.studies.two_points import COARSER, SOURCES, lost, middles, told_apart, valley
from apm.errors import UsageError
from tests.benchmarks.studies.test_pointing import COLOURS, SAMPLES, ColourTeacher


def options(*more: str) -> Any:
    return two_points.STUDY.read(["--canvas", "96", "--side", "20", "--distances", "24,50", "--limit", "8", *more])


def test_copies_lie_where_they_say() -> None:
    given = options()
    pairs = list(two_points.pairs_of(SAMPLES, given))
    assert [one.distance for one in pairs] == [24, 50] * 8
    assert {one.first[0] == one.second[0] for one in pairs} == {True, False}  # side by side, and above one another
    for one in pairs:
        colour = np.array(list(COLOURS.values())[one.label])
        two, filled = ((np.asarray(image) == colour).all(-1) for image in (one.two, one.filled))
        assert two.sum() == 2 * 20 * 20 and filled.sum() == 20 * (20 + one.distance)  # no gap, nothing beside
        for y, x in (one.first, one.second):
            assert two[round(y * 96) - 10 : round(y * 96) + 10, round(x * 96) - 10 : round(x * 96) + 10].all()
        apart = 96 * (abs(one.first[0] - one.second[0]) + abs(one.first[1] - one.second[1]))
        assert apart == pytest.approx(one.distance)
    assert [one.first for one in two_points.pairs_of(SAMPLES, given)] == [one.first for one in pairs]


def bumps(sigma: float, first: tuple[float, float], second: tuple[float, float]) -> Tensor:
    y, x = middles(100).T.reshape(2, 100, 100)
    return sum(
        torch.exp(-((y - a) ** 2 + (x - b) ** 2) / (2 * sigma**2))
        for a, b in (first, second)  # type: ignore[misc]
    )


@pytest.mark.parametrize("turned", [False, True])
def test_a_map_falls_between_what_it_tells_apart(turned: bool) -> None:
    first, second = ((0.5, 0.3), (0.5, 0.7)) if not turned else ((0.3, 0.5), (0.7, 0.5))
    narrow, wide = (valley(bumps(sigma, first, second), first, second, 0.1) for sigma in (0.1, 0.25))
    assert narrow == pytest.approx(2 * np.exp(-2), abs=0.02)  # exp(-0.2² / 2 0.1²) of each peak
    assert wide == 1.0  # two Gaussians merge below a distance of two deviations
    assert valley(bumps(0.2, first, first), first, second, 0.1) == 1.0  # a slope is no valley


def test_what_is_lost_by_reading_coarsely() -> None:
    y, x = middles(112).T.reshape(2, 112, 112)
    smooth, fine = torch.sin(2 * np.pi * x), torch.sin(2 * np.pi * 10 * x)
    assert [lost(smooth, places) < 0.05 for places in COARSER] == [False, True, True, True]
    assert lost(fine, 16) > 0.9 and lost(fine, 56) < 0.2
    assert lost(smooth, 8) > lost(smooth, 16) > lost(smooth, 28)
    assert lost(torch.ones(112, 112), 8) < 1e-3 and y.shape == x.shape


def test_pairs_are_counted_beside_those_without_a_gap() -> None:
    valleys = [(0.5, 0.9)] * 8 + [(0.9, 0.9)] * 2
    rows = [
        {"distance": 24, "valleys": {name: {"two": two, "filled": filled} for name in SOURCES}}
        for two, filled in valleys
    ]
    assert told_apart(rows)["grid"] == {"24": {"n": 10, "two": 0.8, "filled": 0.0, "p": pytest.approx(2 / 2**8)}}


@pytest.mark.slow
def test_the_command_measures_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, colour in COLOURS.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (30, 20), colour).save(tmp_path / "data" / name / "a.png")
    monkeypatch.setattr(two_points, "load_teacher", lambda name, device: ColourTeacher())
    monkeypatch.setattr(two_points, "FINEST", 56)
    rows, record = tmp_path / "rows.jsonl", tmp_path / "r.json"
    given = ["--root", str(tmp_path / "data"), "--steps", "2", "--views", "3", "--distances", "150", "--limit", "1"]
    two_points.STUDY.main([*given, "--rows", str(rows), "--record", str(record)])
    found = json.loads(record.read_text())
    # the teacher's grid has cells of 28 pixels: objects of 40 that are 110 apart are two of them
    assert found["told_apart"]["grid"]["150"] == {"n": 1, "two": 1.0, "filled": 0.0, "p": 1.0}
    assert set(found["lost"]["grid"]) == set(map(str, COARSER))
    assert "100 / 0" in capsys.readouterr().out
    before = rows.read_bytes()
    two_points.STUDY.main([*given, "--rows", str(rows)])
    assert rows.read_bytes() == before
    with pytest.raises(UsageError, match="must lie between the objects' side, 40"):
        two_points.STUDY.main([*given, "--distances", "30"])
