"""The processes that share one run: alone, or started by ``torchrun`` on one machine or many.

Processes exchange next to nothing: at the start, whether the run may begin; at the end, that all are done. Rows go to
the run folder, which all of them must see.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

# One process may still be adapting, hours after another has done its part.
_PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Group:
    """This process's place among those of the run."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes run.json and takes the lock."""
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """Give every process what the first one passes."""
        if self.world == 1:
            return value
        from torch import distributed

        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait until every process has come here."""
        if self.world > 1:
            from torch import distributed

            distributed.barrier()


ALONE = Group()


def local_rank() -> int:
    """The number of this process on its machine (0 outside of ``torchrun``): which GPU it takes."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def restarted() -> bool:
    """Whether ``torchrun`` has started this process anew after another died: it must continue, never start over."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def join() -> Iterator[Group]:
    """Join the processes that ``torchrun`` started; `ALONE` when it did not, or started one only."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    from torch import distributed

    distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Group(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
