"""`apm reproduce` from end to end, with the embedded teacher and small trees laid out as the data sets are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from apm.benchmarks.datasets import open_dataset
from apm.benchmarks.runs.records import Records
from apm.cli.main import app
from tests.benchmarks.datasets.trees import tree, wnids_of
from tests.benchmarks.reproduce.test_reproduce import head_for
from tests.schemas import schema


def reproduce(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["reproduce", *map(str, arguments)])


def checked(result: Result) -> dict:
    document = json.loads(result.stdout)
    schema("benchmarks/reproduce.schema.json").validate(document)
    return document


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tree(tmp_path / "data" / "imagenet-a", wnids_of("imagenet-a", 2))
    return tmp_path / "data"


def test_a_plan_without_a_measurement(root: Path) -> None:
    told = reproduce(1, "--root", root, "--plan", "--no-measure", "--teacher", "embedded", "--json")
    assert told.exit_code == 0, told.stderr
    document = checked(told)
    assert {cell["column"]: cell["found"] for cell in document["cells"]} == {
        "imagenet": False,
        "imagenet-a": True,
        "imagenet-v2": False,
        "imagenet-r": False,
        "imagenet-sketch": False,
    }
    assert [(run["prompts"], run["weights"], run["hours"]) for run in document["runs"]] == [
        (None, True, None),
        ("openai", True, None),
    ]
    assert len(document["left_out"]) == 4
    shown = reproduce(1, "--root", root, "--plan", "--no-measure", "--teacher", "embedded")
    assert "imagenet-a" in shown.stdout and "needs a learned prompt: --coop FILE" in shown.stdout
    assert "imagenet-sketch: no data: nothing that fits" in shown.stderr


def test_where_nothing_can_be_run_it_says_where_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    told = reproduce(3, "--root", tmp_path / "empty", "--plan", "--teacher", "embedded")
    assert told.exit_code == 2 and "Table 3: cross-dataset: nothing can be run" in told.stderr
    assert "The data come from" in told.stderr and not told.stdout


def test_wrong_usage(root: Path) -> None:
    assert reproduce(4, "--root", root).exit_code == 2
    told = reproduce(1, "--root", root, "--method", "zero-shoot", "--teacher", "embedded")
    assert told.exit_code == 2 and "zero-shot" in told.stderr


def test_other_teachers_by_the_papers_name(root: Path) -> None:
    given = ["--teacher", "embedded", "--teacher", "ViT-H/14=ViT-H-14/no-such-file.pt"]
    told = reproduce(1, "--root", root, "--plan", "--no-measure", "--json", *given)
    runs = checked(told)["runs"]
    assert [run["teacher"] for run in runs] == ["embedded", "embedded", "ViT-H-14/no-such-file.pt"]
    assert "no checkpoint file" in runs[-1]["reason"] and runs[0]["rows"][0]["teacher"] == "ViT-B/16"


def test_rows_without_a_head_are_told_and_asked_for_by_name_are_missing(tmp_path: Path) -> None:
    root = tmp_path / "data"
    tree(root / "ImageNet-C" / "fog" / "5", wnids_of("imagenet", 2))
    asked = [2, "--root", root, "--plan", "--no-measure"]
    told = reproduce(*asked, "--teacher", "embedded")
    assert told.exit_code == 0 and "  TTT-MAE: needs a trained head: --probe FILE (apm mae probe makes" in told.stdout
    assert "elastic_transform, frost, " in told.stderr and told.stderr.count("no folder CORRUPTION/5") == 1
    alone = reproduce(*asked, "--method", "vit-probe")
    assert alone.exit_code == 2 and "ViT Probe: needs a trained head: --probe FILE" in alone.stderr
    nowhere = reproduce(*asked, "--teacher", "embedded", "--probe", tmp_path / "none.safetensors")
    assert nowhere.exit_code == 0 and "none.safetensors: no such checkpoint" in nowhere.stderr
    assert "--download fetches them" not in nowhere.stderr
    runs = checked(reproduce(*asked, "--teacher", "embedded", "--probe", tmp_path / "no", "--json"))["runs"]
    assert [(run["weights"], len(run["rows"])) for run in runs] == [(True, 2), (False, 2)]


@pytest.mark.slow
def test_rows_that_are_no_clip_are_planned_run_and_compared(tmp_path: Path) -> None:
    root, out = tmp_path / "data", tmp_path / "out"
    tree(root / "ImageNet-C" / "fog" / "5", wnids_of("imagenet", 2))
    names = open_dataset("imagenet-c", root, corruption="fog").class_names
    probe = head_for(tmp_path / "probe.safetensors", "probe", names)
    asked = [2, "--root", root, "--probe", probe, "--out", out]
    asked += ["--method", "vit-probe", "--method", "ttt-mae", "--method", "mae-joint"]
    (planned,) = checked(reproduce(*asked, "--plan", "--json"))["runs"]
    assert planned["weights"] and planned["teacher"] == "embedded" and planned["hours"] > 0
    told = reproduce(*asked, "--json")
    assert told.exit_code == 1  # the other corruptions and a joint network are missing
    assert "Joint Train: needs a trained head: --joint FILE" in told.stderr
    cells = {(cell["row"], cell["column"]): cell for cell in checked(told)["cells"]}
    for row, published in (("ViT Probe", 38.6), ("TTT-MAE", 44.7)):
        cell = cells[row, "fog"]
        assert cell["n"] == 4 and cell["published"] == published and cell["verdict"] is None
        assert cell["difference"] == cell["ours"] - published
    methods = Records.open(out / planned["folder"]).methods
    assert all(one["crop"] == 0.875 for one in methods.values()) and len(methods) == 2  # as published
    assert "ViT Probe" in reproduce(*asked).stdout


@pytest.mark.slow
def test_a_table_is_run_compared_and_continued(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = ["--root", root, "--teacher", "embedded", "--method", "zero-shot", "--out", out]
    planned = checked(reproduce(1, *asked, "--plan", "--json"))
    assert all(0 < run["hours"] < 1 for run in planned["runs"])
    told = reproduce(1, *asked, "--json")
    assert told.exit_code == 1  # four data sets are missing, and the numbers differ
    cells = checked(told)["cells"]
    mine = [cell for cell in cells if cell["ours"] is not None]
    assert {(cell["row"], cell["teacher"], cell["column"], cell["n"]) for cell in mine} == {
        ("CLIP zero-shot", "ViT-B/16", "imagenet-a", 4),
        ("Ensemble (80 templates)", "ViT-B/16", "imagenet-a", 4),
        ("CLIP zero-shot", "ViT-L/14", "imagenet-a", 4),
        ("OpenCLIP zero-shot", "ViT-H/14", "imagenet-a", 4),
    }
    assert all([cause["name"] for cause in cell["causes"]][:2] == ["teacher", "subset"] for cell in mine)
    assert all(cell["difference"] == cell["ours"] - cell["published"] for cell in mine)
    assert "Likely cause: teacher: the run's teacher is embedded" in told.stderr
    assert "imagenet-r: no data: nothing that fits" in told.stderr
    shards = {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
    again = reproduce(1, *asked)
    assert again.exit_code == 1 and "subset (imagenet-a): 4 images, where imagenet-a has 7,500" in again.stdout
    assert "Continuing" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")} == shards  # nothing is run twice
