"""Held-out errors and baselines, pictures, the linear probe; docs/pretraining.md is made from the records."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from apm.benchmarks.studies import linear_probe, pretraining
from apm.errors import UsageError
from apm.pretrain.cache import GridCache
from apm.pretrain.student import Student
from apm.pretrain.trainer import Pretrainer
from apm.student.field import resample
from tests.fakes import FakeTeacher
from tests.places import ROOT
from tests.pretraining import DATA, STUDENT, TRAINING, GridTeacher, make_cache, make_parquet, picture

RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GridCache]:
    folder = tmp_path_factory.mktemp("trained")
    cache = make_cache(folder, 40)
    path = folder / "c.safetensors"
    Pretrainer(path, cache, STUDENT, TRAINING, data=DATA, precision="fp32").run(evaluate_every=2)
    return path, cache


def test_baselines_are_what_they_are_called(trained: tuple[Path, GridCache]) -> None:
    path, cache = trained
    student = Student.load(path)
    found = pretraining.compare(student, cache, TRAINING)
    train, held_out = TRAINING.split(40)
    grids = resample(torch.from_numpy(cache.grids.astype(np.float32)), 4).numpy()  # (40, 16, 4)
    test, fitted = grids[held_out], grids[train]
    squared = {
        "mean": (test - fitted.mean((0, 1))) ** 2,
        "mean_per_location": (test - fitted.mean(0)) ** 2,
    }
    pixels = cache.images.astype(np.float64).reshape(40, 4, 4, 4, 4, 3).mean((2, 4)).reshape(40, -1)
    nearest = [np.square(pixels[train] - pixels[one]).sum(1).argmin() for one in held_out]
    squared["nearest_pixels"] = (test - fitted[nearest]) ** 2
    columns = student.columns(cache.inputs(np.arange(40))).numpy()
    nearest = [np.square(columns[train] - columns[one]).sum(1).argmin() for one in held_out]
    squared["nearest_column"] = (test - fitted[nearest]) ** 2
    for name, errors in squared.items():
        assert found["grid"][name]["mse"] == pytest.approx(errors.mean(), rel=1e-4), name
        assert found["grid"][name]["stderr"] == pytest.approx(
            errors.mean((1, 2)).std(ddof=1) / np.sqrt(len(held_out)), rel=1e-4
        )
        paired = errors.mean((1, 2)).mean() - found["grid"]["student"]["mse"]
        assert found["grid"][name]["above_student"]["mse"] == pytest.approx(paired, rel=1e-3)
    losses = Pretrainer(path, cache, STUDENT, TRAINING, data=DATA, precision="fp32").held_out_losses()
    assert found["grid"]["student"]["mse"] == pytest.approx(losses["grid"], rel=1e-5)
    assert found["colours"]["student"]["mse"] == pytest.approx(losses["rgb"], rel=1e-5)
    assert found["grid"]["mean"]["explained"] == 0
    assert found["grid"]["linear_pixels"]["explained"] > 0.9  # this teacher is linear in pooled pixels


@pytest.fixture
def arguments(trained: tuple[Path, GridCache], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(pretraining, "load_grid_teacher", lambda spec: GridTeacher())
    path, _ = trained
    return [str(path), "--data", str(path.parent / "images"), "--cache", str(path.parent / "cache")]


def test_command_measures_what_was_trained(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretraining.main([*arguments, "--record", str(tmp_path / "r.json")])
    record = json.loads((tmp_path / "r.json").read_text())
    shown = pretraining.table(record)
    assert capsys.readouterr().out.strip() == shown
    assert f"| **student** | {record['grid']['student']['mse']:.4f} ± " in shown
    assert record["checkpoint"]["settings"] == {**DATA, **asdict(TRAINING), "precision": "fp32", "images": 40}
    assert record["command"] == (
        "python -m apm.benchmarks.studies.pretraining c.safetensors --data images --cache cache"
    )
    assert [row["step"] for row in record["curves"]] == [0, 2, 4, 6]
    assert record["held_out_images"] == 10 and record["teacher_grid"] == [2, 2, 4]
    other = GridTeacher()
    other.identity = "fake@1"
    monkeypatch.setattr(pretraining, "load_grid_teacher", lambda spec: other)
    with pytest.raises(UsageError, match=r"trained with fake@0, not with fake@1"):
        pretraining.main(arguments)


def test_pictures_need_images() -> None:
    with pytest.raises(UsageError, match="--pictures needs a checkpoint and --images"):
        pretraining.main(["student.safetensors", "--pictures", "out.png"])


@pytest.mark.slow
def test_figures_are_drawn(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = []
    for number in (50, 51):
        images.append(str(tmp_path / f"{number}.png"))
        picture(number).save(images[-1])
    pretraining.main([arguments[0], "--pictures", str(tmp_path / "pictures.png"), "--images", *images])
    told = dict(line.split(": ") for line in capsys.readouterr().err.splitlines())
    assert set(told) == {"50.png", "51.png"} and all(float(error) > 0 for error in told.values())
    pretraining.main(["--figure", str(tmp_path / "curves.png"), "--table", str(RESULTS / "pretraining.json")])
    assert (tmp_path / "curves.png").stat().st_size > 5000 and (tmp_path / "pictures.png").stat().st_size > 5000


def test_probe_finds_what_is_linear_and_tests_on_other_rows() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    inputs = rng.standard_normal((300, 5)).astype(np.float32)
    noise = linear_probe.probe(inputs, labels, 240, seed=0)
    assert noise["accuracy"] < 0.6
    inputs[np.arange(300), labels] += 8
    found = linear_probe.probe(inputs, labels, 240, seed=0)
    assert found["accuracy"] > 0.95 and found["width"] == 5 and found["converged"]
    assert found["stderr"] == pytest.approx(np.sqrt(found["accuracy"] * (1 - found["accuracy"]) / 60))
    wrong = labels.copy()
    wrong[240:] = (wrong[240:] + 1) % 3  # only the test rows: fitted on the others, the probe must miss them
    assert linear_probe.probe(inputs, wrong, 240, seed=0)["accuracy"] < 0.05


def test_probe_inputs(trained: tuple[Path, GridCache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = Student.load(trained[0])
    data = make_parquet(tmp_path / "t.parquet", 30)
    images, labels = linear_probe.read_table(data, 20, 1)
    again = linear_probe.read_table(data, 20, 1)
    assert images == again[0] and np.array_equal(labels, again[1]) and len(set(labels)) == 20
    inputs = linear_probe.describe_images(images, student, FakeTeacher(), side=8, batch=7)
    assert {name: rows.shape for name, rows in inputs.items()} == {
        "pixels": (20, 192), "pooled": (20, 48), "column": (20, 16), "field": (20, 4), "hidden": (20, 8),
        "untrained": (20, 4), "teacher": (20, 16),
    }  # fmt: skip
    from apm.student.position import grid_locations

    features, _ = student.field(torch.from_numpy(inputs["column"]), *grid_locations(4))
    np.testing.assert_allclose(inputs["field"], features.mean(1), rtol=1e-4, atol=1e-6)
    number = int(labels[3])
    np.testing.assert_allclose(
        inputs["pixels"][3].reshape(8, 8, 3) * 255,
        np.asarray(pretraining.central_square(picture(number), 8)),
        atol=1e-3,
    )

    monkeypatch.setattr(linear_probe, "load_teacher", lambda name, device: FakeTeacher())
    monkeypatch.setattr(linear_probe, "read_table", lambda *_: (images, labels % 2))
    linear_probe.STUDY.main([str(trained[0]), "--data", str(data), "--train", "15", "--out", str(tmp_path / "r.json")])
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["test"] == 5 and record["classes"] == 2 and set(record["probes"]) == set(linear_probe.NAMES)
    with pytest.raises(UsageError, match="--train must be from 10 to less than the 20 images"):
        linear_probe.STUDY.main([str(trained[0]), "--data", str(data), "--train", "20"])


def test_document_shows_figures_that_are_there() -> None:
    import re

    text = (ROOT / "docs" / "pretraining.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)\)", text)
    assert targets
    for target in targets:
        assert target.startswith("https://") or (ROOT / "docs" / target).exists(), target
