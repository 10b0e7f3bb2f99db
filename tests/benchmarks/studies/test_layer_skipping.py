"""The study of left-out layers: baselines held to least squares, operations counted, a run from training to table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from apm.benchmarks.studies import layer_skipping, linear_maps
from apm.errors import UsageError
from apm.pretrain.images import open_images
from apm.pretrain.loop import read_log
from apm.teachers.cut_towers import Shape
from tests.pretraining import make_folder, make_parquet


def test_the_linear_map_is_least_squares_with_a_penalty_chosen_on_other_images() -> None:
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(40, 5, 3, generator=generator) + 2
    true = torch.randn(3, 2, generator=generator)
    noise = 0.1 * torch.randn(40, 5, 2, generator=generator)
    wanted = given @ true + 1 + noise
    linear = linear_maps.Linear(lambda n: (given[n], wanted[n]), np.arange(40))
    x = np.concatenate([given.flatten(0, 1).numpy(), np.ones((200, 1), np.float32)], axis=1).astype(np.float64)
    ridge = linear.penalty * 200 * x[:, :3].var(axis=0).mean() * np.diag([1, 1, 1, 0])
    expected = np.linalg.solve(x.T @ x + ridge, x.T @ wanted.flatten(0, 1).double().numpy())
    assert linear.penalty < 0.1
    np.testing.assert_allclose(linear.weights.numpy(), expected, rtol=1e-3, atol=1e-4)
    assert linear(given).shape == (40, 5, 2)
    nothing = linear_maps.Linear(lambda n: (given[n], noise[n]), np.arange(40))  # there is nothing to be learned
    assert nothing.penalty == max(linear_maps.PENALTIES)


def test_layers_that_are_skipped_are_pooled_and_filled_up() -> None:
    tokens = torch.arange(32.0).view(1, 16, 2)
    found = linear_maps.skipped(tokens, Shape(0, 4, 2), Shape(0, 2, 3))
    assert found[0].tolist() == [[5, 6, 0], [9, 10, 0], [21, 22, 0], [25, 26, 0]]
    same = linear_maps.skipped(torch.cat((tokens[:, :1], tokens), dim=1), Shape(1, 4, 2), Shape(1, 4, 2))
    assert torch.equal(same, torch.cat((tokens[:, :1], tokens), dim=1))


def test_operations_are_counted() -> None:
    x, w = torch.ones(3, 4), torch.ones(4, 5)
    assert layer_skipping.measured_flops(lambda: x @ w) == 2 * 3 * 4 * 5
    assert layer_skipping.measured_flops(lambda: x + 1) == 0
    assert layer_skipping.seconds_of(lambda: x @ w, times=3) > 0


def test_the_first_images_of_a_source(tmp_path: Path) -> None:
    for place in (make_folder(tmp_path / "images", 6), make_parquet(tmp_path / "t.parquet", 6)):
        source = open_images(place)
        some = layer_skipping.first_of(source, 4)
        everything, found = list(source.read()), list(some.read())
        assert len(some) == 4 and [name for name, _ in found] == [name for name, _ in everything][:4]
        assert [name for name, _ in some.read(3)] == [everything[3][0]]
        assert some.fingerprint != source.fingerprint and layer_skipping.first_of(source, None) is source
        assert len(layer_skipping.first_of(source, 99)) == 6


def test_wrong_pairs_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="--root, the images, and --work"):
        layer_skipping.STUDY.main([])
    table = make_parquet(tmp_path / "t.parquet", 4)
    for pair, message in (("0:5", "has layers 1 to 4; there is no 5"), ("3:2", "does not come after")):
        with pytest.raises(UsageError, match=message):
            layer_skipping.STUDY.main(["--root", str(table), "--work", str(tmp_path), "--pairs", pair])
    with pytest.raises(SystemExit):
        layer_skipping.STUDY.main(["--pairs", "1-2"])
    assert "pairs of layers such as 0:4,2:6, not 1-2" in capsys.readouterr().err


@pytest.mark.slow
def test_from_training_to_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images, record = make_folder(tmp_path / "images", 10), tmp_path / "r.json"
    given = ["--root", str(images), "--work", str(tmp_path / "work"), "--steps", "3", "--pairs", "0:3,3:4"]
    layer_skipping.STUDY.main(
        [*given, "--label-set", "imagenette", "--limit", "8", "--record", str(record), "--seconds"]
    )
    printed, found = capsys.readouterr().out, json.loads(record.read_text())
    assert (found["train_images"], found["held_out_images"], found["labels"]) == (6, 2, 10)
    one, other = ({name: row for name, row in pair["stand_ins"].items()} for pair in found["pairs"])
    assert set(other) == set(layer_skipping.KINDS) and set(one) == set(other) - {"skipped"}
    rest = one["mean"]["operations"]
    assert 0 < rest < one["column"]["operations"] < one["local"]["operations"] < found["operations"]
    assert other["mean"]["operations"] < rest < other["skipped"]["operations"] < found["operations"]
    for row in (*one.values(), *other.values()):
        assert -1 <= row["cosine"][0] <= 1 and 0 <= row["agreement"][0] <= 1 and row["seconds"] > 0
    for title in ("image → 3", "3 → 4", "student, local", "time saved", "held-out and 6 training images of images"):
        assert title in printed
    log = tmp_path / "work" / "3-4-local.safetensors.log.jsonl"
    assert [row["step"] for row in read_log(log)] == [0, 3]
    monkeypatch.setattr(layer_skipping.LayerTrainer, "advance", None)  # all is trained: nothing is trained again
    layer_skipping.STUDY.main([*given, "--label-set", "imagenette", "--limit", "8", "--record", str(record)])
    again = json.loads(record.read_text())
    for pair, before in zip(again["pairs"], found["pairs"], strict=True):
        for name, row in pair["stand_ins"].items():
            assert row == {key: value for key, value in before["stand_ins"][name].items() if key != "seconds"}


@pytest.mark.slow
def test_what_the_teacher_itself_gives_is_agreed_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = layer_skipping.Between.__init__

    def perfect(self: layer_skipping.Between, *arguments: object) -> None:
        real(self, *arguments)  # type: ignore[arg-type]
        tower = self.towers["column"]
        layers = tower.layers

        def right(given: Tensor) -> Tensor:
            return layers.between(given, tower.first, tower.last)

        tower.stand_in = right

    monkeypatch.setattr(layer_skipping.Between, "__init__", perfect)
    images, record = make_folder(tmp_path / "images", 8), tmp_path / "r.json"
    given = ["--root", str(images), "--work", str(tmp_path / "work"), "--steps", "1", "--pairs", "3:4"]
    layer_skipping.STUDY.main([*given, "--label-set", "imagenette", "--record", str(record)])
    row = json.loads(record.read_text())["pairs"][0]["stand_ins"]["column"]
    assert row["cosine"][0] > 0.99999 and row["agreement"] == [1, 0] and row["unexplained"][0] < 1e-6
