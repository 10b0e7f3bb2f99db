"""`apm islands`: pictures, arrays and measures of each image, and errors for people."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from apm.cli.main import app
from apm.student.config import APMConfig
from tests.benchmarks.studies.test_pointing import TINY, ColourTeacher


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apm.teachers.load_teacher", lambda name, **_: ColourTeacher())
    monkeypatch.setattr("apm.teachers.check_teacher", lambda name: None)
    monkeypatch.setattr(APMConfig, "preset", lambda name, **_: TINY)


def islands(out: Path, *arguments: str | Path) -> Result:
    fast = ["--device", "cpu", "--parts", "3"]
    return CliRunner().invoke(app, ["islands", "--teacher", "x", *fast, "--out", str(out), *map(str, arguments)])


@pytest.mark.slow
def test_everything_is_written_for_each_image(picture: Path, tmp_path: Path) -> None:
    twin = tmp_path / "other" / picture.name
    twin.parent.mkdir()
    Image.new("RGB", (40, 40), "navy").save(twin)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    result = islands(out, "--steps", "6", "--snapshots", "0,2", picture, tmp_path / "broken.png", twin)
    assert result.exit_code == 1 and "broken.png" in result.stderr
    printed = [Path(line) for line in result.stdout.splitlines()]
    assert len(printed) == len(set(printed)) == 12 and set(printed) == set(out.iterdir())
    suffixes = sorted(
        path.name.rpartition("-")[2] if path.suffix in (".png", ".gif") else path.suffix for path in printed
    )
    assert suffixes == sorted(2 * [".json", ".npz", "curves.png", "field.gif", "parts.png", "strip.png"])
    for path in printed:
        if path.suffix in (".png", ".gif"):
            with Image.open(path) as drawn:
                drawn.load()
    with Image.open(next(out.glob("*.gif"))) as gif:
        assert gif.n_frames == 7  # type: ignore[attr-defined]  # 0 to 6

    first, second = sorted(out.glob("*.json"))
    record = json.loads(first.read_text())
    assert set(record["measures"]) == set(record["losses"]) == {"cls", "grid"}
    assert set(record["measures"]["cls"]["image"]) == {"0", "2", "6"}
    assert set(record["measures"]["grid"]) == {
        "image", "random target", "shuffled image", "other target", "no steps"
    }  # fmt: skip
    for found in (record, json.loads(second.read_text())):
        assert (
            found["settings"]["image"] == found["settings"]["other target"] == picture.name
        )  # its twin's, of one name
    assert record["measures"] != json.loads(second.read_text())["measures"]
    with np.load(first.with_suffix(".npz")) as arrays:
        assert arrays["fields/grid"].shape == (7, 8, 8, 16) and arrays["steps"].tolist() == list(range(7))
        np.testing.assert_array_equal(arrays["fields/grid"][-1], arrays["last/grid/image"])
        assert not np.array_equal(arrays["last/grid/image"], arrays["last/grid/random target"])


@pytest.mark.slow
def test_one_image_alone_without_controls_as_svg(picture: Path, tmp_path: Path) -> None:
    result = islands(tmp_path / "out", "--steps", "2", "--no-controls", "--format", "svg", picture)
    assert result.exit_code == 0, result.stderr
    (strip,) = (tmp_path / "out").glob("*-strip.svg")
    assert "steps 2" in strip.read_text() and "upside down" in strip.read_text()
    record = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert list(record["measures"]["cls"]) == ["image"]


@pytest.mark.slow
def test_many_views_are_the_grids_target(picture: Path, tmp_path: Path) -> None:
    fast = ("--steps", "1", "--no-controls")
    result = islands(tmp_path / "out", *fast, "--grid-views", "tokens:2", "--agree", "0.5", picture)
    assert result.exit_code == 0, result.stderr
    record = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert record["settings"]["grid views"] == "tokens:2" and record["settings"]["agree"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--snapshots", "0,x"], '"0,x"'),
        (["--snapshots", "0,999"], "from 0 to --steps, which is 150"),
        (["--steps", "0"], "steps must be 1 or more, not 0"),
        (["--threshold", "2"], "threshold is a cosine, from -1 to 1, not 2"),
        (["--parts", "1"], "parts must be from 2 to 20, not 1"),
        (["--format", "bmp"], '"bmp"'),
        (["--agree", "-1"], "agree must be 0 or a positive number, not -1"),
        (["--grid-views", "many"], 'grid_views is "many"'),
    ],
)
def test_wrong_usage(arguments: list[str], told: str, picture: Path, tmp_path: Path) -> None:
    result = islands(tmp_path / "out", *arguments, picture)
    assert result.exit_code == 2 and told in result.stderr and not (tmp_path / "out").exists()
