"""`apm glom` as commands: files, messages, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from apm.cli.main import app
from apm.glom.training import NETWORK
from apm.pretrain.checkpoint import read_network
from tests.pretraining import make_folder, make_parquet

SIZES = ("--image-size", "16", "--patch-size", "4", "--dim", "8", "--levels", "3", "--expansion", "1")
FAST = (*SIZES, "--steps", "2", "--batch-size", "3", "--precision", "fp32", "--device", "cpu")


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["glom", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_trains_on_parquet_and_is_done_with_it(tmp_path: Path) -> None:
    table, out = make_parquet(tmp_path / "images.parquet", 8), tmp_path / "runs" / "glom.safetensors"
    command = ("train", table, "--out", out, *FAST, "--radius", "2.5", "--hidden", "0.25")
    code, said, told = run(*command)
    assert code == 0
    assert said.startswith(f"{out}: 2 steps on 7 images; held out on 1: mean squared error of hidden locations ")
    assert "train: step 2 of 2: hidden locations held out " in told and "; contrast held out " in told
    rows = [json.loads(line) for line in out.with_name(out.name + ".log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2]
    assert {"denoising", "contrast", "norm", "lr", "held_out_denoising", "held_out_contrast"} < rows[1].keys()
    found = read_network(out, NETWORK)
    assert found.finished and (found.student.levels, found.student.radius) == (3, 2.5)
    assert found.settings["hidden"] == 0.25

    again = run(*command)
    assert again[:2] == (0, said) and "finished: nothing left to train" in again[2]
    others = make_folder(tmp_path / "others", 5)
    for changed, difference in (
        ((*command, "--lr", "0.5"), "lr: 0.001 there, 0.5 here"),
        ((*command, "--dim", "9"), "dim: 8 there, 9 here"),
        (("train", others, *command[2:]), "data: "),
    ):
        code, said, told = run(*changed)
        assert (code, said) == (2, "") and difference in told


def test_skipped_images_are_named_at_the_end(tmp_path: Path) -> None:
    table = make_parquet(tmp_path / "t.parquet", 6, broken=(4,))
    code, said, told = run("train", table, "--out", tmp_path / "g.safetensors", *FAST, "--quiet")
    assert code == 1 and "2 steps on 4 images" in said
    assert told.startswith("error: t.parquet, row 4: ") and told.endswith(": skipped\n") and told.count("\n") == 1


def test_wrong_use_is_told_before_anything_is_read(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images", 3)
    out = ("--out", tmp_path / "g.safetensors")
    for arguments, message in (
        ((tmp_path / "none", *out), "none: no such folder"),
        ((folder, "--out", tmp_path), "is a folder; --out names the checkpoint's file"),
        ((folder, *out, "--patch-size", "7"), "Patches of 7 pixels do not tile an image of 64 pixels"),
        ((folder, *out, "--consensus", "al"), 'Did you mean "all"'),
        ((folder, *out, "--read-level", "5"), "read_level must be below 5"),
        ((folder, *out, "--hidden", "1"), "hidden is a share of the locations"),
        ((folder, *out, "--evaluate-every", "0"), "--evaluate-every must be 1 or more"),
        ((folder, *out, "--device", "cdua"), "cdua"),
        ((folder, *out, "--precision", "fp8"), 'Unknown precision "fp8"'),
    ):
        code, said, told = run("train", *arguments)
        assert (code, said) == (2, "") and message in told, (arguments, told)
    assert not list(tmp_path.glob("g.safetensors*"))


def test_interrupted_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("apm.glom.training.GLOMTrainer.advance", interrupt)
    folder = make_folder(tmp_path / "images", 4)
    code, _, told = run("train", folder, "--out", tmp_path / "g.safetensors", *FAST)
    assert code == 130 and "the same command goes on from the last checkpoint" in told


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glom")
    out = folder / "g.safetensors"
    assert run("train", make_folder(folder / "images", 6), "--out", out, *FAST, "--settling", "4", "--quiet")[0] == 0
    return out


def test_shows_the_columns_of_an_image(trained: Path, tmp_path: Path, picture: Path) -> None:
    code, said, told = run("show", picture, "--checkpoint", trained, "--out", tmp_path / "new" / "folder")
    assert (code, told) == (0, "")
    files = [Path(line) for line in said.splitlines()]
    assert len(files) == 5 and all(file.is_file() for file in files)
    tree = json.loads(next(file for file in files if file.suffix == ".json").read_text())
    assert tree["settings"] == {
        "image": "picture.jpg",
        "GLOM": "3 levels of 8",
        "trained": "2 steps",
        "steps": 4,  # as in training
        "threshold": 0.9,
    }
    assert sorted(place for island in tree["tree"] for place in island["places"]) == [
        [r, c] for r in range(4) for c in range(4)
    ]


def test_show_refuses_what_cannot_be_shown(trained: Path, tmp_path: Path, picture: Path) -> None:
    for arguments, code, message in (
        ((picture, "--checkpoint", tmp_path / "none.safetensors"), 2, "no such checkpoint; `apm glom train` makes one"),
        ((picture, "--checkpoint", trained, "--threshold", "1.5"), 2, "--threshold is a cosine"),
        ((picture, "--checkpoint", trained, "--steps", "0"), 2, "--steps must be 1 or more"),
        ((tmp_path / "none.jpg", "--checkpoint", trained), 1, "none.jpg"),
    ):
        found, said, told = run("show", *arguments, "--out", tmp_path / "out")
        assert (found, said) == (code, "") and message in told, (arguments, told)


def test_probes_every_level_beside_pixels_and_an_untrained_network(trained: Path, tmp_path: Path) -> None:
    table = make_parquet(tmp_path / "t.parquet", 30, classes=2)
    command = ("probe", table, "--checkpoint", trained, "--train", "20", "--quiet")
    code, said, told = run(*command, "--out", tmp_path / "r.json")
    assert (code, told) == (0, "")
    names = {"pixels", *(f"{kind}level {level}" for kind in ("", "untrained ") for level in range(3))}
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["probes"].keys() == names and (record["train"], record["test"], record["classes"]) == (20, 10, 2)
    assert record["steps"] == 4 and record["trained"]["lr"] == 0.001
    assert {name: row["width"] for name, row in record["probes"].items()} == {
        name: 32 * 32 * 3 if name == "pixels" else 8 for name in names
    }
    assert "| level 2 | 8 | " in said and "| raw pixels | 3,072 | " in said
    lost = run(*command, "--out", table / "r.json")
    assert (lost[0], lost[1]) == (1, said) and "r.json" in lost[2]
    for arguments, message in (
        ((*command[:-2], "30"), "--train must be from 10 to less than the 30 images, not 30"),
        (("probe", tmp_path / "none", *command[2:]), "no such file; a probe needs a Parquet file"),
        ((*command, "--seed", "-1"), "--seed must be from 0 to 4294967295, not -1"),
    ):
        code, said, told = run(*arguments)
        assert (code, said) == (2, "") and message in told
