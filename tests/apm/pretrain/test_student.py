"""A trained student's field: any resolution, any order, bounded memory; walks between two images."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from apm.cli.main import app
from apm.errors import UsageError
from apm.figures.field import read_locations
from apm.images.load import load_image
from apm.pretrain.checkpoint import Checkpoint, write_checkpoint
from apm.pretrain.student import Student, walk
from apm.student.config import APMConfig
from apm.student.model import APM
from apm.student.position import dense_locations, grid_locations
from tests.places import ROOT
from tests.pretraining import STUDENT, picture

SETTINGS = {"batch_size": 4, "images": 12, "teacher": "fake@0", "seed": 3}


def checkpoint(path: Path, config: APMConfig = STUDENT) -> Path:
    weights = dict(APM(replace(config, init_std=0.3), seed=5).state_dict())
    write_checkpoint(path, Checkpoint(config, SETTINGS, 6, weights, {}))
    return path


@pytest.fixture
def student(tmp_path: Path) -> Student:
    return Student.load(checkpoint(tmp_path / "c.safetensors"))


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    for number, name in enumerate("ab"):
        picture(number + 1, side=30).save(tmp_path / f"{name}.png")
    return [str(tmp_path / "a.png"), str(tmp_path / "b.png")]


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def load(path: str | Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def test_order_and_chunks_change_no_answer(student: Student) -> None:
    columns = torch.cat([student.column(picture(number)) for number in (1, 2)])
    rows, cols = dense_locations(STUDENT.grid, 9)
    features, colours = student.field(columns, rows, cols)
    assert features.shape == (2, 81, 4) and colours.shape == (2, 81, 3)
    torch.testing.assert_close(features, student.field(columns, rows, cols, chunk=81)[0], rtol=0, atol=0)
    order = torch.from_numpy(np.random.default_rng(0).permutation(81))
    for chunk in (1, 7, 80, 4096):
        again = student.field(columns, rows[order], cols[order], chunk=chunk)
        torch.testing.assert_close(again[0], features[:, order], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(again[1], colours[:, order], rtol=1e-5, atol=1e-6)
    parts = [(part, len(found[0])) for part, found, _ in student.answers(columns, rows, cols, chunk=50)]
    assert parts == [(slice(0, 50), 50), (slice(50, 81), 31)]
    assert (features[0] - features[1]).abs().max() > 1e-3  # the columns do matter
    assert features[0].std(0).max() > 1e-3  # and so do the locations


@pytest.mark.parametrize("frames", [2, 3, 10])
def test_a_walk_is_straight_and_ends_where_it_should(frames: int) -> None:
    first, last = torch.randn(2, 1, 16).unbind()
    found = walk(first, last, frames)
    assert torch.equal(found[0], first[0]) and torch.equal(found[-1], last[0])
    torch.testing.assert_close(found.diff(dim=0), ((last - first) / (frames - 1)).expand(frames - 1, -1))
    with pytest.raises(UsageError, match="2 frames or more, not 1"):
        walk(first, last, 1)


def test_interpolate_ends_in_the_direct_reconstructions(student: Student, files: list[str], tmp_path: Path) -> None:
    code, said, _ = run(
        "interpolate", *files, "--checkpoint", tmp_path / "c.safetensors", "--frames", 4, "--size", 11,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0 and said.splitlines() == [str(tmp_path / "out" / f"walk.{kind}") for kind in ("npz", "gif", "png")]
    arrays = load(tmp_path / "out" / "walk.npz")
    assert arrays["features"].shape == (4, 16, 4) and arrays["colours"].shape == (4, 11, 11, 3)
    for frame, file in ((0, files[0]), (-1, files[1])):
        column = student.column(load_image(file).image)
        assert np.array_equal(arrays["columns"][frame], column[0])
        assert np.array_equal(arrays["features"][frame], student.field(column, *grid_locations(4))[0][0])
        direct = student.field(column, *dense_locations(4, 11))[1][0]
        assert np.array_equal(arrays["colours"][frame], direct.view(11, 11, 3))
    assert not np.allclose(arrays["features"][1], arrays["features"][0])
    with Image.open(tmp_path / "out" / "walk.gif") as film:
        assert film.n_frames == 4 and film.size == (26, 11)
    with Image.open(tmp_path / "out" / "walk.png") as strip:
        assert strip.width > strip.height


def test_field_writes_what_the_student_answers(student: Student, files: list[str], tmp_path: Path) -> None:
    stored = {}
    for order in ("reading", "random"):
        code, said, _ = run(
            "field", files[0], "--checkpoint", tmp_path / "c.safetensors", "--size", 13, "--order", order,
            "--chunk", 50, "--out", tmp_path / order,
        )  # fmt: skip
        assert code == 0
        arrays, drawn = map(Path, said.splitlines())
        stored[order] = load(arrays)
        assert sorted(path.name for path in (tmp_path / order).iterdir()) == sorted((arrays.name, drawn.name))
        with Image.open(drawn) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        assert pixels.std() > 1
        stored[order]["picture"] = pixels[: int(0.8 * len(pixels))]  # above the small print, which names the order
    rows, cols = dense_locations(4, 13)
    features, colours = student.field(student.column(load_image(files[0]).image), rows, cols)
    one, two = stored["reading"], stored["random"]
    assert np.array_equal(one["rows"], rows) and np.array_equal(one["cols"], cols)
    np.testing.assert_allclose(one["features"], features[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(one["colours"], colours[0], rtol=1e-5, atol=1e-6)
    assert not np.array_equal(one["rows"], two["rows"])
    back = np.lexsort((two["cols"], two["rows"]))
    for name in ("rows", "cols", "features", "colours"):
        np.testing.assert_allclose(two[name][back], one[name], rtol=1e-5, atol=1e-6)
    assert np.abs(one["picture"].astype(int) - two["picture"]).max() <= 2  # the same picture, whatever the order


def test_field_at_locations_of_a_file(student: Student, files: list[str], tmp_path: Path) -> None:
    (tmp_path / "where.csv").write_text("x,y,name\n0.125,0.875,p\n1,0,q\n")
    code, said, _ = run(
        "field", files[0], "--checkpoint", tmp_path / "c.safetensors", "--locations", tmp_path / "where.csv",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0
    arrays = load(said.splitlines()[0])
    assert arrays["rows"].tolist() == [3.0, -0.5] and arrays["cols"].tolist() == [0.0, 3.5]
    features, _ = student.field(student.column(load_image(files[0]).image), [3.0, -0.5], [0.0, 3.5])
    np.testing.assert_allclose(arrays["features"], features[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "needs a first line with the columns y and x"),
        ("", "needs a first line"),
        ("y,x\n", "holds no locations"),
        ("y,x\n0.5,0.5\n0.5,oops\n", r"line 3: y and x must be numbers: 0\.5, oops"),
        ("y,x\n0.5\n", "line 2: y and x must be numbers"),
        ("y,x\n0.5,1.5\n", r"line 2: y = 0\.5, x = 1\.5 is outside of the square"),
        ("y,x\nnan,0.5\n", "outside of the square"),
    ],
)
def test_locations_that_make_no_sense_are_told(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "where.csv").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_locations(tmp_path / "where.csv", 4)
    with pytest.raises(UsageError, match="cannot be read as CSV"):
        read_locations(tmp_path / "missing.csv", 4)


def test_wrong_use_is_told(files: list[str], tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "c.safetensors")
    to = ("--checkpoint", path, "--out", tmp_path / "out")
    for arguments, code, message in (
        (("field", files[0], *to, "--size", "0"), 2, "--size must be from 1 to 8192, not 0."),
        (("field", files[0], *to, "--size", "4", "--locations", "x.csv"), 2, "exclude each other"),
        (("field", files[0], *to, "--order", "randm"), 2, 'Unknown order "randm". Did you mean "random"?'),
        (("field", files[0], *to, "--chunk", "0"), 2, "--chunk must be 1 or more"),
        (("field", files[0], *to, "--order", "random", "--seed", "-1"), 2, "--seed must be 0 or more, not -1"),
        (("field", files[0], *to[:3], path), 2, "Give another folder with --out"),
        (("interpolate", *files, *to[:3], path), 2, "Give another folder with --out"),
        (("field", tmp_path / "no.png", *to), 1, "no.png: no such file"),
        (("field", files[0], "--checkpoint", files[0], "--out", tmp_path), 2, "is not a safetensors file"),
        (("interpolate", *files, *to, "--frames", "1"), 2, "--frames must be from 2"),
        (("interpolate", *files, *to, "--size", "0"), 2, "--size must be from 1 to 1024"),
        (("interpolate", files[0], tmp_path, *to), 1, "a folder"),
        (("interpolate", *files, "--checkpoint", "no.safetensors", "--out", tmp_path), 2, "no such checkpoint"),
    ):
        found = run(*arguments)
        assert (found[0], found[1]) == (code, "") and message in found[2], found
    assert not (tmp_path / "out").exists()


MEASURE = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from apm.figures.field import write_field
from apm.pretrain.student import Student
from tests.pretraining import picture

student = Student.load(sys.argv[1])
peaks = []
for size in (16, 192):
    write_field(student, picture(1), Path(sys.argv[2], str(size)), settings="", size=size, chunk=1024)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(*peaks)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_queries(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "c.safetensors", replace(STUDENT, dim=512))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    few, many = map(int, done.stdout.split())  # KiB
    written = (tmp_path / "192.npz").stat().st_size / 1024
    assert written > 70_000  # 36,864 queries of 512 features
    assert many - few < written / 3
