"""The statistics of the tables, each against a value worked out by other means."""

from __future__ import annotations

from math import comb, sqrt

import numpy as np
import pytest

from apm.benchmarks.tables.stats import expected_calibration_error, mcnemar, near_chance, standard_error


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
