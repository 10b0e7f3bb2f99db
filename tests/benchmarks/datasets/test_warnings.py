"""What a data set warns of reaches stderr before the work, the record, and every form of the tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import apm.teachers
from apm.benchmarks.runs.records import Records
from apm.cli.main import app
from apm.labels import imagenet_wnids
from tests.benchmarks.made_runs import picture
from tests.fakes import FakeTeacher


@pytest.fixture(autouse=True)
def fake_teacher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(apm.teachers, "check_teacher", lambda name: None)
    monkeypatch.setattr(apm.teachers, "load_teacher", lambda name, **_: FakeTeacher())
    monkeypatch.chdir(tmp_path)


def tree(folder: Path, classes: list[str]) -> None:
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        picture(number).save(folder / name / "0.png")


def bench(name: str, root: Path, *arguments: str) -> Result:
    command = ["bench", name, "--root", root, "--teacher", "fake", "--device", "cpu", "--method", "zero-shot"]
    return CliRunner().invoke(app, [*map(str, command), "--out", "run", *arguments])


def test_a_corrupted_folder_given_as_clean_imagenet(tmp_path: Path) -> None:
    tree(tmp_path / "ImageNet-C" / "fog" / "5", list(imagenet_wnids()[:3]))
    result = bench("imagenet", tmp_path / "ImageNet-C" / "fog" / "5", "--quiet")
    assert result.exit_code == 0, result.output
    told = "imagenet: By its name, "
    assert result.stderr.startswith(f"WARNING: {told}")  # before the work, also with --quiet
    assert "corrupted by fog at level 5, not clean ones" in result.stderr
    cell = Records.open("run").cells["imagenet"]
    assert [warning.startswith("By its name") for warning in cell["warnings"]] == [True]
    for format in ("json", "markdown", "latex"):
        table = CliRunner().invoke(app, ["table", "run", "--format", format])
        assert "corrupted by fog at level 5" in table.stdout, format


def test_a_variant_has_its_own_name_in_table_record_and_json(tmp_path: Path) -> None:
    tree(tmp_path / "imagenetv2-top-images-format-val", ["0", "1", "2"])
    result = bench("imagenet-v2", tmp_path / "imagenetv2-top-images-format-val")
    assert result.exit_code == 0, result.output
    assert "WARNING: imagenet-v2-top-images: " in result.stderr
    assert "imagenet-v2-top-images" in result.stdout and "Table 1" not in result.stdout
    (cell,) = Records.open("run").cells.items()
    assert cell[0] == cell[1]["title"] == "imagenet-v2-top-images"
    assert (cell[1]["dataset"], cell[1]["variant"]) == ("imagenet-v2", "top-images")
    document = json.loads(CliRunner().invoke(app, ["table", "run", "--format", "json"]).stdout)
    (table,) = document["tables"]
    assert table["columns"] == ["imagenet-v2-top-images"] and "published" not in {row["kind"] for row in table["rows"]}


def test_matched_frequency_is_in_the_published_table_without_warnings(tmp_path: Path) -> None:
    tree(tmp_path / "imagenetv2-matched-frequency-format-val", ["0", "1", "2"])
    result = bench("imagenet-v2", tmp_path, "--json")
    document = json.loads(result.stdout)
    assert document["tables"][0]["title"].startswith("Table 1")
    cell = Records.open("run").cells["imagenet-v2"]
    assert cell["variant"] == "matched-frequency" and cell["warnings"] == []


def test_dead_links_are_error_rows_and_the_run_goes_on(tmp_path: Path) -> None:
    tree(tmp_path / "val", list(imagenet_wnids()[:3]))
    (tmp_path / "val" / imagenet_wnids()[1] / "gone.JPEG").symlink_to("nowhere")
    result = bench("imagenet", tmp_path)
    assert result.exit_code == 1
    assert f"{imagenet_wnids()[1]}/gone.JPEG: a link to a file that is not there" in result.stderr
    assert "1 image(s) have no answer" in result.stderr
    record = Records.open("run").run
    assert record["counts"]["imagenet"] == {"images": 4, "rows": 4, "failed_images": 1}
    assert any(
        "1 picture(s) are links to files that are not there" in note for note in record["cells"]["imagenet"]["notes"]
    )
