"""`apm pretrain` as a command: files, messages, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from apm.cli.main import app
from apm.pretrain.checkpoint import read_checkpoint
from tests.pretraining import GridTeacher, make_folder, make_parquet

FAST = ("--steps", "2", "--batch-size", "3", "--locations", "8", "--precision", "fp32", "--device", "cpu")


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch) -> GridTeacher:
    teacher = GridTeacher()
    monkeypatch.setattr("apm.teachers.load_grid_teacher", lambda spec, device: teacher)
    return teacher


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["pretrain", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_trains_and_is_done_with_it(tmp_path: Path, teacher: GridTeacher) -> None:
    folder, out = make_folder(tmp_path / "images", 8), tmp_path / "runs" / "student.safetensors"
    command = (folder, "--teacher-grid", "fake", "--out", out, *FAST)
    code, said, told = run(*command)
    assert code == 0
    assert said.startswith(f"{out}: 2 steps on 7 images; held-out mean squared error on 1: grid 0.")
    assert "note: A teacher for tests." in told and "train: step 2 of 2: grid held out" in told
    names = {path.name for path in out.parent.iterdir()}
    assert names - {out.name + ".lock"} == {out.name, out.name + ".log.jsonl", out.name + ".cache"}
    rows = [json.loads(line) for line in out.with_name(out.name + ".log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2]
    assert {"grid", "rgb", "norm", "lr", "held_out_grid", "held_out_rgb", "seconds"} < rows[1].keys()
    found = read_checkpoint(out)
    assert found.finished and found.settings["teacher"] == "fake@0" and found.settings["grid_size"] == 8
    assert (found.student.grid, found.student.dim, found.student.readout) == (16, 4, "mean")

    again = run(*command)
    assert again[:2] == (0, said) and "finished: nothing left to train" in again[2]
    assert teacher.calls == 8
    other = run(*command, "--lr", "0.5")
    assert other[:2] == (2, "") and "lr: 0.002 there, 0.5 here" in other[2]
    more = make_folder(tmp_path / "images", 9)
    assert "data: " in run(more, *command[1:])[2]


def test_grey_input_needs_no_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apm.teachers.load_grid_teacher", lambda *_, **__: pytest.fail("no teacher was named"))
    folder, out = make_folder(tmp_path / "images", 6), tmp_path / "s.safetensors"
    code, said, told = run(folder, "--grey-input", "--patch-size", "4", "--out", out, *FAST)
    assert code == 0 and "held-out mean squared error on 1: colours 0." in said and "grid" not in said + told
    found = read_checkpoint(out)
    assert (found.settings["grey_input"], found.settings["teacher"]) == (True, None)
    assert (found.student.grid, found.student.patch_size, found.student.image_size) == (16, 4, 64)
    (where,) = out.with_name(out.name + ".cache").iterdir()
    assert (where / "grids.f16").stat().st_size == 0


def test_skipped_images_are_named_at_the_end(tmp_path: Path, teacher: GridTeacher) -> None:
    table = make_parquet(tmp_path / "t.parquet", 6, broken=(4,))
    code, said, told = run(table, "--teacher-grid", "fake", "--out", tmp_path / "s.safetensors", *FAST, "--quiet")
    assert code == 1 and "2 steps on 4 images" in said
    assert told.splitlines()[-1].startswith("error: t.parquet, row 4: ") and told.splitlines()[-1].endswith(": skipped")
    assert "train:" not in told


def test_json_is_json_whatever_files_are_called(tmp_path: Path, teacher: GridTeacher) -> None:
    table = make_parquet(tmp_path / "of\u00a0mine.parquet", 6, broken=(4,))
    out = tmp_path / "a\u00a0b.safetensors"
    code, said, _ = run(table, "--teacher-grid", "fake", "--out", out, *FAST, "--json")
    record = json.loads(said)
    assert code == 1 and record["checkpoint"] == str(out) and record["skipped"] == ["of\u00a0mine.parquet, row 4"]


def test_links_that_lead_nowhere_are_counted_and_the_first_is_named(tmp_path: Path, teacher: GridTeacher) -> None:
    folder = make_folder(tmp_path / "images", 6)
    for name in ("y.png", "x.png"):
        (folder / "a" / name).symlink_to(tmp_path / "gone.png")
    code, said, told = run(folder, "--teacher-grid", "fake", "--out", tmp_path / "s.safetensors", *FAST, "--quiet")
    assert code == 1 and "2 steps on 5 images" in said and "note: A teacher" in told
    assert told.splitlines()[-1] == (
        f"error: 2 paths lead to no image in {folder} and what is below it, first {folder}/a/x.png:"
        " a link to a file that is not there."
    )


def test_wrong_use_is_told_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "images", 3)
    (tmp_path / "empty").mkdir()
    out = ("--out", tmp_path / "s.safetensors")
    named = ("--teacher-grid", "embedded")
    for arguments, message in (
        ((tmp_path / "none", *named, *out), "none: no such folder or file"),
        ((tmp_path / "empty", *named, *out), "no images in this folder or below it"),
        ((folder, *named, "--out", tmp_path), "is a folder; --out names the checkpoint's file"),
        ((folder, *named, "--out", tmp_path / "s.pt"), "name ends in .safetensors"),
        ((folder, "--teacher-grid", "embeded", *out), 'Did you mean "embedded"'),
        ((folder, *named, *out, "--preset", "smal"), 'Unknown preset "smal". Did you mean "small"?'),
        ((folder, *named, *out, "--steps", "0"), "steps must be 1 or more, not 0"),
        ((folder, *named, *out, "--seed", "-1"), "seed must be from 0 to 9223372036854775807, not -1"),
        ((folder, *named, *out, "--held-out", "1"), "held_out is a share"),
        ((folder, *named, *out, "--save-every", "0"), "--save-every must be 1 or more"),
        ((folder, *named, *out, "--max-pixels", "0"), "--max-pixels must be 1 or more"),
        ((folder, *named, *out, "--precision", "fp8"), 'Unknown precision "fp8"'),
        ((folder, *out), "--teacher-grid NAME is missing"),
        ((folder, *named, *out, "--patch-size", "0"), "--patch-size must be from 1 to 64 pixels, not 0"),
        ((folder, *out, "--grey-input", "--grid-size", "64"), "there is no --teacher-grid"),
        ((folder, *out, "--grey-input", "--rgb-weight", "0"), "rgb_weight must be above 0"),
    ):
        code, said, told = run(*arguments)
        assert (code, said) == (2, "") and message in told, (arguments, told)
    assert not list(tmp_path.glob("s.safetensors*"))


def test_interrupted_is_said(tmp_path: Path, teacher: GridTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("apm.pretrain.trainer.Pretrainer.advance", interrupt)
    folder = make_folder(tmp_path / "images", 4)
    code, _, told = run(folder, "--teacher-grid", "fake", "--out", tmp_path / "s.safetensors", *FAST)
    assert code == 130 and "the same command goes on from the last checkpoint" in told

    encode = teacher.encode_grid
    monkeypatch.setattr(teacher, "encode_grid", lambda *a, **k: interrupt() if teacher.calls == 6 else encode(*a, **k))
    more = make_folder(tmp_path / "more", 4)
    code, _, told = run(more, "--teacher-grid", "fake", "--out", tmp_path / "t.safetensors", *FAST)
    assert code == 130 and "interrupted: 2 of 4 images are read; the same command goes on from there" in told
