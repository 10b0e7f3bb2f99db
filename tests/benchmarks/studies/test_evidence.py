"""The study of finished runs: its record holds what `apm table --trust` says, and what the order of a stream does."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, stdev

import pytest

from apm.benchmarks.runs.records import Records, RunFolder
from apm.benchmarks.studies import evidence
from apm.benchmarks.tables.build import make_tables
from apm.benchmarks.tables.trust import make_trust
from apm.benchmarks.tables.trust_formats import markdown
from apm.errors import UsageError
from tests.benchmarks.made_runs import Plain, Stream, make_dataset, make_run


def test_the_record_holds_what_the_runs_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / f"order-{order}" for order in range(2)]
    for order, path in enumerate(paths):
        make_run(path, [Stream(), *([Plain()] if order == 0 else [])], make_dataset(30), order=order)
    evidence.STUDY.main([*map(str, paths), "--record", str(tmp_path / "record.json")])
    record = json.loads((tmp_path / "record.json").read_text())
    shown = capsys.readouterr().out

    tables = make_tables([Records.open(path) for path in paths], published=False)
    assert markdown(make_trust(tables, cells=False)) in shown
    rights = [
        100 * fmean(row["rank"] == 1 for row in RunFolder(path).read("digits").to_pylist() if row["method"] == "stream")
        for path in paths
    ]
    (columns,) = record["orders"].values()
    ((column, found),) = columns.items()
    assert list(record["orders"]) == [Stream().name]
    assert found == pytest.approx([fmean(rights), stdev(rights)])
    assert f"- stream: {column} {fmean(rights):.2f} ± {stdev(rights):.2f}" in shown
    assert [one["teacher"] for one in record["runs"]] == [Records.open(path).run["config"]["teacher"] for path in paths]


def test_corruptions_come_together_and_other_columns_by_name(tmp_path: Path) -> None:
    make_run(tmp_path / "run", [Plain()], make_dataset(6))
    record = evidence.measure(evidence.STUDY.read([str(tmp_path / "run")]))
    record["orders"] = {"tda": {"clean": [50.0, 1.0], "fog": [20.0, 2.0], "snow": [30.0, 4.0]}}
    assert "- tda: clean 50.00 ± 1.00; 2 corruptions 25.00 ± 3.00" in evidence.table(record)


def test_runs_of_several_data_sets_make_a_table_of_each(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("digits", "pets")]
    for path in paths:
        for order in range(2):
            made = Path(f"{path}-{order}")
            make_run(made, [Plain(), Stream()], make_dataset(name=path.name), order=order)
    record = evidence.measure(evidence.STUDY.read([f"{path}-{order}" for path in paths for order in range(2)]))
    assert {name: set(columns) for name, columns in record["orders"].items()} == {Stream().name: {"digits", "pets"}}
    assert [(table["cells"], len(table["rows"])) for table in record["tables"]] == [(("pets",), 2), (("digits",), 2)]
    with pytest.raises(UsageError, match="2 tables, not one"):
        evidence.one_table([Path(f"{path}-0") for path in paths])
    with pytest.raises(UsageError, match="No runs"):
        evidence.measure(evidence.STUDY.read([]))


def test_a_method_of_several_runs_is_there_once(tmp_path: Path) -> None:
    make_run(tmp_path / "a", [Plain()], make_dataset())
    make_run(tmp_path / "b", [Plain(), Stream()], make_dataset())
    record = evidence.measure(evidence.STUDY.read([str(tmp_path / "a"), str(tmp_path / "b")]))
    assert sorted(row["method"] for row in record["tables"][0]["rows"]) == sorted([Plain().name, Stream().name])
    make_run(tmp_path / "part", [Plain()], make_dataset(name="pets"))
    make_run(tmp_path / "whole", [Plain(), Stream()], [make_dataset(name=name) for name in ("pets", "dtd")])
    both = evidence.measure(evidence.STUDY.read([str(tmp_path / "part"), str(tmp_path / "whole")]))
    assert (both["tables"][0]["cells"], len(both["tables"][0]["rows"])) == (("dtd", "pets"), 2)
    for run in record["runs"]:
        run["command"] = ["apm", "bench", "digits"]
    assert evidence.table(record).count("    apm bench digits\n") == 1
