"""`apm islands`: pictures, arrays and measures of each image, and errors for people."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from apm.cli.island_inputs import _beside_others, files_of
from apm.cli.main import app
from apm.errors import ImageError, UsageError
from apm.images.load import load_image
from apm.student import islands as islands_measures
from apm.student.config import APMConfig
from apm.test_time import layer_fields
from tests.benchmarks.studies.test_pointing import TINY, ColourTeacher


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apm.teachers.load_teacher", lambda name, **_: ColourTeacher())
    monkeypatch.setattr("apm.teachers.check_teacher", lambda name: None)
    monkeypatch.setattr(APMConfig, "preset", lambda name, *, guide="none", **_: replace(TINY, guide=guide))


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


@pytest.mark.slow
def test_the_query_holds_the_colours_at_its_place(picture: Path, tmp_path: Path) -> None:
    fields = {}
    for guide in ("none", "rgb"):
        out = tmp_path / guide
        assert islands(out, "--steps", "1", "--no-controls", "--guide", guide, picture).exit_code == 0
        assert json.loads(next(out.glob("*.json")).read_text())["settings"]["guide"] == guide
        with np.load(next(out.glob("*.npz"))) as arrays:
            fields[guide] = arrays["fields/grid"]
    assert not np.array_equal(fields["none"], fields["rgb"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--guide", "rgbb"], 'Did you mean "rgb"'),
        (["--snapshots", "0,x"], '"0,x"'),
        (["--snapshots", "0,999"], "from 0 to --steps, which is 150"),
        (["--steps", "0"], "steps must be 1 or more, not 0"),
        (["--threshold", "2"], "threshold is a cosine, from -1 to 1, not 2"),
        (["--parts", "1"], "parts must be from 2 to 20, not 1"),
        (["--format", "bmp"], '"bmp"'),
        (["--seed", "4294967296"], "seed must be from 0 to 4294967295"),  # scikit-learn takes no more
        (["--agree", "-1"], "agree must be 0 or a positive number, not -1"),
        (["--grid-views", "many"], 'grid_views is "many"'),
    ],
)
def test_wrong_usage(arguments: list[str], told: str, picture: Path, tmp_path: Path) -> None:
    result = islands(tmp_path / "out", *arguments, picture)
    assert result.exit_code == 2 and told in result.stderr and not (tmp_path / "out").exists()


def layers(out: Path, source: str, *arguments: str | Path) -> Result:
    words = ["islands", "--source", source, "--device", "cpu", "--out", str(out), *map(str, arguments)]
    return CliRunner().invoke(app, words)


@pytest.mark.slow
def test_layers_of_a_fixed_model(picture: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    source = "vit:test_resnet:1,layer2@random:3"
    result = layers(tmp_path / "out", source, "--parts", "3", "--grid-size", "64", picture, tmp_path / "broken.png")
    assert result.exit_code == 1 and "broken.png" in result.stderr
    printed = [Path(line) for line in result.stdout.splitlines()]
    assert set(printed) == set((tmp_path / "out").iterdir())
    assert [path.name.partition("-layers")[2] for path in printed] == [".png", "-parts.png", ".npz", ".json"]
    for path in printed[:2]:
        with Image.open(path) as drawn:
            drawn.load()
    record = json.loads(printed[3].read_text())
    settings = record["settings"]
    assert settings["weights"] == "at random (seed 3), not trained" and settings["pixels"] == 64
    assert settings["other image"] == "the image itself, upside down" and settings["image"] == picture.name
    assert settings["source"].startswith("vit:test_resnet:1,layer2@") and "frames" not in settings
    module = record["layers"]["layer2"]
    assert (module["module"], module["places"]) == ("layer2", 8)
    assert list(record["measures"]["1"]) == ["image", "shuffled image", "other image", "colours", "coordinates"]
    with np.load(printed[2]) as arrays:
        assert arrays["fields/layer2"].shape == (8, 8, module["width"]) and arrays["tsne/1"].shape == (16, 16, 3)
        assert arrays["clusters/1/colours"].shape == (16, 16)


@pytest.mark.parametrize(
    ("source", "arguments", "told"),
    [
        ("mvit:3@random", ["--steps", "150", "--grid-lr", "0.1"], "--steps, --grid-lr would have no effect"),
        ("mvit:3@random", ["--snapshots", "0"], "--snapshots would have no effect"),
        ("mvit:3@random", ["--teacher", "x"], "uses no teacher, but --teacher is given"),
        ("mvit:3@random", ["--frames", "9"], "--frames is 9"),
        ("vit:test_vit:1@random", ["--frames", "8"], "applies only to mvit"),
        ("teacher:1", ["--teacher", "x"], "needs a teacher of open_clip"),
        ("movie:3", [], 'Unknown source "movie"'),
        ("vit:test_resnet:4@random", ["--grid-size", "64", "--no-controls"], "too few for 12 parts"),
    ],
)
def test_what_has_no_effect_on_layers_is_refused(
    source: str, arguments: list[str], told: str, picture: Path, tmp_path: Path
) -> None:
    result = layers(tmp_path / "out", source, *arguments, picture)
    assert result.exit_code == 2 and told in result.stderr and not (tmp_path / "out").exists()


def test_frames_need_a_video(picture: Path, tmp_path: Path) -> None:
    result = islands(tmp_path / "out", "--frames", "8", picture)
    assert result.exit_code == 2 and "no --source is given" in result.stderr


def test_an_image_without_superpixels_loses_no_other(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = islands_measures.superpixels
    asked: list[int] = []

    def sometimes(square: Image.Image, grid: int, count: int) -> islands_measures.Labels:
        asked.append(grid)
        if len(asked) == 1:
            raise ImageError("one superpixel alone")
        return made(square, grid, count)

    monkeypatch.setattr(islands_measures, "superpixels", sometimes)
    twin = tmp_path / "twin.png"
    Image.open(picture).save(twin)
    words = ["--parts", "3", "--grid-size", "64", "--no-controls"]
    result = layers(tmp_path / "out", "vit:test_resnet:2@random", *words, picture, twin)
    assert result.exit_code == 1 and len(result.stdout.splitlines()) == 3
    assert f"{picture.name} beside twin.png: one superpixel alone" in result.stderr


def test_each_image_comes_beside_the_next_and_few_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = list[Path]()
    files = [tmp_path / f"{number}.png" for number in range(5)]
    for number, file in enumerate(files):
        Image.new("RGB", (4 + number, 4)).save(file)
    load = load_image
    monkeypatch.setattr("apm.images.load.load_image", lambda file: opened.append(file) or load(file))
    pairs = _beside_others(files)
    first = next(pairs)
    assert (first[0], first[2].width, first[3], opened) == (files[0], 5, "1.png", files[:2])
    assert [(file.name, other.width, name) for file, _, other, name in pairs] == [
        ("1.png", 6, "2.png"), ("2.png", 7, "3.png"), ("3.png", 8, "4.png"), ("4.png", 4, "0.png")
    ]  # fmt: skip


def test_an_interruption_says_how_far_it_got(picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    observe, seen = layer_fields.observe_layers, list[Image.Image]()

    def interrupted_in_the_second(image: Image.Image, *rest: Any, **more: Any) -> Any:
        seen.append(image)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return observe(image, *rest, **more)

    monkeypatch.setattr(layer_fields, "observe_layers", interrupted_in_the_second)
    words = ["--parts", "3", "--grid-size", "64", "--no-controls"]
    result = layers(tmp_path / "out", "vit:test_resnet:2@random", *words, picture, picture, picture)
    assert result.exit_code == 130 and len(result.stdout.splitlines()) == 3
    assert result.stderr == "interrupted: 1 of 3 images are done.\n"


@pytest.mark.parametrize("source", [[], ["--source", "vit:test_resnet:2@random"]])
def test_an_empty_stdin_and_a_file_in_place_of_the_folder_are_told(
    source: list[str], picture: Path, tmp_path: Path
) -> None:
    fast = ["islands", "--device", "cpu", "--steps", "1"] if not source else ["islands", "--device", "cpu", *source]
    empty = CliRunner().invoke(app, [*fast, "--out", str(tmp_path / "out"), "-"])
    assert empty.exit_code == 2 and empty.stderr == "error: Stdin held no path.\n"
    listed = CliRunner().invoke(app, [*fast, "--out", str(tmp_path / "out"), "-"], input="gone.png\n")
    assert listed.exit_code == 1 and listed.stderr == "error: gone.png: no such file\n"
    (tmp_path / "file").write_text("not a folder")
    taken = CliRunner().invoke(app, [*fast, "--out", str(tmp_path / "file"), str(picture)])
    assert taken.exit_code == 2 and "Give another folder with --out" in taken.stderr


def test_a_closed_stdin_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UsageError, match="it is closed"):
        files_of(["-"])
