"""The processes that share one run: alone, or started by ``torchrun`` on one machine or many.

Processes exchange next to nothing: at the start, whether the run may begin; at the end, that all are done. Rows go to
the run folder, which all of them must see.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from apm.errors import ApmError

if TYPE_CHECKING:
    from torch.distributed import Store

# One process may still be adapting, hours after another has done its part.
_PATIENCE = timedelta(days=30)
_JOINING = timedelta(minutes=15)  # for a process that is still importing, on a busy machine


@dataclass(frozen=True)
class Group:
    """This process's place among those of the run."""

    rank: int = 0
    world: int = 1
    store: Store | None = None
    """What all processes share, where there are several."""

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

    def claim(self, name: str) -> int:
        """Take the next number of the count called `name`: 0, 1, 2 …, each given to one of the processes only."""
        assert self.store is not None
        return int(self.store.add(f"claimed/{name}", 1)) - 1

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


def on_many_machines() -> bool:
    """Whether several launchers take part."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1


@contextmanager
def join() -> Iterator[Group]:
    """Join the processes that ``torchrun`` started; `ALONE` when it did not, or started one only."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    end_with_launcher()  # first, so that it is noticed while the rest is imported, too
    from torch import distributed

    store, rank, world = next(distributed.rendezvous("env://", timeout=_JOINING))
    attempt = distributed.PrefixStore(f"apm/{agree(store, rank, world)}", store)
    distributed.init_process_group("gloo", store=attempt, rank=rank, world_size=world, timeout=_PATIENCE)
    try:
        yield Group(rank, world, attempt)
    finally:
        distributed.destroy_process_group()


def end_with_launcher() -> None:
    """End this process soon after the one that started it has ended: a killed launcher leaves no orphans at work.

    What was written is whole, what was not is lost, as in any kill. Nobody would read an orphan's answers: the run is
    continued by whoever starts it again.
    """
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        os.write(2, b"The launcher has ended: this process ends too.\n")
        os._exit(1)  # the main thread may wait for ever for processes that are dead

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def agree(store: Store, rank: int, world: int) -> str:
    """Agree on a name for this attempt that no earlier one has had.

    The launcher's store may outlive its workers: after a restart it still holds the addresses of the dead, and who
    reads those waits for ever. Nor is the count of restarts a name, since on many machines the launchers count by
    themselves. So the first process answers each greeting that it finds, also those of the dead, with a name of its
    own making, until every other process has confirmed that name.

    Args:
        store: shared by all processes of this attempt, and perhaps by those of earlier ones.
        rank: of this process.
        world: number of processes.

    Raises:
        ApmError: a process did not come.
    """
    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"apm/greeting/{rank}", name)
        store.wait([f"apm/answer/{name}"], _JOINING)
        attempt = str(store.get(f"apm/answer/{name}").decode())
        store.set(f"apm/confirmed/{attempt}/{rank}", "yes")
        return attempt
    missing, answered = set(range(1, world)), set()
    deadline = time.monotonic() + _JOINING.total_seconds()
    while missing := {other for other in missing if not store.check([f"apm/confirmed/{name}/{other}"])}:
        for other in missing:
            if store.check([f"apm/greeting/{other}"]):
                greeting = store.get(f"apm/greeting/{other}").decode()
                if greeting not in answered:
                    store.set(f"apm/answer/{greeting}", name)
                    answered.add(greeting)
        if time.monotonic() > deadline:
            raise ApmError(f"Processes {sorted(missing)} of the run did not join within {_JOINING}.")
        time.sleep(0.01)
    return name
