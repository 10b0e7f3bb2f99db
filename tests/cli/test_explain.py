"""`apm classify --explain`: a picture and arrays for each image, under names of its own, and errors for people."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from apm.cli.main import app
from tests.fakes import FakeTeacher

pytestmark = pytest.mark.usefixtures("fake_teacher", "narrow_students")

LABELS = ("--labels", "cat,do$g$,bird,house")


def explain(folder: Path, *arguments: str | Path) -> Result:
    fast = ["--preset", "small", "--device", "cpu", "--precision", "fp32", "--explain-size", "20"]
    command = ["classify", "--teacher", "fake", *LABELS, *fast, "--explain", str(folder), *map(str, arguments)]
    return CliRunner().invoke(app, command)


@pytest.mark.slow
def test_a_picture_and_arrays_for_each_image(picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    hostile = tmp_path / "-a\n$x_{\t.png"
    twin = tmp_path / "other" / picture.name
    broken = tmp_path / "broken.jpg"
    twin.parent.mkdir()
    Image.new("RGB", (30, 40), "orange").save(hostile)
    Image.new("RGB", (30, 40), "navy").save(twin)
    broken.write_bytes(b"\xff\xd8\xff\xe0 no picture")
    result = explain(out, "--json", "--steps", "2", picture, hostile, broken, twin)
    assert result.exit_code == 1  # one could not be read
    assert "broken.jpg" in result.stderr and "Traceback" not in result.stderr
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["error"] is None for answer in answers] == [True, True, False, True]
    names = sorted(os.listdir(out))
    assert len(names) == 6 and all(name.isascii() and not name.startswith(("-", ".")) for name in names)
    for png, npz in zip([n for n in names if n.endswith("png")], [n for n in names if n.endswith("npz")], strict=True):
        assert Path(png).stem == Path(npz).stem
        with Image.open(out / png) as drawn:
            assert drawn.width > 600 and drawn.height > 300


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "finest"),
    [
        ((), "1/10 of the side"),  # 4 cells in views of 0.4 of the side
        (("--grid-views", "1", "--guide", "rgb"), "1/4 of the side, but for edges of the image's colours"),
        (("--grid-views", "tokens:3"), "1/5 of the side"),
    ],
)
def test_it_says_how_fine_the_field_can_be(
    arguments: tuple[str, ...], finest: str, picture: Path, tmp_path: Path
) -> None:
    assert explain(tmp_path / "out", "--steps", "1", *arguments, picture).exit_code == 0
    with np.load(next((tmp_path / "out").glob("*.npz"))) as arrays:
        assert json.loads(str(arrays["settings"]))["nothing in the field is finer than"] == finest


@pytest.mark.slow
def test_the_arrays_hold_what_the_picture_shows(picture: Path, tmp_path: Path, fake_teacher: FakeTeacher) -> None:
    result = explain(tmp_path / "out", "--json", "--steps", "3", "--lr", "0.002", picture)
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    (npz,) = (tmp_path / "out").glob("*.npz")
    with np.load(npz) as arrays:
        settings = json.loads(str(arrays["settings"]))
        assert (settings["distil"], settings["steps"], settings["lr"]) == ("both", 3, 0.002)
        assert settings["teacher"] == fake_teacher.identity and "softmax" in settings["map"]
        assert arrays["maps"].shape == (3, 20, 20)  # finer than the teacher's grid and the student's
        grid = fake_teacher.encode_grid(Image.open(picture))
        assert arrays["teacher_maps"].shape == (3, *grid.shape[:2])
        np.testing.assert_allclose(arrays["teacher_grid"], grid.numpy(), rtol=1e-5)
        assert arrays["labels"].tolist() == [one["label"] for one in answer["top"]][:3]
        np.testing.assert_allclose(sorted(arrays["probabilities"])[::-1], [one["probability"] for one in answer["top"]])
        assert arrays["attention"].shape == (8, 20, 20)
        np.testing.assert_allclose(arrays["attention"].sum((1, 2)), 1, rtol=1e-4)
        assert arrays["best"].min() >= 0 and arrays["best"].max() < 4
        assert ((arrays["maps"] > 0) & (arrays["maps"] < 1)).all()


@pytest.mark.slow
def test_only_the_grid_has_no_attention(picture: Path, tmp_path: Path) -> None:
    result = explain(tmp_path, "--quiet", "--steps", "2", "--distil", "grid", picture)
    assert (result.exit_code, result.stderr) == (0, "")
    (npz,) = tmp_path.glob("*.npz")
    with np.load(npz) as arrays:
        assert "attention" not in arrays and arrays["maps"].shape == (3, 20, 20)


@pytest.mark.slow
def test_what_the_maps_need_is_filled_in_and_said(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apm.test_time.label_maps.STEPS", 4)
    result = explain(tmp_path, "--json", picture)
    assert "--explain uses --steps 4, --lr 0.001, --distil both, --grid-views 16," in result.stderr
    assert json.loads(result.stdout)["adaptation"]["steps"] == 4
    result = explain(tmp_path, "--json", "--lr", "0.0002", "--steps", "2", picture)
    assert "--explain uses --distil both, --grid-views 16," in result.stderr
    assert json.loads(result.stdout)["adaptation"]["lr"] == 0.0002


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--distil", "cls"], "--distil both or grid"),
        (["--explain-size", "99999"], "not 99999"),
        (["--explain-size", "0"], "--explain-size must be from 1 to 2048, not 0"),
    ],
)
def test_wrong_usage(arguments: list[str], told: str, picture: Path, tmp_path: Path) -> None:
    result = explain(tmp_path / "out", *arguments, picture)
    assert result.exit_code == 2 and told in result.stderr and not (tmp_path / "out").exists()


def test_a_file_in_the_folders_place(picture: Path) -> None:
    result = explain(picture, picture)
    assert result.exit_code == 2 and "is a file" in result.stderr
