"""The measurement behind the default number of steps, and the model card made from records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from apm.benchmarks.runs.records import Records
from apm.benchmarks.studies import model_card, steps
from tests.benchmarks.made_runs import make_dataset, make_run
from tests.fakes import FakeTeacher


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.setattr(steps, "load_teacher", lambda name, device: FakeTeacher(dim=16, name=name))
    fast = ("digits", "--preset", "small", "--limit", "4", "--steps", "15", "--precision", "fp32")
    return steps.STUDY.measured(steps.STUDY.read(fast))


@pytest.mark.slow
def test_cosines_start_near_nothing_and_rise(record: dict) -> None:
    assert record["images"] == 4
    assert len(record["cosine_mean"]) == len(record["agreement"]) == 16  # before the first step, and after each
    assert abs(record["cosine_mean"][0]) < 0.9
    assert record["cosine_mean"][-1] > record["cosine_mean"][0] + 0.2
    assert all(low <= mean for low, mean in zip(record["cosine_minimum"], record["cosine_mean"], strict=True))
    assert record["precision"] == "fp32"
    assert record["environment"]["threads"] == torch.get_num_threads()


@pytest.mark.slow
def test_the_table_shows_the_records_figures(record: dict) -> None:
    text = steps.table([record, {**record, "preset": "paper"}])
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows] == ["steps", "1", "5", "10", "15"]
    assert f"{record['cosine_mean'][5]:.4f}" in rows[2]
    assert record["teacher"] in text
    assert "4 images" in text


def test_a_card_takes_its_figures_from_the_runs(tmp_path: Path) -> None:
    make_run(tmp_path / "run", dataset=make_dataset(9))
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "open_clip_model.safetensors").write_bytes(b"0" * 2_000_000)
    (folder / "labels.txt").write_text("cat\ndog\n")
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 40},
        "text_cfg": {"layers": 3, "width": 48, "context_length": 16, "vocab_size": 999},
    }
    records = {
        "recipe": {"tower": "test_resnet", "steps": 7},
        "training": {
            "command": "python -m trainer",
            "summary": "7 steps.",
            "images": {"tiny-imagenet": 11, "imagenette": 12, "cifar10": 13, "digits": 14},
        },
        "measured": {
            "logit_scale": 12.5,
            "held_out_count": 15,
            "token_deviation": 0.4,
            "texts_nearest_to_their_target": 0.75,
            "texts": 16,
        },
        "open_clip_config": {"model_cfg": config},
    }
    for name, content in records.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    counts = {"photographs": 9, "fallen": 2, "correct": 5, "correct_among_words": 6}
    found = {"command": "python -m study", "words": ["dog", "house"], "counts": {"dog": counts}}
    (tmp_path / "everyday.json").write_text(json.dumps(found))
    model_card.main(
        [str(folder), "--run", f"Nine pictures={tmp_path / 'run'}", "--everyday", str(tmp_path / "everyday.json")]
    )
    text = (folder / "README.md").read_text(encoding="utf-8")
    records_of_run = Records.open(tmp_path / "run")
    ((_, rows),) = records_of_run.rows(*records_of_run.cells)
    accuracy = 100 * (rows.prediction == rows.label).mean()
    assert f"| Nine pictures | 3 | 9 | {accuracy:.2f} ± " in text
    assert "12.5, calibrated on 15 held-out" in text
    assert "2.0 MB" in text
    assert "offered dog, house and imagenette's ten labels (`python -m study`)" in text
    assert "| dog | 9 | 2 | 5 | 6 |" in text
    assert "{" not in text.replace(json.dumps(records["recipe"]), "")
