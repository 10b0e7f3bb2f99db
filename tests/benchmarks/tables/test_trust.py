"""What can be trusted: every figure against one worked out by hand, ranks on small cases, refusals in words."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from typer.testing import CliRunner

from apm.benchmarks.runs.records import Records, RunFolder
from apm.benchmarks.runs.rows import Row
from apm.benchmarks.tables.build import make_tables
from apm.benchmarks.tables.formats import FORMATS as ACCURACIES
from apm.benchmarks.tables.stats import holm, mcnemar, paired_test
from apm.benchmarks.tables.trust import TrustRow, TrustTable, make_trust, ranks
from apm.benchmarks.tables.trust_formats import CSV_COLUMNS, FORMATS, HEADINGS, lines
from apm.cli.main import app
from apm.errors import UsageError
from tests.benchmarks.make_table_golden import SESSION, cell
from tests.schemas import schema

N = 40
TEACHER = np.arange(N) < 20
"""Which images the teacher is right on: the first half."""


def flipped(lost: int, gained: int) -> NDArray[np.bool_]:
    """The teacher's answers, of which some go wrong and some right."""
    right = TEACHER.copy()
    right[:lost], right[20 : 20 + gained] = False, True
    return right


def write_run(
    path: Path,
    cells: Mapping[str, Mapping[str, Any]],
    right: Mapping[str, NDArray[np.bool_] | Mapping[str, NDArray[np.bool_]]],
    *,
    failed: Mapping[str, Sequence[int]] = {},
    order: int = 0,
    peak: int | None = 3_000_000_000,
    stream: Sequence[str] = ("tda",),
    trained: Sequence[str] = (),
    ids: str = "image",
    total: int = N,
    **teacher: Any,
) -> Path:
    """Record a run of two classes in which it is given what is right; class 0 is the label of every image."""
    folder = RunFolder(path)
    headers = {
        key: {**cell("digits", total, total, 2), "prompt_set": "prompts", "label_set": "labels", **changes}
        for key, changes in cells.items()
    }
    for key in cells:
        at = np.random.default_rng(order).permutation(N)
        rows = []
        for method, given_right in right.items():
            mine = given_right[key] if isinstance(given_right, Mapping) else given_right
            for position, image in enumerate(at):
                place: dict[str, Any] = {"id": f"{ids} {image}", "position": position, "label": 0, "method": method}
                if image in failed.get(method, ()):
                    rows.append(Row(**place, error="the numbers are not finite"))
                    continue
                sure = 0.95 if mine[image] else 0.55
                rows.append(
                    Row(
                        **place,
                        prediction=int(not mine[image]),
                        probability=sure,
                        nll=0.25 if mine[image] else 1.25,
                        rank=1 if mine[image] else 2,
                        teacher_prediction=int(not TEACHER[image]),
                        seconds=0.002,
                        shared_seconds=0.008,
                    )
                )
        folder.append(key, rows)
    identity = ("fingerprint", "label_set", "prompt_set")
    folder.write_run(
        {
            "schema": 1,
            "config": {
                "teacher": "embedded@0",
                "methods": {
                    name: {"stream": name in stream, **({"uses_training_data": "yes"} if name in trained else {})}
                    for name in right
                },
                "cells": {key: {**{k: one[k] for k in identity}, "generated": None} for key, one in headers.items()},
                "seed": 0,
                "limit": None,
                "prompts": None,
                "record_steps": False,
            },
            "teacher": {"name": "embedded", "identity": "embedded@0", "notes": [], **teacher},
            "stream_order": {"generator": "numpy PCG64 permutation", "seed": order},
            "cells": headers,
            "label_sets": {"labels": ["cat", "dog"]},
            "prompt_sets": {"prompts": ["a photo of a {}."]},
            "counts": {},
            "wall_seconds": 0.0,
            "sessions": [{**SESSION, **({} if peak is None else {"peak_memory": peak})}],
        }
    )
    return path


def trusted(*paths: Path, cells: bool = True) -> list[TrustTable]:
    return make_trust(make_tables([Records.open(path) for path in paths], published=False), cells=cells)


def row(table: TrustTable, method: str) -> TrustRow:
    (found,) = [one for one in table.rows if one.method == method]
    return found


METHODS = {"zero-shot": TEACHER, "mta": flipped(1, 12), "tda": flipped(2, 3), "tpt": flipped(15, 0)}


def test_what_was_trained_on_labels_is_marked_in_every_table(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", {"digits": {}}, METHODS, trained=["tpt"])
    (table,) = trusted(path)
    assert [one.method for one in table.rows if "training data" in one.marks] == ["tpt"]
    assert [line[0] for line in lines(table) if "ᴾ" in line[2]] == ["tpt"]
    assert "ᴾ trained on labelled images" in table.notes and r"\textsuperscript{P}" in FORMATS["latex"]([table])
    tables = make_tables([Records.open(path)], published=False)
    for form in ("markdown", "latex"):
        written = ACCURACIES[form](tables)
        assert written.count("tpt (with training data)") == 2  # accuracies and details
        assert written.count("(with training data)") == 2
    assert [line["method"] for line in csv.DictReader(io.StringIO(ACCURACIES["csv"](tables)))
            if line["uses_training_data"] == "yes"] == ["tpt"] * 2  # fmt: skip


def test_every_figure_by_hand(tmp_path: Path) -> None:
    (table,) = trusted(write_run(tmp_path / "run", {"digits": {}}, METHODS, failed={"tpt": [39]}))
    assert (table.title, table.cells, table.n, table.images) == ("digits", ("digits",), 40, 40)
    mta = row(table, "mta")
    assert mta.accuracy == pytest.approx(100 * 31 / 40) and mta.gain == pytest.approx(100 * 11 / 40)
    assert (mta.right_to_wrong, mta.wrong_to_right, mta.failed) == (1, 12, 0)
    raw = [mcnemar(1, 12), mcnemar(2, 3), mcnemar(15, 0)]
    assert [row(table, name).p for name in ("mta", "tda", "tpt")] == pytest.approx(holm(raw))
    assert row(table, "zero-shot").p is None and row(table, "zero-shot").gain == 0
    # 31 answers of 0.95 that are right, 9 of 0.55 that are wrong, each kind in one bin
    assert mta.ece == pytest.approx((31 * 0.05 + 9 * 0.55) / 40, abs=1e-6)
    assert mta.nll == pytest.approx((31 * 0.25 + 9 * 1.25) / 40, abs=1e-6)
    assert mta.auroc == 1.0
    assert mta.ms_given_features == pytest.approx(2) and mta.ms == pytest.approx(10)
    assert mta.peak_memory == 3_000_000_000
    assert (mta.episodic, mta.gradients) == (True, False)
    assert (row(table, "tda").episodic, row(table, "tpt").gradients) == (False, True)
    tpt = row(table, "tpt")  # image 39 was wrong before, and counts as wrong without an answer
    assert (tpt.failed, tpt.accuracy) == (1, pytest.approx(100 * 5 / 40))
    assert any("count as wrong: tpt 1." in note for note in table.notes)


def test_a_failure_counts_as_wrong_against_the_teachers_own_answer(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"digits": {}}, {"zero-shot": TEACHER, "mta": TEACHER}, failed={"mta": [0, 1]})
    mta = row(trusted(run)[0], "mta")
    assert (mta.right_to_wrong, mta.gain) == (2, pytest.approx(-5))


def test_images_that_nobody_can_answer_are_left_out_and_counted(tmp_path: Path) -> None:
    failed = {name: [0, 39] for name in METHODS}
    (table,) = trusted(write_run(tmp_path / "run", {"digits": {}}, METHODS, failed=failed))
    assert table.n == 38 and row(table, "zero-shot").accuracy == pytest.approx(100 * 19 / 38)
    assert any("; 2 that no method could answer are excluded." in note for note in table.notes)


def test_a_cell_without_any_answer_is_no_table(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"digits": {}}, {"mta": TEACHER}, failed={"mta": range(N)})
    assert trusted(run) == []


def test_ranks_by_what_is_shown(tmp_path: Path) -> None:
    (table,) = trusted(write_run(tmp_path / "run", {"digits": {}}, METHODS))
    # mta beats zero-shot (12 gained, 1 lost) and tpt; tda and zero-shot differ by 5 flips; both beat tpt
    assert [(one.method, one.rank) for one in table.rows] == [("mta", 1), ("tda", 2), ("zero-shot", 2), ("tpt", 3)]


def test_equal_methods_share_a_rank_and_stand_by_name() -> None:
    image = np.arange(N)
    assert ranks([TEACHER, TEACHER, TEACHER], image) == [1, 1, 1]
    assert ranks([np.zeros(N, bool), np.ones(N, bool)], image) == [2, 1]
    assert ranks([TEACHER], image) == [1]
    assert ranks([], image) == []


def test_a_noisy_method_is_not_ranked_down_by_a_close_race_of_others() -> None:
    """A is shown to beat B on the few images that they differ on; C, less accurate, is shown to be beaten by nobody."""
    rng = np.random.default_rng(0)
    a = np.ones(400, dtype=bool)
    a[300:] = False
    b = a.copy()
    b[:12] = False  # 12 lost, none gained: p = 2^-11
    c = rng.permutation(a)
    c[np.flatnonzero(c)[:14]] = False  # 286 right, at other places
    assert b.sum() > c.sum()
    assert ranks([a, b, c], np.arange(400)) == [1, 2, 1]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.integers(1, 4))
def test_ranks_say_what_the_rule_says(seed: int, methods: int, cells_per_image: int) -> None:
    rng = np.random.default_rng(seed)
    image = np.repeat(np.arange(60), cells_per_image)
    skill = rng.uniform(0.1, 0.9, methods)
    right = [rng.random(len(image)) < one for one in skill]
    found = ranks(right, image)
    pairs = [(i, j) for i in range(methods) for j in range(i + 1, methods)]
    changes = [np.bincount(image, right[j].astype(float) - right[i]).astype(int) for i, j in pairs]
    shown = {
        (j, i) if change.sum() > 0 else (i, j)
        for (i, j), change, p in zip(pairs, changes, holm([paired_test(c) for c in changes]), strict=True)
        if p < 0.05
    }
    assert all(found[better] < found[worse] for better, worse in shown)
    assert all(
        rank == 1 or any((other, place) in shown and found[other] == rank - 1 for other in range(methods))
        for place, rank in enumerate(found)
    )


CORRUPTED = {
    f"digits/{name}/5": {"corruption": name, "level": 5, "generated": True} for name in ("fog", "frost", "snow")
}


def test_the_same_photographs_under_several_corruptions_are_no_independent_evidence(tmp_path: Path) -> None:
    right = {"zero-shot": TEACHER, "mta": flipped(0, 4)}
    pooled, *cells = trusted(write_run(tmp_path / "run", CORRUPTED, right))
    assert pooled.pooled and (pooled.n, pooled.images) == (120, 40)
    assert [one.cells for one in cells] == [("fog",), ("frost",), ("snow",)]
    assert [one.title for one in (pooled, cells[0])] == [
        "digits: corruptions at level 5, all cells",
        "digits, fog at level 5",
    ]
    # 4 images gained in all three cells: as much evidence as 4 flips, not as 12
    assert row(pooled, "mta").p == mcnemar(0, 4) == row(cells[0], "mta").p
    assert row(pooled, "mta").wrong_to_right == 12
    assert (row(pooled, "mta").low, row(pooled, "mta").high) == pytest.approx(
        (row(cells[0], "mta").low, row(cells[0], "mta").high)
    )
    assert row(pooled, "mta").marks == ("generated",)  # and nothing of chance, which is each cell's own


def test_clean_images_are_not_pooled_with_corrupted_ones_and_cells_can_be_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"digits": {}, **CORRUPTED}, METHODS)
    assert [one.cells for one in trusted(run, cells=False)] == [("fog", "frost", "snow"), ("clean",)]
    assert len(trusted(run)) == 5


def test_a_method_that_lacks_a_cell_is_left_out_of_the_pool_and_named(tmp_path: Path) -> None:
    first = write_run(tmp_path / "all", CORRUPTED, {"zero-shot": TEACHER, "mta": flipped(0, 4)})
    second = write_run(tmp_path / "fog", {"digits/fog/5": CORRUPTED["digits/fog/5"]}, {"tpt": flipped(3, 0)})
    pooled, fog, *_ = trusted(first, second)
    assert {one.method for one in pooled.rows} == {"zero-shot", "mta"}
    assert pooled.notes[0] == "Not on all 3 cells, and left out: tpt."
    assert {one.method for one in fog.rows} == {"zero-shot", "mta", "tpt"}


def test_runs_of_the_same_images_in_another_order_are_compared(tmp_path: Path) -> None:
    first = write_run(tmp_path / "one", {"digits": {}}, {"zero-shot": TEACHER, "mta": flipped(1, 12)})
    second = write_run(tmp_path / "two", {"digits": {}}, {"tpt": flipped(15, 0)}, order=5)
    (table,) = trusted(first, second)
    assert "Protocol common: " in " ".join(table.notes)
    alone = trusted(write_run(tmp_path / "both", {"digits": {}}, {k: METHODS[k] for k in ("zero-shot", "mta", "tpt")}))
    assert table.rows == alone[0].rows


def test_methods_of_one_name_are_told_apart_by_their_prompts_or_runs(tmp_path: Path) -> None:
    for name, prompts in (("one", "single"), ("two", "openai"), ("three", "single")):
        write_run(tmp_path / name, {"digits": {"prompts": prompts}}, {"zero-shot": TEACHER})
    first, second, third = (tmp_path / name for name in ("one", "two", "three"))
    assert {one.method for one in trusted(first, second)[0].rows} == {"zero-shot · single", "zero-shot · openai"}
    names = {one.method for one in trusted(first, third)[0].rows}
    assert names == {f"zero-shot · {first}", f"zero-shot · {third}"}


def test_other_images_are_refused_by_name(tmp_path: Path) -> None:
    first = write_run(tmp_path / "one", {"digits": {}}, {"zero-shot": TEACHER})
    second = write_run(tmp_path / "two", {"digits": {}}, {"mta": TEACHER}, ids="picture")
    with pytest.raises(
        UsageError, match=r"not of the same images\. zero-shot in .*one has 40, mta in .*two has 40; 0 are"
    ):
        trusted(first, second)


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "one", {"digits": {}}, {"zero-shot": TEACHER}, total=50)
    with pytest.raises(UsageError, match=r"zero-shot has 40 of 50 images in .*one\. Finish the run"):
        trusted(run)


def test_what_the_records_do_not_hold_is_not_known(tmp_path: Path) -> None:
    (table,) = trusted(write_run(tmp_path / "run", {"digits": {}}, {"own": TEACHER}, peak=None))
    own = row(table, "own")
    assert own.peak_memory is None and own.gradients is None and own.episodic is True
    assert lines(table)[0][HEADINGS.index("needs gradients")] == lines(table)[0][HEADINGS.index("peak MB")] == "–"


def test_features_from_a_store_tell_nothing_of_the_whole_cost(tmp_path: Path) -> None:
    run = Records.open(write_run(tmp_path / "run", {"digits": {}}, METHODS))
    run.run["sessions"][0]["features"] = {"store": "s", "key": "k", "precision": "float16", "views": 64}
    tables = make_tables([run], published=False)
    assert "Features were read from a store in" in " ".join(tables[0].notes)
    mta = row(make_trust(tables)[0], "mta")
    assert mta.ms is None and mta.ms_given_features == pytest.approx(2)


def test_the_formats_hold_every_row(tmp_path: Path) -> None:
    tables = trusted(write_run(tmp_path / "run", CORRUPTED, METHODS))
    document = json.loads(FORMATS["json"](tables))
    schema("benchmarks/trust.schema.json").validate(document)
    records = list(csv.DictReader(io.StringIO(FORMATS["csv"](tables))))
    assert tuple(records[0]) == CSV_COLUMNS and len(records) == 4 * 4
    assert float(records[0]["accuracy"]) == document["tables"][0]["rows"][0]["accuracy"]
    markdown, latex = FORMATS["markdown"](tables), FORMATS["latex"](tables)
    assert markdown.count("\n| mta |") == latex.count("\nmta &") == 4
    assert "wrong→right" in markdown and r"wrong$\rightarrow$right" in latex and "‡" not in latex


def test_the_command(tmp_path: Path) -> None:
    run = str(write_run(tmp_path / "run", {"digits": {}}, METHODS))
    told = CliRunner().invoke(app, ["table", "--trust", run])
    assert told.exit_code == 0, told.stderr
    assert "rank" in told.stdout and "Holm" in told.stdout and "mta" in told.stdout
    held = CliRunner().invoke(app, ["table", "--trust", run, "--json"])
    assert json.loads(held.stdout)["tables"][0]["rows"][0]["method"] == "mta"
    out = tmp_path / "trust.md"
    assert CliRunner().invoke(app, ["table", "--trust", run, "--format", "markdown", "--out", str(out)]).exit_code == 0
    assert out.read_text().startswith("### digits")
    other = str(write_run(tmp_path / "two", {"digits": {}}, {"tpt": TEACHER}, ids="picture"))
    refused = CliRunner().invoke(app, ["table", "--trust", run, other])
    assert refused.exit_code == 2 and "same images" in refused.stderr and not refused.stdout
