"""The choice of the best target: disjoint images, counts that add up, a rule that can refuse."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from apm.benchmarks.datasets import open_dataset
from apm.benchmarks.studies import choose_target
from apm.test_time.targets import TARGETS
from tests.fakes import FakeTeacher

RECORD = Path(choose_target.__file__).parent.parent / "results" / "choose-target.json"


def test_the_images_are_not_those_of_the_tables() -> None:
    data = open_dataset("digits", seed=3)
    chosen = choose_target.held_out(data, 100, 40, 3)
    table = open_dataset("digits", limit=100, seed=3)
    assert len(chosen.samples) == 40
    assert not {sample.id for sample in chosen.samples} & {sample.id for sample in table.samples}


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose_target, "load_teacher", lambda name: FakeTeacher(dim=16))
        patch.setattr(choose_target, "CORRUPTIONS", ("contrast", "pixelate"))
        patch.setattr(choose_target, "VIEWS", (2, 4))
        return choose_target.measure(choose_target.STUDY.read(["digits", "--held", "20", "--limit", "10"]))


def test_flips_account_for_every_difference_from_the_papers_target(record: dict[str, Any]) -> None:
    assert record["images"] == {"clean": 10, "corrupted": 4}
    first, *others = record["candidates"]
    assert first["kind"] == "cls"
    for name in record["images"]:
        assert (first[name]["lost"], first[name]["won"], first[name]["p"]) == (0, 0, 1)
        for row in others:
            assert row[name]["correct"] - first[name]["correct"] == row[name]["won"] - row[name]["lost"]
    assert any(row["clean"]["won"] + row["clean"]["lost"] for row in others)


def test_a_candidate_that_loses_on_either_part_is_not_chosen(record: dict[str, Any]) -> None:
    changed = copy.deepcopy(record)
    first, sound, better, *rest = changed["candidates"]
    for row in rest:
        row["clean"]["correct"] = first["clean"]["correct"] - 1
    for row, clean, corrupted in ((first, 5, 2), (sound, 6, 2), (better, 10, 1)):
        row["clean"]["correct"], row["corrupted"]["correct"] = clean, corrupted
    assert choose_target.chosen(changed) is sound
    sound["clean"]["correct"] = 4
    assert choose_target.chosen(changed) is first


def test_best_is_what_the_record_says() -> None:
    chosen = choose_target.chosen(json.loads(RECORD.read_text(encoding="utf-8")))
    for name in ("kind", "views", "min_area", "cls_weight"):
        assert getattr(TARGETS["best"], name) == chosen[name]
