"""Work in threads ahead of whoever takes the results."""

from __future__ import annotations

import threading
import time

import pytest

from apm.images.ahead import in_order


def test_results_come_in_order_and_errors_in_their_places() -> None:
    def work(number: int) -> int:
        time.sleep(0.01 * (number % 3 == 0))
        if number == 5:
            raise ValueError("five")
        return number * number

    results = in_order(range(9), work, ahead=4, workers=3, size=lambda _: 1)
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    with pytest.raises(ValueError, match="five"):
        next(results)


@pytest.mark.parametrize("workers", [1, 3])
def test_work_stops_while_results_hold_too_many_bytes(workers: int) -> None:
    done: list[int] = []

    def work(number: int) -> bytes:
        done.append(number)
        return b"x" * 10

    results = in_order(range(40), work, ahead=30, workers=workers, size=len, most_bytes=50)
    for taken in range(40):
        assert len(next(results)) == 10
        time.sleep(0.005)
        # Five are held, and each thread may have begun one more.
        assert len(done) - (taken + 1) <= 5 + workers
    assert sorted(done) == list(range(40))
    assert max(done[:6]) < 6 + workers


def test_one_result_larger_than_the_bound_passes() -> None:
    assert list(in_order(range(5), lambda _: b"x" * 99, ahead=3, workers=2, size=len, most_bytes=1)) == [b"x" * 99] * 5


def test_whoever_stops_early_leaves_no_thread() -> None:
    results = in_order(range(1000), lambda number: number, ahead=20, workers=4, size=lambda _: 10, most_bytes=5)
    assert next(results) == 0
    results.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]
