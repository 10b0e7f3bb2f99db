"""Results on their way out: rows with names, and files that the hub's own client reads."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from apm.benchmarks.datasets import DATASETS
from apm.benchmarks.runs.records import Records
from apm.benchmarks.tables.build import make_tables
from apm.benchmarks.tables.leaving import eval_results, rows_csv, rows_table
from apm.cli.main import app
from apm.errors import UsageError
from tests.benchmarks.made_runs import CLASSES, Plain, Stream, make_dataset, make_run
from tests.benchmarks.tables.test_trust import METHODS, TEACHER, N, write_run


def test_all_rows_leave_with_the_names_of_their_classes(tmp_path: Path) -> None:
    data = [make_dataset(bad=[3]), make_dataset(6, name="dtd")]
    make_run(tmp_path / "a", [Plain(), Stream()], data, record_steps=True, record_logits=True)
    rows = rows_table([Records.open(tmp_path / "a")]).to_pylist()
    assert len(rows) == 2 * 12 + 2 * 6
    assert [row["method"] for row in rows[:24]] == ["plain"] * 12 + ["stream"] * 12
    assert {row["cell"] for row in rows[24:]} == {"dtd"} and {row["seed"] for row in rows} == {0}
    for row in rows:
        assert row["label_name"] == CLASSES[row["label"]] == row["id"].partition("/")[0]
        assert row["prediction_name"] == (None if row["error"] else CLASSES[row["prediction"]])
    (failed,) = [row for row in rows if row["error"] and row["method"] == "plain"]
    assert failed["id"] == "cat/003.png" and failed["prediction_name"] is None
    assert len(rows[0]["logits"]) == 3 and len(rows[0]["step_predictions"]) == 3


def test_csv_and_parquet_hold_the_same_figures(tmp_path: Path) -> None:
    make_run(tmp_path / "a", [Plain()], record_logits=True)
    runner = CliRunner()
    out = tmp_path / "rows.parquet"
    assert runner.invoke(app, ["table", str(tmp_path / "a"), "--format", "parquet", "--out", str(out)]).exit_code == 0
    parquet = pq.read_table(out).to_pylist()
    printed = runner.invoke(app, ["table", str(tmp_path / "a"), "--rows"])
    assert printed.exit_code == 0
    text = list(csv.DictReader(io.StringIO(printed.stdout)))
    assert len(text) == len(parquet) == 12
    for one, other in zip(text, parquet, strict=True):
        assert one["id"] == other["id"] and one["prediction_name"] == other["prediction_name"]
        assert np.float32(one["nll"]) == np.float32(other["nll"])
        assert "logits" not in one and "extras" not in one
    assert rows_csv(rows_table([Records.open(tmp_path / "a")])).decode() == printed.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--format", "parquet"], "--out"),
        (["--rows", "--format", "markdown"], "--rows works with the formats csv and parquet"),
        (["--trust", "--rows"], "--trust"),
        (["--trust", "--format", "eval-results"], "--trust"),
        (["--out", "x"], "--format"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: list[str], said: str, tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    told = CliRunner().invoke(app, ["table", str(tmp_path / "a"), *options])
    assert told.exit_code == 2 and said in told.stderr


def imagenet_a(path: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> Path:
    """A run of all of a data set that the hub holds; here it has 40 images."""
    monkeypatch.setitem(DATASETS, "imagenet-a", replace(DATASETS["imagenet-a"], images=N))
    about = {"dataset": "imagenet-a", "title": "imagenet-a", **changes}
    return write_run(path, {"imagenet-a": about}, {"zero-shot": TEACHER, "mta": METHODS["mta"]})


def test_a_model_card_gets_a_file_for_each_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = imagenet_a(tmp_path / "a", monkeypatch)
    out = tmp_path / "card"
    told = CliRunner().invoke(app, ["table", str(run), "--format", "eval-results", "--out", str(out)])
    assert told.exit_code == 0, told.stderr
    files = sorted(path.name for path in (out / ".eval_results").iterdir())
    assert files == ["mta.yaml", "zero-shot.yaml"]
    (entry,) = yaml.safe_load((out / ".eval_results" / "mta.yaml").read_text())
    assert entry["dataset"] == {"id": "barkermrl/imagenet-a", "task_id": "default"}
    assert entry["value"] == 77.5 and "method mta" in entry["notes"] and "40 images" in entry["notes"]
    huggingface_hub = pytest.importorskip("huggingface_hub")
    if hasattr(huggingface_hub, "parse_eval_result_entries"):  # older clients know no such files
        (read,) = huggingface_hub.parse_eval_result_entries([entry])
        assert (read.dataset_id, read.value, read.notes) == ("barkermrl/imagenet-a", 77.5, entry["notes"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"total": 50}, "a subset"),
        ({"images": 50, "total": 50}, "the run is not finished"),
        ({"corruption": "fog", "level": 5, "generated": True}, "generated corruptions"),
        ({"dataset": "digits", "title": "digits"}, "no data set of the hub holds these images"),
        ({"dataset": "imagenet-v2", "title": "imagenet-v2-top-images"}, "no data set of the hub"),
    ],
)
def test_what_does_not_compare_is_kept_from_model_cards(
    changes: dict[str, object], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, left_out = eval_results(make_tables([Records.open(imagenet_a(tmp_path / "a", monkeypatch, **changes))]))
    assert files == {} and len(left_out) == 1 and said in left_out[0] and "(zero-shot, mta)" in left_out[0]
    told = CliRunner().invoke(app, ["table", str(tmp_path / "a"), "--format", "eval-results"])
    assert told.exit_code == 2 and said in told.stderr


def test_what_was_read_from_the_hub_is_called_by_its_repository(tmp_path: Path) -> None:
    about = {"dataset": "dtd", "title": "dtd", "source": "hf:clip-benchmark/wds_vtab-dtd:test"}
    run = write_run(tmp_path / "a", {"dtd": about}, {"zero-shot": TEACHER})
    files, left_out = eval_results(make_tables([Records.open(run)]), task="dtd")
    (entry,) = yaml.safe_load(files["zero-shot.yaml"])
    assert entry["dataset"] == {"id": "clip-benchmark/wds_vtab-dtd", "task_id": "dtd"} and left_out == []


def test_two_teachers_have_two_model_cards(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", {"digits": {}}, {"zero-shot": TEACHER})]
    runs.append(write_run(tmp_path / "b", {"digits": {}}, {"zero-shot": TEACHER}, name="ViT-B-16/openai"))
    with pytest.raises(UsageError, match="these runs used ViT-B-16/openai, embedded"):
        eval_results(make_tables([Records.open(run) for run in runs]))
