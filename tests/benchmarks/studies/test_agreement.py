"""The study of agreement between columns: fields whose neighbours are known, and a study of colours from end to end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from apm.benchmarks.studies import agreement as study
from apm.student.config import APMConfig
from tests.benchmarks.studies.test_pointing import ColourTeacher
from tests.pretraining import picture


def test_disagreement_is_of_neighbours_and_not_of_the_fields_scale() -> None:
    model = APMConfig.preset("small", dim=8)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(16, 16, 8)).astype(np.float32)
    ramp = (np.arange(16, dtype=np.float32)[:, None, None] * np.ones((16, 16, 8), np.float32)) - 7.5
    assert study.disagreement(noise, model) > 0.6 > 0.1 > study.disagreement(ramp / 100, model)
    small = study.disagreement(1e-3 * noise, model)  # attention is even: the mean of 12 has a twelfth of the variance
    assert small == pytest.approx(study.disagreement(1e-4 * noise, model), rel=1e-3)
    assert small == pytest.approx(1 + 1 / 12, rel=0.1)


@pytest.mark.slow
def test_a_study_of_colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "load_teacher", lambda name, device: ColourTeacher())
    for number in range(3):
        folder = tmp_path / "images" / f"class {number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        picture(number, 32).save(folder / f"{number}.png")
    given = ["--root", str(tmp_path / "images"), "--steps", "12", "--limit", "2", "--weights", "0", "10"]
    options = study.STUDY.read([*given, "--rows", str(tmp_path / "rows.jsonl")])
    record = study.measure(options)
    assert record["images"] == 2 and list(record["means"]["grid"]) == ["0", "10"]
    means, gains = record["means"]["grid"], record["gains"]["grid"]
    assert means["10"]["disagreement"][0] < 0.9 * means["0"]["disagreement"][0]
    for weight, of in gains.items():
        for name, (gain, _) in of.items():
            assert gain == pytest.approx(means[weight][name][0] - means["0"][name][0])
    given += ["--targets", "grid", "--weights", "10", "0"]
    alone = study.measure(study.STUDY.read(given))
    assert alone["means"] == {"grid": {w: means[w] for w in ("10", "0")}} and list(alone["gains"]["grid"]) == ["0"]
    again = study.measure(options)
    assert again["seconds"] < record["seconds"] / 5 and again["means"] == record["means"]
    text = study.table({**record, "command": "c", "date": "d", "environment": {"git_commit": "e"}})
    assert "| the grid | 10 |" in text and "2 images" in text
