"""Work done in threads, a bounded number of items and bytes ahead of whoever takes the results, in their order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

HELD_BYTES = 512 << 20
"""Results that nobody has taken yet: no further work is begun while they hold more than this."""


def in_order(
    items: Iterable[T],
    work: Callable[[T], R],
    *,
    ahead: int,
    workers: int,
    size: Callable[[R], int],
    most_bytes: int = HELD_BYTES,
) -> Generator[R, None, None]:
    """Yield ``work(item)`` of every item, in their order. What `work` raises is raised in its place.

    Args:
        items: drawn from as results are taken.
        work: called in a thread.
        ahead: how many items are begun before the result that is taken next.
        workers: number of threads.
        size: bytes that a result holds.
        most_bytes: see `HELD_BYTES`; each thread may go beyond it by one result.
    """
    gate = threading.Condition()
    held, taken = 0, 0
    sizes: dict[int, int] = {}

    def begin(number: int, item: T) -> R:
        nonlocal held
        with gate:  # the next to be taken always passes: nothing waits for a result that waits itself
            gate.wait_for(lambda: held < most_bytes or number == taken or closed)
        result = work(item)
        with gate:
            sizes[number] = size(result)
            held += sizes[number]
        return result

    waiting: deque[Future[R]] = deque()
    closed = False
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        try:
            numbered = enumerate(items)
            while True:
                while len(waiting) <= ahead and (one := next(numbered, None)) is not None:
                    waiting.append(pool.submit(begin, *one))
                if not waiting:
                    return
                result = waiting.popleft().result()
                with gate:
                    held -= sizes.pop(taken)
                    taken += 1
                    gate.notify_all()
                yield result
        finally:
            for future in waiting:
                future.cancel()
            with gate:
                closed = True
                gate.notify_all()
