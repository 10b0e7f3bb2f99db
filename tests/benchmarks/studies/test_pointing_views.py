"""The pointing game with many views: rows that are continued, scores with paired tests, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from apm.benchmarks.studies import pointing_views
from apm.benchmarks.studies.rows import continued
from apm.errors import UsageError
from apm.student.cells import Cells, shares_of
from tests.benchmarks.studies.test_pointing import COLOURS, ColourTeacher


def test_rows_are_continued_and_never_mixed(tmp_path: Path) -> None:
    seen: list[int] = []

    def measure(item: int) -> dict[str, Any]:
        seen.append(item)
        return {"item": item}

    path = tmp_path / "rows.jsonl"
    assert continued([1, 2], measure, "items", path=path, settings={"a": 1}) == [{"item": 1}, {"item": 2}]
    with path.open("ab") as file:
        file.write(b'{"item": 3')  # a line that was cut off
    assert continued([1, 2, 3, 4], measure, "items", path=path, settings={"a": 1}) == [
        {"item": n} for n in (1, 2, 3, 4)
    ]
    assert seen == [1, 2, 3, 4] and len(path.read_text().splitlines()) == 5
    assert continued([1], measure, "items", path=path, settings={"a": 1}) == [{"item": 1}] and seen == [1, 2, 3, 4]
    with pytest.raises(UsageError, match="a: 1 there, 2 here"):
        continued([1], measure, "items", path=path, settings={"a": 2})
    (tmp_path / "other.jsonl").write_text("no rows\n")
    with pytest.raises(UsageError, match="holds no rows"):
        continued([1], measure, "items", path=tmp_path / "other.jsonl", settings={})
    assert continued([5], measure, "items", path=None, settings={}) == [{"item": 5}]


def test_rows_of_a_file_are_worth_having_when_nothing_is_added(tmp_path: Path) -> None:
    """Ctrl-C during the first item after going on: what was measured before becomes the record."""

    def stopped(item: int) -> dict[str, Any]:
        raise KeyboardInterrupt

    path = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        continued([1, 2], stopped, "items", path=path, settings={})
    continued([1], lambda item: {"item": item}, "items", path=path, settings={})
    assert continued([1, 2], stopped, "items", path=path, settings={}) == [{"item": 1}]


def test_the_views_average_is_the_mean_of_the_cells_at_a_place() -> None:
    whole, half = shares_of((0, 0, 1, 1), 1, 1, 4), shares_of((0, 0, 0.5, 0.5), 1, 1, 4)
    cells = Cells(torch.cat((whole, half))[None], torch.tensor([[[1.0], [3.0]]]))
    found = pointing_views.average(cells, 4)[..., 0]
    assert (found[2:] == 1).all() and (found[:, 2:] == 1).all()
    assert found[:2, :2] == pytest.approx((1 / 16 + 3 / 4) / (1 / 16 + 1 / 4))  # small cells say more of their places


def test_scores_are_paired() -> None:
    ours, other = [True] * 9 + [False], [True] * 4 + [False] * 6
    rows = [
        {"hits": {name: (mine if name == pointing_views.OURS else theirs) for name in pointing_views.SOURCES}}
        for mine, theirs in zip(ours, other, strict=True)
    ]
    found = pointing_views.scores(rows)
    assert found["grid"]["gain"] == 0.5 and found["grid"]["p"] == pytest.approx(2 / 2**5)
    assert found["grid"]["half"] == pytest.approx(1.96 * (10 * 0.5**2 / 9) ** 0.5 / 10**0.5)
    assert found[pointing_views.OURS]["gain"] == 0 and found[pointing_views.OURS]["score"] == 0.9


@pytest.mark.slow
def test_the_command_plays_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, colour in COLOURS.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (30, 20), colour).save(tmp_path / "data" / name / "a.png")
    monkeypatch.setattr(pointing_views, "load_teacher", lambda name, device: ColourTeacher())
    rows, record = tmp_path / "rows.jsonl", tmp_path / "r.json"
    given = ["--root", str(tmp_path / "data"), "--steps", "2", "--size", "16", "--views", "4"]
    pointing_views.STUDY.main([*given, "--limit", "1", "--rows", str(rows)])
    pointing_views.STUDY.main([*given, "--limit", "3", "--rows", str(rows), "--record", str(record)])
    found = json.loads(record.read_text())
    assert found["composites"] == 3 and len(rows.read_text().splitlines()) == 4
    assert set(found["scores"]) == set(pointing_views.SOURCES)
    assert found["scores"]["grid"]["score"] == found["scores"]["views' average"]["score"] == 1
    assert "gain of field, views" in capsys.readouterr().out
