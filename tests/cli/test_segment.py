"""`apm segment`: files, lines, records, going on, and errors for people."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from apm.cli.classify import Source
from apm.cli.main import app
from apm.cli.segment import _words
from tests.fakes import FakeTeacher
from tests.schemas import schema

pytestmark = pytest.mark.usefixtures("fake_teacher", "narrow_students")

SCHEMA = schema("cli/segment.json")
FAST = ("--teacher", "fake", "--steps", "2", "--device", "cpu", "--grid-views", "2", "--places", "16")


def segment(out: Path, *arguments: str | Path, labels: str = "cat,dog,hen") -> Result:
    return CliRunner().invoke(app, ["segment", *FAST, "--labels", labels, "--out", str(out), *map(str, arguments)])


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


def test_map_overlay_and_record_say_the_same(picture: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide.png"
    opened(picture).convert("RGB").resize((70, 40)).save(wide)
    result = segment(tmp_path / "out", "--json", "--background", "floor", wide)
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    SCHEMA.validate(record)
    assert record["size"] == [70, 40] and record["tiles"] == 2 and record["path"] == str(wide)
    found = opened(tmp_path / "out" / record["files"]["map"])
    assert found.mode == "P" and found.size == (70, 40)
    values = np.asarray(found)
    assert set(np.unique(values)) <= {0, 1, 2, 3}
    for part in record["parts"]:
        assert part["label"] == ("cat", "dog", "hen")[part["value"] - 1]
        assert part["share"] == pytest.approx((values == part["value"]).mean())
        for region in part["regions"]:
            left, top, right, bottom = region["box"]
            assert (values[top:bottom, left:right] == part["value"]).any()
    assert record["background"] == pytest.approx((values == 0).mean())
    assert opened(tmp_path / "out" / record["files"]["overlay"]).size == (70, 40)
    written = json.loads((tmp_path / "out" / record["files"]["map"].replace(".map.png", ".json")).read_text())
    assert written == record


def test_the_same_command_goes_on_and_other_settings_are_refused(
    picture: Path, tmp_path: Path, fake_teacher: FakeTeacher
) -> None:
    out, second, broken = tmp_path / "out", tmp_path / "b.png", tmp_path / "broken.png"
    Image.new("RGB", (30, 30), "navy").save(second)
    broken.write_bytes(b"no picture")
    first = segment(out, picture)
    assert first.exit_code == 0 and first.stdout.startswith(f"{picture}\t") and "%" in first.stdout
    calls = fake_teacher.grid_calls
    both = segment(out, picture, broken, tmp_path / "none.png", second)
    assert both.exit_code == 1 and "Traceback" not in both.stderr
    assert both.stderr.count("broken.png") == 1 and both.stderr.count("none.png") == 1
    assert both.stdout.splitlines()[0] == first.stdout.strip() and len(both.stdout.splitlines()) == 2
    assert fake_teacher.grid_calls == calls + 1 + 2  # whether there is a grid, and the new image's two views
    os.utime(second, ns=(1, 1))
    calls = fake_teacher.grid_calls
    assert segment(out, picture, second).exit_code == 0
    assert fake_teacher.grid_calls == calls + 1 + 2  # a file that has changed is done again
    other = segment(out, picture, "--min-area", "0.2")
    assert other.exit_code == 2 and "min-area: 0.001 there, 0.2 here" in other.stderr
    jsonl = [json.loads(line) for line in segment(out, "--json", picture, broken).stdout.splitlines()]
    for record in jsonl:
        SCHEMA.validate(record)
    assert jsonl[0]["error"] is None and "broken.png" in jsonl[1]["error"]


def test_records_of_files_that_are_not_there_keep_to_the_schema(tmp_path: Path) -> None:
    result = segment(tmp_path / "out", "--json", tmp_path / "a.png", tmp_path / "b.png")
    assert result.exit_code == 1 and "nothing is left to segment" in result.stderr
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(records) == 2
    for record in records:
        SCHEMA.validate(record)
        assert "no such file" in record["error"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--distil", "cls", "--grid-views", "1"), "not cls"),
        (("--background", "cat"), "more than once"),
        (("--background", " ,"), "contains no name"),
        (("--min-area", "2"), "below 1, not 2.0"),
        (("--min-probability", "-1"), "between 0 and 1"),
        (("--places", "0"), "at least 1"),
    ],
)
def test_wrong_usage_is_refused(arguments: tuple[str, ...], words: str, picture: Path, tmp_path: Path) -> None:
    result = segment(tmp_path / "out", *arguments, picture)
    assert result.exit_code == 2 and words in " ".join(result.stderr.split()), result.stderr


def test_one_label_before_a_background_is_enough(picture: Path, tmp_path: Path) -> None:
    result = segment(tmp_path / "out", "--background", "anything else", "--json", picture, labels="cat")
    assert result.exit_code == 0, result.stderr
    assert {part["label"] for part in json.loads(result.stdout)["parts"]} <= {"cat"}
    assert segment(tmp_path / "other", picture, labels="cat").exit_code == 2


def test_background_names_are_tidied_as_labels_are() -> None:
    assert _words(Source(label_set="cifar10"), "cafe\u0301, a  wall") == (None, ("caf\u00e9", "a wall"))
    assert _words(Source(labels="cat"), "wall\nfloor") == (("cat", "wall", "floor"), ("wall", "floor"))


def test_many_labels_make_a_map_of_16_bits(picture: Path, tmp_path: Path) -> None:
    labels = ",".join(f"label {number}" for number in range(300))
    result = segment(tmp_path / "out", "--json", picture, labels=labels)
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    values = np.asarray(opened(tmp_path / "out" / record["files"]["map"]))
    assert values.dtype in (np.uint16, np.int32)
    assert {part["value"] for part in record["parts"]} == set(np.unique(values)) - {0}
