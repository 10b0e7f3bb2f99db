"""The study of patch tokens: measures held to cases worked out by hand, and students that differ as they should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from apm.benchmarks.studies import patch_tokens
from apm.errors import UsageError
from tests.apm.test_time.test_island_fields import IMAGES
from tests.benchmarks.studies.test_pointing import ColourTeacher

WANTED = torch.tensor([[3.0, 1.0], [1.0, 3.0], [2.0, 2.0]])


def test_measures_of_known_fields() -> None:
    same = patch_tokens.measures(WANTED, WANTED)
    assert same == pytest.approx({**dict.fromkeys(patch_tokens.MEASURES, 1.0), "matched, centred": 7 / 9})
    # the third patch is the mean: without it nothing is left, and a zero is equally near to all three
    flat = patch_tokens.measures(torch.tensor([[1.0, 1.0]]).expand(3, 2), WANTED)
    side = 4 / 20**0.5  # cosine of (1, 1) and (3, 1)
    assert flat["cosine"] == pytest.approx((2 * side + 1) / 3)
    assert flat["correlation"] == flat["explained"] == 0
    assert flat["matched"] == pytest.approx(1 / 3) == flat["matched, centred"]
    turned = patch_tokens.measures(WANTED[[1, 0, 2]], WANTED)
    assert turned["correlation"] == pytest.approx(-1) and turned["explained"] == pytest.approx(-3)
    assert turned["matched"] == pytest.approx(1 / 3)
    half = patch_tokens.measures(WANTED / 2, WANTED)  # the shape is there, a quarter of the variance is not
    assert half["correlation"] == pytest.approx(1) and half["explained"] == pytest.approx(0.75)


def test_rounding_of_a_flat_field_is_no_pattern() -> None:
    flat = torch.ones(3, 2, dtype=torch.float64) + 1e-14 * WANTED
    found = patch_tokens.measures(flat, WANTED)
    assert found["correlation"] == 0 and found["matched, centred"] == pytest.approx(1 / 3)


@pytest.mark.slow
def test_only_the_field_that_was_shown_the_grid_knows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(patch_tokens, "load_teacher", lambda spec, device: ColourTeacher())
    for number, image in enumerate(IMAGES):
        path = tmp_path / "images" / "ab"[number] / "one.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    record = tmp_path / "r.json"
    given = ["--root", str(tmp_path / "images"), "--steps", "40", "--record", str(record)]
    patch_tokens.STUDY.main([*given, "--rows", str(tmp_path / "rows.jsonl")])
    found = json.loads(record.read_text())
    of = found["measures"]
    assert found["photographs"] == 2 and found["teacher_grid"] == [8, 8] and found["losses"]["token, mean"] < 1e-3
    assert of["grid"]["correlation"][0] > 0.6 and of["grid"]["explained"][0] > 0.3
    for ours in patch_tokens.OURS:
        assert abs(of[ours]["explained"][0]) < 0.02 and of[ours]["correlation"][0] < 0.4
        assert found["above"][ours]["grid"]["explained"][0] == pytest.approx(
            of[ours]["explained"][0] - of["grid"]["explained"][0]
        )
    assert of["token, mean"]["cosine"][0] == pytest.approx(of["repeated"]["cosine"][0], abs=0.02)
    assert of["repeated"]["explained"] == [0, 0] and of["shuffled"]["explained"][0] < -0.5
    # of two photographs the other's patches are the mean of the others, and the two differ in every quarter
    assert of["others, place"]["correlation"][0] < 0.5
    printed = capsys.readouterr().out
    assert all(title in printed for title in (*patch_tokens.SOURCES.values(), "By chance 0.016 of"))
    with pytest.raises(UsageError, match="Two photographs or more"):
        patch_tokens.STUDY.main([*given, "--limit", "1"])
