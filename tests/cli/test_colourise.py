"""`apm colourise`: pictures, lines, records, going on, and errors for people."""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from apm.cli.main import app
from apm.pretrain.checkpoint import Checkpoint, write_checkpoint
from apm.pretrain.colouring import colourise
from apm.pretrain.student import Student
from tests.pretraining import grey_student
from tests.pretraining import picture as drawn

SCHEMA = json.loads(resources.files("apm.cli").joinpath("schemas/colourise.json").read_text())


def checkpoint(path: Path, *, seed: int = 5, grey_input: bool = True) -> Path:
    student = grey_student(seed, grey_input=grey_input)
    weights = dict(student.model.state_dict())
    write_checkpoint(path, Checkpoint(student.config, student.record["settings"], 6, weights, {}))
    return path


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "c.safetensors")


def run(trained: Path, out: Path, *arguments: str | Path) -> Result:
    named = ["--checkpoint", str(trained), "--out", str(out), "--device", "cpu"]
    return CliRunner().invoke(app, ["colourise", *named, *map(str, arguments)])


def opened(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_picture_line_and_record_say_the_same(trained: Path, tmp_path: Path) -> None:
    wide, out = tmp_path / "wide.png", tmp_path / "out"
    drawn(3).resize((50, 20)).convert("L").save(wide)
    result = run(trained, out, wide)
    assert result.exit_code == 0, result.stderr
    named, picture = result.stdout.rstrip("\n").split("\t")
    assert named == str(wide)
    wanted = colourise(Student.load(trained), Image.open(wide).convert("RGB"))
    assert np.array_equal(opened(Path(picture)), np.asarray(wanted)) and wanted.size == (50, 20)
    record = json.loads(run(trained, out, wide, "--json").stdout)
    jsonschema.validate(record, SCHEMA)
    assert record["size"] == [50, 20] and record["places"] == 4 and out / record["files"]["picture"] == Path(picture)
    assert json.loads(Path(picture).with_suffix(".json").read_text()) == record
    finer = run(trained, tmp_path / "finer", wide, "--places", "9", "--json")
    assert json.loads(finer.stdout)["places"] == 9


def test_bad_files_are_named_and_the_others_go_on(trained: Path, tmp_path: Path) -> None:
    good, broken = tmp_path / "good.png", tmp_path / "broken.png"
    drawn(1).save(good)
    broken.write_bytes(b"no picture")
    result = run(trained, tmp_path / "out", broken, tmp_path / "none.png", good, "--json")
    assert result.exit_code == 1 and "Traceback" not in result.stderr
    assert result.stderr.count("broken.png") == 1 and result.stderr.count("none.png") == 1
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [record["error"] is None for record in records] == [False, False, True]
    for record in records:
        jsonschema.validate(record, SCHEMA)
    small = run(trained, tmp_path / "small", good, "--max-pixels", "100")
    assert small.exit_code == 1 and "pixels" in small.stderr and not list((tmp_path / "small").glob("*.png"))
    nothing = run(trained, tmp_path / "nothing", tmp_path / "none.png", "--json")
    jsonschema.validate(json.loads(nothing.stdout), SCHEMA)
    assert nothing.exit_code == 1 and not (tmp_path / "nothing").exists()


def test_the_same_command_goes_on_and_other_settings_are_refused(trained: Path, tmp_path: Path) -> None:
    first, second, out = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "out"
    drawn(1).save(first)
    drawn(2).save(second)
    before = json.loads(run(trained, out, first, "--json").stdout)
    made = out / before["files"]["picture"]
    stamp = made.stat().st_mtime_ns
    again = [json.loads(line) for line in run(trained, out, first, second, "--json").stdout.splitlines()]
    assert again[0] == before and made.stat().st_mtime_ns == stamp and again[1]["error"] is None
    os.utime(first, ns=(1, 1))
    assert json.loads(run(trained, out, first, "--json").stdout)["file"]["modified_ns"] == 1
    other = run(trained, out, first, "--places", "5")
    assert other.exit_code == 2 and "places: 4 there, 5 here" in other.stderr
    checkpoint(trained, seed=6)
    changed = run(trained, out, first)
    assert changed.exit_code == 2 and "student: c.safetensors@" in changed.stderr


def test_results_of_another_command_or_of_unknown_settings_are_not_taken(trained: Path, tmp_path: Path) -> None:
    photograph, out = tmp_path / "a.png", tmp_path / "out"
    drawn(1).save(photograph)
    assert json.loads(run(trained, out, photograph, "--json").stdout)["places"] == 4
    (out / "colourise.settings.json").unlink()
    assert json.loads(run(trained, out, photograph, "--places", "5", "--json").stdout)["places"] == 5
    (out / "segment.settings.json").write_text("{}")
    other = run(trained, out, photograph, "--places", "5")
    assert other.exit_code == 2 and "holds results of apm segment: give another --out" in other.stderr


def test_wrong_usage_is_one_line_and_leaves_nothing(trained: Path, tmp_path: Path) -> None:
    photograph, out = tmp_path / "a.png", tmp_path / "out"
    drawn(1).save(photograph)
    coloured = checkpoint(tmp_path / "coloured.safetensors", grey_input=False)
    for student, arguments, words in (
        (coloured, (), "was trained on colours; `apm pretrain --grey-input` trains one"),
        (tmp_path / "no.safetensors", (), "no such checkpoint"),
        (photograph, (), "is not a safetensors file"),
        (trained, ("--places", "0"), "must be from 1 to 1024, not 0"),
    ):
        result = run(student, out, photograph, *arguments)
        assert result.exit_code == 2 and words in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
    assert not out.exists()
