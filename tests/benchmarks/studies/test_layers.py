"""Layers of a fixed model against masks: scores that follow the truth alone, paired differences, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from apm.benchmarks.studies import layers as study
from apm.benchmarks.studies.partitions import fit
from apm.errors import UsageError
from apm.student import islands
from apm.student.field import resample
from apm.teachers import load_layers
from tests.benchmarks.studies.test_glom_studies import coco

LAYER = "layer2, 8 × 8"


@pytest.mark.slow
def test_the_command_measures_keeps_rows_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = coco(tmp_path / "coco", 3)
    words = ["--root", str(root), "--source", "vit:test_resnet:1,2@random", "--pixels", "64", "--parts", "4"]
    words += ["--places", "16", "--rows", str(tmp_path / "rows.jsonl"), "--record", str(tmp_path / "record.json")]
    study.STUDY.main([*words, "--limit", "2"])
    study.STUDY.main([*words, "--limit", "3"])
    assert capsys.readouterr().out.count("weights at random (seed 0), not trained") == 2
    record = json.loads((tmp_path / "record.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()][1:]
    assert record["images"] == len(rows) == 3 and list(record["layers"]) == ["layer1, 16 × 16", LAYER]

    scenes = list(study.photographs(root, 16))
    source = load_layers("vit:test_resnet:1,2@random", size=64)
    field = source.encode(scenes[1].square)["2"]
    truth = scenes[1].truth
    cut = islands.clusters(resample(field, 16).reshape(16, 16, -1), rows[1]["number"])
    scores = rows[1]["layers"][LAYER]["image"]
    assert scores["AMI mask"] == pytest.approx(islands.agreement(cut[truth >= 0], truth[truth >= 0]))
    assert scores["F mask"] == pytest.approx(fit(cut, truth, 0.02).f)
    other = scenes[2].truth
    assert scores["AMI other mask"] == pytest.approx(islands.agreement(cut[other >= 0], other[other >= 0]))
    own = islands.superpixels(scenes[1].square, 8, 4)
    assert scores["contrast image"] == pytest.approx(islands.boundary_contrast(field.numpy(), own))

    pairs = [row["layers"][LAYER] for row in rows]
    less = [one["image"]["AMI mask"] - one["colours"]["AMI mask"] for one in pairs]
    mean, error = record["differences"][LAYER]["colours"]["AMI mask"]
    assert mean == pytest.approx(np.mean(less)) and error == pytest.approx(np.std(less, ddof=1) / 3**0.5)
    with pytest.raises(UsageError, match="other settings"):
        study.STUDY.main([*words, "--seed", "1"])


def test_it_needs_images() -> None:
    with pytest.raises(UsageError, match="--root"):
        study.measure(study.STUDY.read([]))
