"""How the images of a cell are divided: whole batches for methods that answer a number of images together."""

from __future__ import annotations

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
        group: Any = SimpleNamespace(rank=rank, world=2, first=rank == 0)
        episodic, *streams = split_work(methods, rows(), 10, group, spread=spread)
        assert (episodic.methods, episodic.positions) == ([ONE], [*range(rank, 10, 2)])
        assert [[method.name for method in share.methods] for share in streams] == [mine[rank]] * bool(mine[rank])
        assert all(share.positions == [*range(10)] for share in streams)
