"""`apm corrupt`: the tree it writes, running again, and what stops it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from apm.benchmarks.corruptions import CORRUPTIONS, corrupt
from apm.benchmarks.datasets import open_dataset
from apm.benchmarks.datasets.corrupted_tree import ImageReport, TreeSettings, TreeWriter, output_name
from apm.cli.corrupt import corrupt as command
from apm.errors import ApmError, UsageError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "val"
    for label, name in enumerate(("n01440764", "n01443537")):
        (folder / name).mkdir(parents=True)
        for number in range(2):
            pixels = np.random.default_rng(10 * label + number).integers(0, 256, (240, 230, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def write(source: Path, target: Path, *, jobs: int = 1, **settings: object) -> TreeWriter:
    writer = TreeWriter(
        source,
        target,
        corruptions=["fog", "contrast"],
        levels=[1, 5],
        settings=TreeSettings(**settings),  # type: ignore[arg-type]
    )
    list(writer.run(jobs=jobs))
    return writer


def test_tree_has_imagenet_c_form_and_the_pixels_of_corrupting_on_the_fly(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "c"
    write(source, target, format="png")
    assert len(files(target)) == 2 * 2 * 4 + 1
    tree = open_dataset("imagenet-c", target, corruption="fog", level=5)
    (tmp_path / "imagenet").mkdir()
    source.rename(tmp_path / "imagenet" / "val")
    fly = open_dataset("imagenet-c", tmp_path, corruption="fog", level=5, from_clean=True)
    assert [s.id for s in tree.samples] == [s.id for s in fly.samples]
    assert tree.generated and any("not comparable with the official files" in note for note in tree.notes)
    for written, made in zip(tree.samples, fly.samples, strict=True):
        np.testing.assert_array_equal(np.asarray(written.load()), np.asarray(made.load()))


def test_jpeg_is_the_default_and_near_the_pixels(source: Path, tmp_path: Path) -> None:
    write(source, tmp_path / "c", resize=224)
    path = tmp_path / "c" / "contrast" / "5" / "n01440764" / "0.png.jpg"
    with Image.open(path) as image:
        assert image.format == "JPEG" and image.size == (224, 224)
        pixels = np.asarray(image).astype(float)
    with Image.open(source / "n01440764" / "0.png") as clean:
        left, top = 0, 5  # 230×240 becomes 224×234
        resized = clean.resize((224, 234), Image.Resampling.BILINEAR).crop((left, top, left + 224, top + 224))
    expected = corrupt(np.asarray(resized), "contrast", 5, seed=0, image_id="n01440764/0.png")
    assert np.abs(pixels - expected).mean() < 2


def test_running_again_continues_and_leaves_what_is_there(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "c"
    writer = write(source, target)
    gone = target / "fog" / "5" / "n01440764" / "1.png.jpg"
    kept = target / "fog" / "5" / "n01440764" / "0.png.jpg"
    before = gone.read_bytes()
    gone.unlink()
    os.utime(kept, (1, 1))
    reports = list(writer.run())
    assert [(r.written, r.skipped) for r in reports] == [(0, 4), (1, 3), (0, 4), (0, 4)]
    assert gone.read_bytes() == before and kept.stat().st_mtime == 1


@pytest.mark.slow
def test_two_processes_write_the_same_as_one(source: Path, tmp_path: Path) -> None:
    write(source, tmp_path / "one")
    write(source, tmp_path / "two", jobs=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    for name in files(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_other_settings_on_the_same_tree_are_refused_and_named(source: Path, tmp_path: Path) -> None:
    write(source, tmp_path / "c")
    with pytest.raises(UsageError, match=r"seed \(0 there, 1 now\)"):
        write(source, tmp_path / "c", seed=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        write(source, tmp_path / "mine")
    assert json.loads((tmp_path / "c" / "apm-corrupt.json").read_text())["seed"] == 0


def test_sources_that_would_be_written_to_one_file_are_named(source: Path, tmp_path: Path) -> None:
    name = next(source.glob("*/*.png"))
    Image.new("RGB", (40, 40)).save(f"{name}.jpg")
    with pytest.raises(UsageError, match=f"{name.name} and .*{name.name}.jpg would both be written as"):
        TreeWriter(source, tmp_path / "out", corruptions=["fog"], levels=[1], settings=TreeSettings())
    TreeWriter(source, tmp_path / "out", corruptions=["fog"], levels=[1], settings=TreeSettings(format="png"))


def test_wrong_arguments(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="inside"):
        write(source, source / "c")
    with pytest.raises(UsageError, match="less than the crop"):
        TreeSettings(resize=100)
    with pytest.raises(UsageError, match="format"):
        TreeSettings(format="gif")
    with pytest.raises(UsageError, match="--jobs must be 1 or more, not 0"):
        write(source, tmp_path / "c", jobs=0)
    with pytest.raises(UsageError, match="no pictures in class folders"):
        write(source.parent, tmp_path.parent / "elsewhere")
    with pytest.raises(UsageError, match='Did you mean "fog"'):
        TreeWriter(source, tmp_path / "c", corruptions=["fogg"], settings=TreeSettings())


def test_failed_write_leaves_no_partial_file(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    write(source, tmp_path / "c")
    (tmp_path / "c" / "fog" / "5" / "n01440764" / "1.png.jpg").unlink()
    present = files(tmp_path / "c")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ApmError, match="disk is full"):
        write(source, tmp_path / "c")
    assert files(tmp_path / "c") == present


@pytest.mark.parametrize(
    ("name", "format", "expected"),
    [
        ("a/x.JPEG", "jpeg", "a/x.JPEG"),
        ("a/x.jpg", "png", "a/x.jpg.png"),
        ("a/x.png", "jpeg", "a/x.png.jpg"),
        ("a/x.PNG", "png", "a/x.PNG"),
    ],
)
def test_output_name(name: str, format: str, expected: str) -> None:
    assert output_name(name, format) == expected


def test_an_interruption_says_how_far_it_got(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: TreeWriter, *, jobs: int) -> Iterator[ImageReport]:
        yield ImageReport("a", written=2, skipped=0)
        raise KeyboardInterrupt

    monkeypatch.setattr(TreeWriter, "run", interrupted)
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(source), str(tmp_path / "c")])
    assert result.exit_code == 130
    assert result.stderr == "interrupted: 1 of 4 images are done; the same command goes on\n"


def test_command_names_bad_images_and_does_the_rest(source: Path, tmp_path: Path) -> None:
    (source / "n01440764" / "0.png").write_bytes(b"broken")
    app = typer.Typer()
    app.command()(command)
    arguments = [str(source), str(tmp_path / "c"), "--corruption", "fog", "--level", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "n01440764/0.png" in result.stderr and "not an image" in result.stderr
    assert "3 pictures written, 0 existed already, 1 images unreadable" in result.stdout
    assert len(files(tmp_path / "c" / "fog" / "2")) == 3
    (source / "n01440764" / "0.png").unlink()
    again = CliRunner().invoke(app, [*arguments, "--quiet"])
    assert again.exit_code == 0 and again.stdout == ""


def test_all_names_the_15_corruptions(picture: Path, tmp_path: Path) -> None:
    (tmp_path / "val" / "n01440764").mkdir(parents=True)
    picture.rename(tmp_path / "val" / "n01440764" / picture.name)
    app = typer.Typer()
    app.command()(command)
    arguments = [str(tmp_path / "val"), str(tmp_path / "c"), "--level", "1", "--corruption", "all", "--quiet"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert {path.name for path in (tmp_path / "c").iterdir() if path.is_dir()} == set(CORRUPTIONS)
