"""The study of softened targets: its record is what the runs' rows say."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from apm.benchmarks.runs.records import RunFolder
from apm.benchmarks.studies import softened
from apm.errors import UsageError
from tests.benchmarks.made_runs import Plain, make_dataset, make_run


def test_the_record_holds_what_the_runs_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run", [Plain("zero-shot", turn=0.0), Plain("apm")], make_dataset(30))
    softened.STUDY.main([str(tmp_path / "run"), "--record", str(tmp_path / "record.json")])
    (group,) = json.loads((tmp_path / "record.json").read_text())["groups"]
    rows = RunFolder(tmp_path / "run").read("digits").to_pylist()
    of = {name: [row for row in rows if row["method"] == name] for name in ("zero-shot", "apm")}
    assert [row["method"] for row in group["rows"]] == ["zero-shot", "apm"] and group["n"] == 30
    teacher, student = group["rows"]
    assert teacher["agree"] == 100 and teacher["apart"] == 0
    same = [row["prediction"] == row["teacher_prediction"] for row in of["apm"]]
    assert student["agree"] == pytest.approx(100 * fmean(same)) and 0 < student["agree"] < 100
    apart = [abs(a["nll"] - b["nll"]) for a, b in zip(of["apm"], of["zero-shot"], strict=True)]
    assert student["apart"] == pytest.approx(fmean(apart), rel=1e-5)
    assert student["accuracy"] == pytest.approx(100 * fmean(row["rank"] == 1 for row in of["apm"]))
    assert f"| {student['agree']:.1f} | {student['apart']:.4f} |" in capsys.readouterr().out


def test_runs_of_different_orders_and_failed_images_are_paired_by_image(tmp_path: Path) -> None:
    teacher, student, data = Plain("zero-shot", turn=0.0), Plain("apm"), make_dataset(30, bad=[4, 7])
    make_run(tmp_path / "one", [teacher, student], data)
    make_run(tmp_path / "teacher", [teacher], data)
    make_run(tmp_path / "student", [student], data, order=5)

    def found(*runs: str) -> list[dict[str, Any]]:
        (group,) = softened.measure(softened.STUDY.read([str(tmp_path / run) for run in runs]))["groups"]
        return sorted(group["rows"], key=lambda row: str(row["method"]))

    together, apart = found("one"), found("teacher", "student")
    for name in ("agree", "apart", "cosine"):
        assert [row[name] for row in apart] == pytest.approx([row[name] for row in together])
    rows = [row for row in RunFolder(tmp_path / "one").read("digits").to_pylist() if row["method"] == "apm"]
    same = [row["prediction"] == row["teacher_prediction"] for row in rows if row["error"] is None]
    assert len(same) == 28 and together[0]["agree"] == pytest.approx(100 * fmean(same))


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "alone", [Plain("apm")], make_dataset(6))
    with pytest.raises(UsageError, match="lack the method zero-shot"):
        softened.measure(softened.STUDY.read([str(tmp_path / "alone")]))
    make_run(tmp_path / "pets", [Plain("apm")], make_dataset(6, name="pets"))
    with pytest.raises(UsageError, match="2 tables, not one"):
        softened.measure(softened.STUDY.read([str(tmp_path / "alone"), str(tmp_path / "pets")]))
    with pytest.raises(UsageError, match="No runs"):
        softened.measure(softened.STUDY.read([]))
