"""Comparison of two runs, paired by sample id."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from apm.benchmarks.runs.records import Records, RunFolder
from apm.benchmarks.runs.rows import Row
from apm.benchmarks.tables.compare import Comparison, Limits, compare
from apm.errors import UsageError
from tests.benchmarks.made_runs import Plain, Stream, make_dataset, make_run


@pytest.fixture
def baseline(tmp_path: Path) -> Path:
    make_run(tmp_path / "old", [Plain(), Stream()], make_dataset(30))
    return tmp_path / "old"


def altered(baseline: Path, answers: dict[int, int | None], method: str = "plain") -> Records:
    """A copy of the baseline, shards cut otherwise, in which `method` answers the images at these positions so."""
    old, new = RunFolder(baseline), RunFolder(baseline.parent / "new")
    rows = old.read("digits").to_pylist()
    changed: list[Row] = []
    for row in rows:
        if row["method"] == method and row["position"] in answers:
            answer = answers[row["position"]]
            row["prediction"] = answer
            if answer is None:
                row = {name: row[name] for name in ("id", "position", "label", "method")} | {"error": "cut off"}
        changed.append(Row(**{field.name: row.get(field.name) for field in fields(Row)}))
    record = old.read_run()
    assert record is not None
    new.lock().release()
    new.write_run(record)
    new.append("digits", changed[7:])
    new.append("digits", changed[:7])
    return Records.open(new.path)


def with_values(baseline: Path, name: str, **values: object) -> Records:
    """A copy of the baseline in which `plain` has these values, by column, for every image."""
    old, new = RunFolder(baseline), RunFolder(baseline.parent / name)
    record = old.read_run()
    assert record is not None
    new.lock().release()
    new.write_run(record)
    rows = [row | (values if row["method"] == "plain" else {}) for row in old.read("digits").to_pylist()]
    new.append("digits", [Row(**{field.name: row.get(field.name) for field in fields(Row)}) for row in rows])
    return Records.open(new.path)


def right_and_wrong(baseline: Path) -> tuple[list[int], list[int], dict[int, int]]:
    rows = [row for row in RunFolder(baseline).read("digits").to_pylist() if row["method"] == "plain"]
    right = sorted(row["position"] for row in rows if row["prediction"] == row["label"])
    wrong = sorted(row["position"] for row in rows if row["prediction"] != row["label"])
    return right, wrong, {row["position"]: row["label"] for row in rows}


def plain(results: list[Comparison]) -> Comparison:
    (one,) = [result for result in results if result.method == "plain"]
    return one


def test_the_same_rows_in_other_shards_pass_without_any_tolerance(baseline: Path) -> None:
    results = compare(altered(baseline, {}), Records.open(baseline), Limits(tolerance=0, max_changed=0))
    assert [(r.cell, r.method, r.n, r.passed, r.changed) for r in results] == [
        ("digits", "plain", 30, True, ()),
        ("digits", "stream", 30, True, ()),
    ]


def test_a_fall_beyond_the_tolerance_names_cell_and_images(baseline: Path) -> None:
    right, _, label = right_and_wrong(baseline)
    lost = right[:2]
    new = altered(baseline, {p: (label[p] + 1) % 3 for p in lost})
    strict = plain(compare(new, Records.open(baseline), Limits(tolerance=6.6, max_changed=100)))
    assert not strict.passed
    assert "accuracy fell from" in strict.failures[0]
    ids = {row["position"]: row["id"] for row in RunFolder(baseline).read("digits").to_pylist()}
    assert strict.right_to_wrong == strict.changed == tuple(ids[p] for p in lost)
    # 2 of 30 is 6.67 points.
    assert plain(compare(new, Records.open(baseline), Limits(tolerance=6.67, max_changed=100))).passed


def test_changes_count_even_where_accuracy_stays(baseline: Path) -> None:
    right, wrong, label = right_and_wrong(baseline)
    new = altered(baseline, {right[0]: (label[right[0]] + 1) % 3, wrong[0]: label[wrong[0]]})
    result = plain(compare(new, Records.open(baseline), Limits(tolerance=0, max_changed=6.6)))
    assert result.accuracy == result.baseline_accuracy
    assert (len(result.right_to_wrong), len(result.wrong_to_right)) == (1, 1)
    assert result.failures == ("2 of 30 predictions changed (6.6 % allowed)",)
    assert plain(compare(new, Records.open(baseline), Limits(tolerance=0, max_changed=6.67))).passed


def test_an_answer_that_is_gone_is_a_change_and_wrong(baseline: Path) -> None:
    right, _, _ = right_and_wrong(baseline)
    result = plain(
        compare(altered(baseline, {right[0]: None}), Records.open(baseline), Limits(tolerance=0, max_changed=0))
    )
    assert len(result.changed) == len(result.right_to_wrong) == 1
    assert len(result.failures) == 2


def test_better_accuracy_is_no_failure(baseline: Path) -> None:
    _, wrong, label = right_and_wrong(baseline)
    new = altered(baseline, {p: label[p] for p in wrong[:3]})
    assert plain(compare(new, Records.open(baseline), Limits(tolerance=0, max_changed=10))).passed


def test_other_methods_are_not_touched(baseline: Path) -> None:
    right, _, label = right_and_wrong(baseline)
    results = compare(
        altered(baseline, {right[0]: (label[right[0]] + 1) % 3}),
        Records.open(baseline),
        Limits(tolerance=0, max_changed=0),
    )
    assert [result.passed for result in results] == [False, True]


def test_other_configurations_are_an_error_naming_the_fields(baseline: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "other", [Plain(turn=1.0), Stream()], make_dataset(30))
    with pytest.raises(UsageError, match=r"methods\.plain\.turn: 3\.0 before, 1\.0 now"):
        compare(Records.open(tmp_path / "other"), Records.open(baseline), Limits())


def test_a_run_that_is_not_finished_is_an_error(baseline: Path) -> None:
    new = altered(baseline, {})
    RunFolder(new.path).shards("digits")[0].unlink()
    with pytest.raises(UsageError, match=r"images of digits by plain\. Finish it"):
        compare(new, Records.open(baseline), Limits())


@pytest.mark.parametrize("limits", [{"tolerance": -1.0}, {"max_changed": 101.0}, {"tolerance": float("nan")}])
def test_limits_are_percentages(limits: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="between 0 and 100"):
        Limits(**limits)


@pytest.mark.parametrize(
    ("before", "now", "moved", "told"),
    [
        ({"loss": 0.1}, {"loss": 0.102}, 0.02, "loss moved by 2 % (1 % allowed)"),
        ({"loss": 1e-5}, {"loss": 1.02e-5}, 0.02, "loss moved by 2 % (1 % allowed)"),
        ({"cosine": 0.9}, {"cosine": 0.902}, 0.002, "cosine moved by 0.002 (0.001 allowed)"),
        ({"nll": 0.5}, {"nll": 0.48}, 0.02, "nll moved by 0.02 (0.01 allowed)"),
    ],
)
def test_what_moved_behind_the_answers_is_named(
    before: dict[str, float], now: dict[str, float], moved: float, told: str, baseline: Path
) -> None:
    ((name, _),) = now.items()
    old, new = with_values(baseline, "a", **before), with_values(baseline, "b", **now)
    result = plain(compare(new, old, Limits()))
    assert result.moved[name] == pytest.approx(moved, rel=1e-4) and result.changed == ()  # values are float32
    assert result.failures == (told,)
    assert plain(compare(new, old, Limits(**{name: 1.01 * moved}))).passed


def test_other_true_classes_and_a_loss_that_is_gone_are_named(baseline: Path) -> None:
    _, _, label = right_and_wrong(baseline)
    others = sum(value != 1 for value in label.values())
    result = plain(compare(with_values(baseline, "a", label=1), Records.open(baseline), Limits(tolerance=100)))
    assert others and result.failures == (f"{others} of 30 true classes changed",)
    gone = compare(with_values(baseline, "b", loss=None), with_values(baseline, "c", loss=0.1), Limits())
    assert plain(gone).failures == ("loss is no longer recorded for 30 of 30 images",)
