"""How the images of a cell are divided: whole batches for methods that answer a number of images together."""

from __future__ import annotations

from itertools import count, islice
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from apm.benchmarks.runs.shares import split_work
from apm.processes import ALONE, Group

ONE: Any = SimpleNamespace(name="one", stream=False)
FOUR: Any = SimpleNamespace(name="four", stream=True, together=4)


def rows(*answered: tuple[str, range]) -> pa.Table:
    pairs = [(position, name) for name, positions in answered for position in positions]
    return pa.table(
        {
            "position": pa.array([place for place, _ in pairs], pa.int32()),
            "method": pa.array([name for _, name in pairs], pa.string()),
        }
    )


def test_a_method_of_batches_has_a_lane_of_its_own() -> None:
    first, second = split_work([ONE, FOUR], rows(), 10, ALONE)
    assert (first.methods, first.positions, first.together) == ([ONE], [*range(10)], None)
    assert (second.methods, second.positions, second.together, second.replay) == ([FOUR], [*range(10)], 4, [])


def test_a_batch_of_which_a_part_is_missing_is_answered_whole() -> None:
    (share,) = split_work([FOUR], rows(("four", range(6))), 10, ALONE)
    assert share.positions == [*range(4, 10)]
    assert share.recorded["four"] == {*range(6)}
    assert split_work([FOUR], rows(("four", range(10))), 10, ALONE) == []


@pytest.mark.parametrize(("rank", "positions"), [(0, [0, 1, 2, 3, 8, 9]), (1, [4, 5, 6, 7])])
def test_processes_take_whole_batches(rank: int, positions: list[int]) -> None:
    group: Any = SimpleNamespace(rank=rank, world=2, first=rank == 0)
    (share,) = split_work([FOUR], rows(), 10, group)
    assert share.positions == positions
    assert isinstance(ALONE, Group)


@pytest.mark.parametrize(("spread", "mine"), [(False, [["two", "three"], []]), (True, [["two"], ["three"]])])
def test_streams_are_one_process_s_unless_all_have_the_features(spread: bool, mine: list[list[str]]) -> None:
    methods = [ONE, SimpleNamespace(name="two", stream=True), SimpleNamespace(name="three", stream=True)]
    for rank in (0, 1):
        group = Group(rank, 2)
        *streams, episodic = split_work(methods, rows(), 10, group, spread=spread)
        assert episodic.methods == [ONE] and len(episodic.positions) == 5
        assert spread or episodic.positions == [*range(rank, 10, 2)]
        assert [[method.name for method in share.methods] for share in streams] == [mine[rank]] * bool(mine[rank])
        assert all(share.positions == [*range(10)] for share in streams)


def test_beside_spread_streams_episodic_images_are_claimed_by_whoever_is_free() -> None:
    """Two processes in turn, one three times as fast: each image is one's, those with an answer are nobody's."""
    counts = count()
    store: Any = SimpleNamespace(add=lambda name, one: next(counts) + one if name == "claimed/run/cell" else -1)
    methods, answered = [ONE, SimpleNamespace(name="stream", stream=True)], rows(("one", range(5, 40)))
    taken: dict[int, list[int]] = {0: [], 1: []}
    slow, fast = (
        iter(split_work(methods, answered, 200, Group(rank, 2, store), name="run/cell", spread=True)[-1].positions)
        for rank in taken
    )
    for _ in range(60):
        taken[0] += islice(slow, 1)
        taken[1] += islice(fast, 3)
    assert sorted(taken[0] + taken[1]) == [*range(5), *range(40, 200)]
    assert 2 * len(taken[0]) < len(taken[1])
