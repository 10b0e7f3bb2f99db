"""Several seeded orders of a stream become one row: mean and standard deviation; ORACLE choices are marked."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch

from apm.benchmarks.methods import MethodOptions, create_method
from apm.benchmarks.methods.dmn import ALPHAS
from apm.benchmarks.runs.records import Records, RunFolder
from apm.benchmarks.runs.shares import stream_order
from apm.benchmarks.tables.build import make_tables
from apm.benchmarks.tables.formats import markdown
from apm.errors import UsageError
from tests.benchmarks.made_runs import Plain, Stream, make_dataset, make_run
from tests.benchmarks.methods.made import make_batch
from tests.fakes import FakeTeacher


def test_orders_are_joined_to_mean_and_deviation(tmp_path: Path) -> None:
    dataset = make_dataset(60)
    runs, rights = [], []
    for order in (0, 1, 2):
        path = tmp_path / str(order)
        make_run(path, [Stream(), *([Plain()] if order == 0 else [])], dataset, order=order)
        rows = [row for row in RunFolder(path).read("digits").to_pylist() if row["method"] == Stream().name]
        by_position = {row["position"]: row["id"] for row in rows}
        assert [by_position[i] for i in range(60)] == [dataset.samples[k].id for k in stream_order(60, order)]
        rights.append(100 * fmean(row["rank"] == 1 for row in rows))
        runs.append(Records.open(path))
        assert runs[-1].run["config"]["order"] == runs[-1].run["stream_order"]["seed"] == order
    assert len(set(rights)) > 1
    (table,) = make_tables(runs)
    plain, stream = sorted(table.rows, key=lambda row: row.method)
    score = stream.cells[table.columns[0]]
    assert (stream.method, stream.settings["order"]) == (Stream().name, "0, 1, 2")
    assert score.accuracy == pytest.approx(fmean(rights))
    assert score.stderr == pytest.approx(stdev(rights))
    assert "orders" in score.marks and "orders" not in plain.cells[table.columns[0]].marks
    text = markdown([table])
    assert re.search(rf"{fmean(rights):.1f} ± {stdev(rights):.1f}(| \(n=60\))[^\w |]?∘", text)
    assert "∘ mean ± standard deviation over seeded orders" in text
    assert "in the order of seed 0, 1, 2." in text


def test_two_runs_of_one_order_stay_two_rows(tmp_path: Path) -> None:
    for name in "ab":
        make_run(tmp_path / name, [Stream()], make_dataset())
    (table,) = make_tables([Records.open(tmp_path / name) for name in "ab"])
    assert len(table.rows) == 2


def test_a_run_is_not_continued_in_another_order(tmp_path: Path) -> None:
    make_run(tmp_path, [Stream()])
    with pytest.raises(UsageError, match="order: 0 before, 4 now"):
        make_run(tmp_path, [Stream()], order=4)


# --- ORACLE -----------------------------------------------------------------------------------------------------------


def test_alpha_by_the_test_labels_is_there_under_oracle_only() -> None:
    with pytest.raises(UsageError, match="it needs --oracle"):
        create_method("dmn:alpha=oracle")
    with pytest.raises(UsageError, match="neither a number nor oracle"):
        create_method("dmn:alpha=best")
    with pytest.raises(UsageError, match=r"alpha must be 0 or more, not -1\.0"):
        create_method("dmn:alpha=-1")


def test_the_oracles_candidates_are_the_answers_of_each_alpha() -> None:
    teacher = FakeTeacher(dim=16)
    options = MethodOptions(oracle=True, views=4)
    method = create_method("dmn:alpha=oracle", options)
    assert method.name == "dmn" and len(ALPHAS) == 13 and ALPHAS[:2] == (0.001, 0.003) and ALPHAS[-1] == 1000
    answer = method.predict(make_batch(6, teacher))
    assert answer.step_logits is not None
    plain = create_method("dmn", options).predict(make_batch(6, teacher))
    assert torch.equal(answer.logits, plain.logits) and plain.step_logits is None
    for place, alpha in enumerate(ALPHAS, 1):
        one = create_method(f"dmn:alpha={alpha}", options).predict(make_batch(6, teacher)).logits
        torch.testing.assert_close(answer.step_logits[:, place], one)


def test_the_oracles_row_is_marked(tmp_path: Path) -> None:
    options: Any = MethodOptions(oracle=True, views=4)
    make_run(tmp_path, [create_method("dmn:alpha=oracle", options)], make_dataset(30))
    (table,) = make_tables([Records.open(tmp_path)], oracle=True)
    assert [row.method for row in table.rows] == [
        "dmn",
        "ORACLE dmn, best alpha of each cell",
        "ORACLE dmn, best alpha of each image",
    ]
    assert [row.kind for row in table.rows] == ["ours", "oracle", "oracle"]
    own, best, _ = (row.cells[table.columns[0]].accuracy for row in table.rows)
    assert own is not None and best is not None and best >= own
    assert any(re.match("ORACLE: chosen with the test labels", note) for note in table.notes)
    (quiet,) = make_tables([Records.open(tmp_path)])
    assert [row.method for row in quiet.rows] == ["dmn"]
