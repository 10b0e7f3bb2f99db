"""The study of segmentation: the same maps as `apm segment`, paired scores by group, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from apm import Classifier, StudentOptions
from apm.benchmarks.studies import segmentation
from apm.benchmarks.studies.masked import Masked, counts, pixel_accuracy, tallied
from apm.benchmarks.studies.segment_scores import BASELINES, GIVEN, OURS, SOURCES, grouped, scores
from apm.benchmarks.studies.segmentation import Case, Player
from apm.errors import UsageError
from tests.benchmarks.studies.test_masked import photograph, write
from tests.benchmarks.studies.test_pointing import COLOURS, ColourTeacher
from tests.fakes import FakeTeacher

SMALL = ["--steps", "3", "--views", "3", "--places", "16"]
NAMES = {1: "red thing", 2: "brick wall", 187: "sky"}


def folder(root: Path, count: int = 2) -> Path:
    """Photographs of 48 × 32 with an object each, on another ground each."""
    made = []
    for number in range(count):
        truth = np.full((32, 48), (2, 187)[number % 2])
        truth[8:24, 8 + number : 28 + number] = 1 if number % 2 == 0 else 2
        made.append(photograph(f"{number:02}", truth))
    write(root, *made)
    return root


def halves() -> Masked:
    """Red on the left, blue on the right."""
    pixels = np.zeros((48, 64, 3), dtype=np.uint8)
    pixels[:, :32, 0], pixels[:, 32:, 2] = 255, 255
    truth = np.where(np.arange(64) < 32, 1, 2) * np.ones((48, 1), dtype=np.int32)
    return Masked("halves", Image.fromarray(pixels), truth.astype(np.int32))


def test_a_folder_is_needed() -> None:
    with pytest.raises(UsageError, match="--root, a folder with images, masks and categories"):
        segmentation.measure(segmentation.STUDY.read([]))


@pytest.mark.slow
def test_our_map_is_that_of_the_classifier() -> None:
    """The same tiles, views, students, places and small pieces: what is scored is what a user gets."""
    options = segmentation.STUDY.read([*SMALL, "--root", "none", "--steps", "30"])
    teacher = ColourTeacher()
    student = StudentOptions(preset="small", steps=30, lr=1e-3, distil="grid", grid_views=3, precision="fp32")
    classifier = Classifier(teacher, labels=list(COLOURS), student=student, device="cpu")
    classifier.head = teacher.head()
    found = classifier.segment(halves().image, places=16)
    assert len(np.unique(found.map)) > 1
    row = Player(teacher, teacher.head(), (1, 3, 2), options)(Case(halves(), "clean"))
    ids = np.array([0, 1, 3, 2], dtype=np.int32)[found.map]
    assert row["counts"]["all"][OURS] == counts(ids, halves().truth)
    assert row["tiles"] == found.tiles == 2


def test_all_ways_see_what_is_to_be_seen() -> None:
    """With a teacher that knows the colours every way without a student draws the halves."""
    teacher = ColourTeacher()
    options = segmentation.STUDY.read([*SMALL, "--root", "none"])
    row = Player(teacher, teacher.head(), (1, 3, 2), options)(Case(halves(), "clean"))
    for name in BASELINES:
        for given in GIVEN:
            tally = tallied([row["counts"][given][name]])
            assert pixel_accuracy(tally)[0] > 0.95, name
    assert row["seconds"]["views"] > 0 and row["seconds"][OURS] > 0


def rows_of(condition: str, ours: list[int], others: list[int], pasted: int = 0) -> list[dict[str, Any]]:
    """Of photographs of ten pixels of one category: how many each way has right."""
    return [
        {
            "name": str(number),
            "condition": condition,
            "pasted": pasted,
            "counts": {
                given: {name: {"1": [one := mine if name == OURS else theirs, one, 10]} for name in SOURCES}
                for given in GIVEN
            },
        }
        for number, (mine, theirs) in enumerate(zip(ours, others, strict=True))
    ]


def test_scores_are_paired_and_only_of_photographs_that_have_all_of_a_group() -> None:
    rows = rows_of("clean", [8, 6, 10], [5, 3, 7]) + rows_of("fog", [4, 6, 8], [4, 6, 8])
    rows += rows_of("contrast", [2, 2], [1, 1])  # the third was not reached
    groups = grouped(rows)
    assert {name: [len(one) for one in some.values()] for name, some in groups.items()} == {
        "clean": [3],
        "corrupted": [2, 2],
    }
    clean = scores(groups["clean"])
    one = clean["present"]["grid"]["miou"]
    assert one["value"] == pytest.approx(0.5) and clean["present"][OURS]["miou"]["value"] == pytest.approx(0.8)
    above = one["ours_above"]
    assert [above[of] for of in ("value", "low", "high")] == pytest.approx([0.3] * 3)  # as much on each: no doubt
    assert one["guided_above"]["value"] == pytest.approx(0)  # it is one of the others here
    assert one["low"] < 0.5 < one["high"] and "object" not in clean["present"]["grid"]
    corrupted = scores(groups["corrupted"])["all"]
    assert corrupted[OURS]["accuracy"]["value"] == pytest.approx((0.5 + 0.2) / 2)
    assert corrupted["grid"]["miou"]["ours_above"]["value"] == pytest.approx((0 + 0.1) / 2)
    pasted = scores(grouped(rows_of("composites", [5, 10], [0, 5], pasted=1))["composites"])
    assert pasted["present"][OURS]["object"]["value"] == pytest.approx(0.75)
    assert pasted["present"]["grid"]["object"]["ours_above"]["value"] == pytest.approx(0.5)


@pytest.mark.slow
def test_the_command_measures_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(segmentation, "load_teacher", lambda name, device: FakeTeacher(64))
    root, rows, record = folder(tmp_path / "data", 3), tmp_path / "rows.jsonl", tmp_path / "r.json"
    given = [*SMALL, "--root", str(root), "--conditions", "clean,composites,fog", "--corrupted", "1", "--limit", "2"]
    segmentation.STUDY.main([*given, "--rows", str(rows), "--record", str(record)])
    found = json.loads(record.read_text())
    assert {name: (one["n"], one["conditions"]) for name, one in found["groups"].items()} == {
        "clean": (2, ["clean"]),
        "composites": (len(rows.read_text().splitlines()) - 4, ["composites"]),
        "corrupted": (1, ["fog"]),
    }
    assert set(found["categories"]) == set(NAMES.values())
    shown = capsys.readouterr().out
    assert "IoU of the object" in shown and "mean of fog at level 3" in shown and "red thing" in shown
    before = rows.read_bytes()
    segmentation.STUDY.main([*given, "--rows", str(rows)])
    assert rows.read_bytes() == before and json.loads(capsys.readouterr().out)["groups"] == found["groups"]
    with pytest.raises(UsageError, match="fogg"):
        segmentation.STUDY.main([*given, "--conditions", "fogg"])


def test_probabilities_of_a_grid_are_the_head_s() -> None:
    head = ColourTeacher().head()
    grid = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    found = segmentation.probabilities(grid, head)
    torch.testing.assert_close(found.reshape(6, 3), head.probabilities(grid.reshape(6, 16)))


def test_an_early_end_has_some_of_each_condition(tmp_path: Path) -> None:
    given = ["--root", str(folder(tmp_path, 4)), "--conditions", "clean,fog,contrast", "--corrupted", "2"]
    cases = segmentation.cases_of(segmentation.STUDY.read(given))
    assert [(case.masked.name, case.condition) for case in cases] == [
        ("00", "clean"),
        ("00", "fog"),
        ("00", "contrast"),
        ("01", "clean"),
        ("02", "clean"),
        ("01", "fog"),
        ("01", "contrast"),
        ("03", "clean"),
    ]
    clean, fog = cases[0].masked, cases[1].masked
    assert (clean.truth == fog.truth).all() and clean.image != fog.image
