"""Which images are left to whom: the order of a cell's images, divided among methods and processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import pyarrow as pa

from apm.processes import Group

from ..methods.base import Method, Together


def stream_order(n: int, seed: int) -> list[int]:
    """The order in which the n images of a cell are gone through: a permutation drawn from PCG64(seed)."""
    return np.random.Generator(np.random.PCG64(seed)).permutation(n).tolist()


CHUNK = 16
"""Images of episodic methods that a process claims at a time."""


class Claimed:
    """Positions that processes claim in chunks as they come to them, so that none waits for a slower one.

    Args:
        left: the positions that have no answer yet.
        n: images of the cell.
        claim: the number of the next chunk, see `apm.processes.Group.claim`.
        world: number of processes.
    """

    def __init__(self, left: Sequence[int], n: int, claim: Callable[[], int], world: int) -> None:
        self.left, self.n, self.claim, self.world = left, n, claim, world

    def __len__(self) -> int:
        """How many this process may expect: a fair part."""
        return -(-len(self.left) // self.world)

    def __iter__(self) -> Iterator[int]:
        left = set(self.left)
        while (start := self.claim() * CHUNK) < self.n:
            yield from (position for position in range(start, min(start + CHUNK, self.n)) if position in left)


@dataclass
class WorkShare:
    """Methods that go through the same positions together."""

    methods: list[Method]
    positions: list[int] | Claimed
    replay: list[int]
    """Positions before these that stream methods have answered in an earlier session."""
    recorded: Mapping[str, set[int]]
    """By method, all positions with a row."""
    together: int | None = None
    """How many images the methods are to be given at a time; None: they do not care."""


def split_work(
    methods: Sequence[Method], rows: pa.Table, n: int, group: Group, *, name: str = "", spread: bool = False
) -> list[WorkShare]:
    """Divide what is left of a cell of n images into shares, from the rows that there are.

    Args:
        methods: of the run.
        rows: columns ``position`` and ``method`` of the cell.
        n: number of images.
        group: this process's place: it gets its share.
        name: of the cell in this session, by which its images are claimed.
        spread: whether stream methods go to different processes: worth it where none has to encode the images for them.
    """
    positions = rows["position"].to_numpy()
    names = rows["method"].to_numpy(zero_copy_only=False)
    done = {method.name: set(positions[names == method.name].tolist()) for method in methods}
    grouped = [method for method in methods if isinstance(method, Together)]
    others = [method for method in methods if method not in grouped]
    episodic = [method for method in others if not method.stream]
    stream = [method for method in others if method.stream]
    parts: list[tuple[list[Method], range]] = [(others, range(n))]
    claimed = False
    if group.world > 1 or len({frozenset(done[method.name]) for method in others}) > 1:
        mine = stream[group.rank :: group.world] if spread else stream if group.first else []
        # Where each process has streams of its own to answer, some are done long before others
        claimed = spread and bool(stream) and group.world > 1
        part = range(n) if claimed else range(group.rank, n, group.world)
        parts = [(mine, range(n) if mine else range(0)), (episodic, part)]
    shares = []
    for members, part in parts:
        left = [position for position in part if any(position not in done[method.name] for method in members)]
        if not left:
            continue
        if claimed and members is episodic:
            shares.append(WorkShare(members, Claimed(left, n, partial(group.claim, name), group.world), [], done))
            continue
        replay: list[int] = []
        if any(method.stream for method in members):
            # Where a damaged shard was removed, rows after the gap are there: the stream passes them again.
            replay, left = list(range(left[0])), list(range(left[0], n))
        shares.append(WorkShare(members, left, replay, done))
    for method in grouped:  # whole batches, of which each process takes its part
        size = method.together
        batches = [range(start, min(start + size, n)) for start in range(0, n, size)][group.rank :: group.world]
        left = [place for batch in batches if not done[method.name].issuperset(batch) for place in batch]
        if left:
            shares.append(WorkShare([cast("Method", method)], left, [], done, size))
    return shares
