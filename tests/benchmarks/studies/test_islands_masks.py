"""Regions of fields against masks: edges, moments of a fit, scores that follow the truth alone, and the command."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from apm.benchmarks.studies import islands_masks as study
from apm.benchmarks.studies import partitions
from apm.benchmarks.studies.watching import Watcher
from apm.errors import UsageError
from apm.test_time import island_fields
from apm.test_time.trainer import TestTimeTrainer
from tests.apm.test_time.test_island_fields import ADAPT, IMAGES
from tests.benchmarks.studies.test_glom_studies import coco
from tests.benchmarks.studies.test_pointing import TINY, ColourTeacher


def halves(side: int, first: int) -> np.ndarray:
    """Two parts, the left one `first` columns wide."""
    return np.where(np.arange(side) < first, 3, 5)[None].repeat(side, 0)


def slow_fit(found: np.ndarray, truth: np.ndarray, tolerance: float) -> tuple[float, float]:
    """Precision and recall, edge by edge."""
    side = len(truth)

    def middles(labels: np.ndarray, known: np.ndarray) -> list[tuple[float, float]]:
        pairs = [((y, x), (y, x + 1)) for y in range(side) for x in range(side - 1)]
        pairs += [((y, x), (y + 1, x)) for y in range(side - 1) for x in range(side)]
        cut = [(a, b) for a, b in pairs if labels[a] != labels[b] and known[a] and known[b]]
        return [((a[0] + b[0]) / 2, (a[1] + b[1]) / 2) for a, b in cut]

    everywhere = np.ones_like(truth, dtype=bool)
    true, drawn, judged = middles(truth, truth >= 0), middles(found, everywhere), middles(found, truth >= 0)
    reach = tolerance * math.sqrt(2) * side + 1e-9

    def near(some: list[tuple[float, float]], others: list[tuple[float, float]]) -> float:
        hits = [any(math.dist(one, other) <= reach for other in others) for one in some]
        return sum(hits) / len(hits) if hits else 0.0

    return near(judged, true), near(true, drawn)


@pytest.mark.parametrize("tolerance", [0.0, 0.05, 0.1, 0.2])
def test_edges_fit_as_counted_one_by_one(tolerance: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        found = np.kron(rng.integers(0, 3, (3, 3)), np.ones((3, 3), int))
        truth = rng.integers(-1, 3, (9, 9))
        got = partitions.fit(found, truth, tolerance)
        assert (got.precision, got.recall) == pytest.approx(slow_fit(found, truth, tolerance))


def test_an_edge_two_places_off_is_near_or_not() -> None:
    assert partitions.fit(halves(20, 10), halves(20, 10), 0).f == 1
    near, far = (partitions.fit(halves(20, 12), halves(20, 10), 2 / (20 * 2**0.5) + more) for more in (0.001, -0.001))
    assert near.f == 1 and far.f == 0
    both = np.where(np.arange(20) < 4, 0, halves(20, 10))  # the right edge and another
    assert partitions.fit(both, halves(20, 10), 0.01).f == pytest.approx(2 / 3)
    unknown = halves(20, 10)
    unknown[:, :6] = -1  # where the other one is
    assert partitions.fit(both, unknown, 0.01).f == 1
    assert partitions.fit(np.zeros((20, 20), int), halves(20, 10), 0.01).f == 0


@pytest.mark.parametrize("target", ["cls", "grid"])
def test_moments_are_the_trainers_and_wait_for_a_loss(target: str) -> None:
    subject = island_fields.prepare(*IMAGES, ColourTeacher(), TINY, parts=4, seed=0)  # type: ignore[arg-type]
    trainer: TestTimeTrainer = island_fields.trainers(TINY, replace(ADAPT, steps=6))[target]
    watched = island_fields.watch(trainer, subject.inputs["image"], [0, 2, 6])
    watcher = Watcher(trainer.model, trainer.config)
    for _ in range(2):  # nothing is left of the fit before
        moments = {one.step: one for one in watcher(subject.inputs["image"], lambda step, _: step in (0, 2, 6))}
        assert list(moments) == [0, 2, 6]
        for step, one in moments.items():
            assert one.loss == pytest.approx(watched.losses[step], rel=1e-6)
            torch.testing.assert_close(torch.from_numpy(one.field(8)), torch.from_numpy(watched.fields[step]))
    exact = moments[6].field(8, exact=True)
    assert exact.dtype == np.float64 and 0 < np.abs(exact - moments[6].field(8)).max() < 1e-4
    assert moments[6].field(24)[1::3, 1::3] == pytest.approx(moments[6].field(8), abs=1e-5)  # the same middles
    bound = (moments[2].loss + moments[6].loss) / 2
    first = next(watcher(subject.inputs["image"], lambda _, loss: loss <= bound))
    assert first.loss <= bound and 2 < first.step <= 6


def test_scores_follow_the_truth_alone() -> None:
    rng = np.random.default_rng(0)
    truth = halves(12, 5)
    truth[3:6, 7:9] = 8
    judge = study.Judge(truth, truth.T.copy(), parts=6, threshold=0.9, tolerance=0.01)
    assert judge.number == 3
    field = rng.normal(size=(9, 7))[truth] + 1e-3 * rng.normal(size=(12, 12, 7))
    found = judge.field(field)
    for cut in ("true number", "islands", "islands, true number"):
        assert found[f"AMI, {cut}"] == found[f"F, {cut}"] == pytest.approx(1), cut
    assert found["number of islands"] == 3 and found["recall, fixed number"] == 1 > found["precision, fixed number"]
    assert abs(found["AMI, true number, another's mask"]) < 0.2 and found["F, true number, another's mask"] < 0.5
    small = truth.copy()
    small[0, 0] = 9  # less than a hundredth
    assert replace(judge, truth=small).number == 3


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch) -> ColourTeacher:
    found = ColourTeacher()
    monkeypatch.setattr(study, "load_teacher", lambda name, device: found)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("scenes", ["photographs", "composites"])
def test_rows_are_kept_and_summed_up(teacher: ColourTeacher, tmp_path: Path, scenes: str) -> None:
    given = [
        *("--root", str(coco(tmp_path)), "--scenes", scenes, "--snapshots", "1,3", "--places", "16", "--views", "2"),
        *("--rows", str(tmp_path / "rows.jsonl"), "--parts", "3"),
    ]
    record = study.measure(study.STUDY.read([*given, "--limit", "2"]))
    (first,) = (json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[1]),)
    assert record["images"] == 2 and record["settings"]["snapshots"] == [0, 1, 3]
    assert list(record["fields"]) == list(study.TARGETS) and list(record["references"]) == list(study.REFERENCES)
    again = study.measure(study.STUDY.read(given))
    assert again["images"] == 3
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()[1:]]
    assert rows[0] == first and len(rows) == 3
    less = [
        row["fields"]["views"]["3"]["AMI, true number"] - row["references"]["superpixels"]["AMI, true number"]
        for row in rows
    ]
    mean, error = again["differences"]["views"]["superpixels"]["AMI, true number"]
    assert mean == pytest.approx(np.mean(less)) and error == pytest.approx(np.std(less, ddof=1) / 3**0.5)
    if scenes == "photographs":
        colours = again["references"]["colours"]
        assert colours["AMI, true number"][0] > 0.8 and colours["F, true number"][0] > 0.8  # a corner in its own colour
    text = study.table([{**again, "command": "c", "date": "d"}])
    assert f"**3 {scenes}" in text and "| views | 3 |" in text and "minus superpixels" in text
    with pytest.raises(UsageError, match="views"):
        study.measure(study.STUDY.read([*given, "--views", "3"]))
