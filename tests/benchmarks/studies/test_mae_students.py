"""Students of TTT-MAE side by side, as a study: it runs, and its table says what its record does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apm.benchmarks.studies.mae_students import STUDY
from apm.errors import UsageError
from tests.benchmarks.methods.made import trained_head


@pytest.mark.slow
def test_numbers_of_students_are_measured_beside_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.json"
    given = ["--checkpoint", str(trained_head("probe")), "--students", "3", "--masks", "2", "--steps", "2"]
    STUDY.main([*given, "--images", "4", "--rounds", "2", "--record", str(file)])
    record = json.loads(file.read_text())
    assert [row["students"] for row in record["students"]] == [1, 3] and record["images"] == 4
    assert all(len(row["seconds"]) == 2 and row["images_per_second"] > 0 for row in record["students"])
    first, second = (row["largest_difference"] for row in record["students"])
    assert first == 0 and second < 1e-4
    said = capsys.readouterr().out
    assert "| 1 | " in said and "| 3 | " in said and "2 steps of 2 masks, median of 2 rounds" in said
    with pytest.raises(UsageError, match="--rounds must be 1 or more, not 0"):
        STUDY.main([*given, "--rounds", "0"])
