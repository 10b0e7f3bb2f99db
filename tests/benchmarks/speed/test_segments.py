"""Time and memory of segmentation: what is varied, what is kept, and memory of one process alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from apm.benchmarks.speed import children, segments
from apm.benchmarks.speed.kinds import KINDS
from apm.errors import ApmError
from tests.benchmarks.speed.test_speed import QUICK, measure
from tests.fakes import FakeTeacher


@pytest.mark.slow
def test_views_and_places_are_varied_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (60, 40), (90, 20, 20)).save(path)
    commands: list[list[str]] = []

    def peak(command: list[str]) -> int:
        commands.append(command)
        return 5_000_000

    monkeypatch.setattr(segments, "peak_bytes", peak)
    monkeypatch.setattr(segments, "PLACES", 12)
    monkeypatch.setattr(segments, "VIEWS", 4)
    monkeypatch.setattr(segments, "load_teacher", lambda *_, **__: FakeTeacher())
    made = measure("segment", rounds=1, photograph=path, views=[1, 4], places=[10, 12], steps=1)
    rows = made["rows"]
    assert [(row["views"], row["places"]) for row in rows] == [(1, 12), (4, 12), (4, 10)]
    assert all(row["seconds"]["median"] > row["looking"]["median"] > 0 for row in rows)
    assert made["settings"]["tiles"] == 2 and made["settings"]["size"] == [60, 40]
    assert [one[3:5] for one in commands] == [["segment", str(path)]] * 3
    assert [one for one in commands[2] if one.startswith(("--grid-views", "--places"))] == [
        "--grid-views=4",
        "--places=10",
    ]
    assert "5 MB" in KINDS["segment"].table(made)


@pytest.mark.slow
def test_the_command_that_is_measured_runs(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 40), (90, 20, 20)).save(path)
    found = children.peak_bytes(segments._command(QUICK.but(steps=1), path, tmp_path / "out", 1, 8))
    assert 100e6 < found < 4e9


def test_memory_is_that_of_one_child() -> None:
    large, small = (children.peak_bytes([sys.executable, "-c", f"len(b'x' * {size})"]) for size in (100_000_000, 1_000))
    assert 95e6 < large - small < 150e6  # the small one came second, and is not charged with the first
    with pytest.raises(ApmError, match="no such thing"):
        children.peak_bytes([sys.executable, "-c", "raise SystemExit('no such thing')"])


def test_its_options_are_those_of_the_command() -> None:
    given = KINDS["segment"].read(["--quick", "--device", "cpu", "--views", "2,3"])
    assert given.views == [2, 3] and given.places == [28, 56, 112, 224] and given.steps == 150
    student = segments._student(given.but(precision="auto", quick=False, preset="small"), 16)
    assert json.loads(json.dumps([student.preset, student.lr, student.distil, student.precision])) == [
        "small",
        1e-3,
        "grid",
        "fp32",
    ]
