"""The statistics of the tables, each against a value worked out by other means."""

from __future__ import annotations

from itertools import product
from math import comb, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm

from apm.benchmarks.tables.stats import (
    auroc,
    expected_calibration_error,
    holm,
    interval,
    mcnemar,
    near_chance,
    paired_test,
    standard_error,
)


def test_standard_error_by_hand() -> None:
    assert standard_error(0.5, 100) == pytest.approx(0.05)
    assert standard_error(1.0, 7) == 0


@pytest.mark.parametrize(("b", "c"), [(0, 1), (3, 9), (9, 3), (5, 5), (10, 40), (0, 12)])
def test_mcnemar_is_the_exact_binomial_sum(b: int, c: int) -> None:
    n = b + c
    expected = min(1.0, 2 * sum(comb(n, i) for i in range(min(b, c) + 1)) / 2**n)
    assert mcnemar(b, c) == pytest.approx(expected, rel=1e-12)


def test_mcnemar_without_flips_is_one() -> None:
    assert mcnemar(0, 0) == 1.0


def test_calibration_error_by_hand() -> None:
    confidence = np.array([0.95, 0.95, 0.55, 0.55])
    correct = np.array([True, False, True, True])
    # Two bins of two: |0.5 - 0.95| and |1 - 0.55|, half of the images each.
    assert expected_calibration_error(confidence, correct) == pytest.approx((0.45 + 0.45) / 2)


def test_calibration_bins_are_closed_on_the_right() -> None:
    confidence = np.array([0.5, 0.51])
    correct = np.array([True, False])
    # With two bins, 0.5 is alone in the first: no cancelling of +0.5 by -0.51.
    assert expected_calibration_error(confidence, correct, bins=2) == pytest.approx((0.5 + 0.51) / 2)
    assert expected_calibration_error(np.array([0.0, 1.0]), np.array([False, True])) == 0


def test_calibration_error_bin_by_bin() -> None:
    draw = np.random.default_rng(0)
    sure, right = draw.random(500), draw.random(500) < 0.6
    inside = [(sure > place / 15) & (sure <= (place + 1) / 15) for place in range(15)]
    assert sum(int(bin_.sum()) for bin_ in inside) == 500
    apart = sum(abs(float(right[bin_].sum() - sure[bin_].sum())) for bin_ in inside)
    assert expected_calibration_error(sure, right) == pytest.approx(apart / 500)


def test_near_chance_is_two_standard_errors() -> None:
    classes, n = 10, 900
    limit = n * (0.1 + 2 * sqrt(0.1 * 0.9 / n))
    assert near_chance(int(limit), n, classes)
    assert not near_chance(int(limit) + 1, n, classes)
    assert near_chance(0, n, classes)


# ------------------------------------------------------------------------------------------- what can be trusted


def test_auroc_by_hand() -> None:
    right = np.array([True, True, False, False])
    assert auroc(np.array([0.9, 0.8, 0.7, 0.6]), right) == 1.0
    assert auroc(np.array([0.1, 0.2, 0.7, 0.6]), right) == 0.0
    # pairs (right, wrong): .9>.8 1, .9>.5 1, .7<.8 0, .7>.5 1
    assert auroc(np.array([0.9, 0.7, 0.8, 0.5]), right) == 0.75
    # the tie counts half: .9>.7 1, .9>.5 1, .7=.7 ½, .7>.5 1
    assert auroc(np.array([0.9, 0.7, 0.7, 0.5]), right) == 3.5 / 4
    assert auroc(np.full(4, 0.3), right) == 0.5


def test_auroc_is_not_defined_where_nothing_is_wrong_or_nothing_right() -> None:
    assert auroc(np.array([0.9, 0.8]), np.array([True, True])) is None
    assert auroc(np.array([0.9, 0.8]), np.array([False, False])) is None
    assert auroc(np.array([]), np.array([], dtype=bool)) is None


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_auroc_is_the_share_of_pairs_that_are_in_order(answers: list[tuple[int, bool]]) -> None:
    confidence, right = np.array([a for a, _ in answers]) / 5, np.array([b for _, b in answers])
    pairs = [(a, b) for a in confidence[right] for b in confidence[~right]]
    expected = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs) if pairs else None
    found = auroc(confidence, right)
    assert (found is None) == (expected is None) and (found is None or found == pytest.approx(expected, abs=1e-12))


def test_holm_by_hand() -> None:
    # 3 tests, then 2, then 1: .01·3, .04·2 and .03·2 (sorted .01, .03, .04: .03, .06, max(.06, .04))
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_its_stepping_down_rejects(p: list[float]) -> None:
    rejected, left = set(), sorted(range(len(p)), key=lambda place: p[place])
    while left and p[left[0]] * len(left) < 0.05:
        rejected.add(left.pop(0))
    assert {place for place, one in enumerate(holm(p)) if one < 0.05} == rejected


@settings(deadline=None)
@given(st.lists(st.integers(-3, 3), max_size=9))
def test_the_paired_test_counts_all_tosses_of_the_signs(changes: list[int]) -> None:
    sums = [
        sum(s * abs(c) for s, c in zip(signs, changes, strict=True)) for signs in product((-1, 1), repeat=len(changes))
    ]
    expected = sum(abs(one) >= abs(sum(changes)) for one in sums) / len(sums)
    assert paired_test(np.array(changes, dtype=int)) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 5))
def test_the_paired_test_of_single_cells_is_mcnemars(lost: int, gained: int, same: int) -> None:
    changes = np.array([-1] * lost + [1] * gained + [0] * same, dtype=int)
    assert paired_test(changes) == mcnemar(lost, gained)


def test_the_paired_test_of_many_images_is_near_the_normal_one() -> None:
    changes = np.random.default_rng(0).choice([-2, -1, 0, 1, 2], 40_000, p=[0.1, 0.15, 0.5, 0.15, 0.1])
    z = (abs(changes.sum()) - 1) / sqrt(np.square(changes).sum())
    assert paired_test(changes) == pytest.approx(2 * norm.sf(z), abs=1e-4)  # sums lie 2 apart: half of it is taken off


def test_an_interval_of_single_answers_is_wilsons() -> None:
    for right, n in ((3, 10), (0, 7), (7, 7), (450, 901)):
        expected = binomtest(right, n).proportion_ci(0.95, method="wilson")
        found = interval(np.arange(n) < right, np.arange(n))
        assert found == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_answers_that_always_go_together_count_once() -> None:
    right = np.random.default_rng(0).random(40) < 0.7
    once = interval(right, np.arange(40))
    assert interval(np.repeat(right, 15), np.repeat(np.arange(40), 15)) == pytest.approx(once, abs=1e-12)
    assert interval(np.ones(30, dtype=bool), np.repeat(np.arange(10), 3)) == pytest.approx(
        interval(np.ones(10, dtype=bool), np.arange(10)), abs=1e-12
    )
