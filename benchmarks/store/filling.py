"""What one process does to fill a store: decode, make views, encode, write."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apm.errors import ApmError
from apm.images.ahead import in_order
from apm.processes import Group
from apm.teachers.base import Teacher
from apm.test_time.inputs import teacher_tokens
from apm.test_time.views import MIN_AREA, views

from ..methods.base import CHUNK, view_key
from ..runs.decoding import Unreadable, load
from ..runs.progress import Progress
from ..runs.run_record import FLUSH_SECONDS
from .layout import CellFolder, StoreKey
from .shards import BLOCK_BYTES, write_shard

if TYPE_CHECKING:
    from ..datasets import Dataset, Sample


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """How a store is filled."""

    views: int = 64
    """V, the image itself among them."""
    min_area: float = MIN_AREA
    seed: int = 0
    precision: str = "fp16"
    batch_size: int = 8
    workers: int = 4
    """Threads that decode images and make their views while the teacher computes."""
    flush_seconds: float = FLUSH_SECONDS
    command: tuple[str, ...] = ()


@dataclass
class Plan:
    """What is left to do; the same in every process."""

    digests: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """By cell, the numbers in the store of the data set's samples, in their order."""
    missing: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """By cell, those of them that are to be encoded."""


@dataclass(frozen=True)
class _Prepared:
    """An image as the teacher takes it."""

    number: int
    pixels: Tensor | None
    """(V, 3, H, W) of its views; None where it cannot be decoded."""
    error: str | None = None


class Filling:
    """What one process encodes."""

    def __init__(
        self,
        path: Path,
        key: StoreKey,
        teacher: Teacher,
        options: EncodeOptions,
        group: Group,
        plan: Plan,
        on_progress: Callable[[Progress], None],
        on_failure: Callable[[str], None],
    ) -> None:
        self.path, self.key, self.teacher, self.options = path, key, teacher, options
        self.group, self.plan, self.on_progress, self.on_failure = group, plan, on_progress, on_failure
        self.left = sum(len(self._mine(cell)) for cell in plan.missing)
        self.done, self.seconds = 0, 0.0

    def fill(self, number: int, cell: str, open_cell: Callable[[], Dataset]) -> None:
        """Encode this process's share of a cell."""
        mine = self._mine(cell)
        if not len(mine):
            return
        samples = dict(zip(self.plan.numbers[cell].tolist(), open_cell().samples, strict=True))
        buffer = _Buffer(CellFolder.of(self.path, cell).path, self.plan.digests[cell], self.key)
        prepared = self._prepared((number, samples[number]) for number in mine.tolist())
        done, wanted = 0, 1
        try:
            while True:
                begun = time.monotonic()
                items = list(itertools.islice(prepared, wanted))
                if not items:
                    break
                buffer.add(items, *self._features(items, samples), begun)
                for item in items:
                    if item.error is not None:
                        self.on_failure(f"{cell}: {samples[item.number].id}: {item.error}")
                took = time.monotonic() - begun
                if buffer.since_first() + took >= self.options.flush_seconds or buffer.full:
                    buffer.flush()
                done, self.done, self.left = done + len(items), self.done + len(items), self.left - len(items)
                self.seconds += took
                rate = self.done / max(self.seconds, 1e-9)
                cells = len(self.plan.missing)
                self.on_progress(Progress(cell, number + 1, cells, done, len(mine), {}, rate, self.left / rate))
                fitting = int(self.options.flush_seconds / 2 / max(took / len(items), 1e-9))
                wanted = max(1, min(self.options.batch_size, fitting))
        finally:
            prepared.close()
            buffer.flush()

    def _mine(self, cell: str) -> NDArray[np.int64]:
        return self.plan.missing[cell][self.group.rank :: self.group.world]

    def _prepared(self, todo: Iterable[tuple[int, Sample]]) -> Generator[_Prepared, None, None]:
        """Decode images and make their views, in threads."""
        workers = self.options.workers
        return in_order(todo, self._prepare, ahead=self.options.batch_size + workers, workers=workers, size=_bytes)

    def _prepare(self, item: tuple[int, Sample]) -> _Prepared:
        found = load(item)
        if isinstance(found, Unreadable):
            return _Prepared(found.position, None, found.error)
        assert found.image is not None
        made = views(
            found.image,
            self.key.views,
            self.teacher,
            seed=self.key.seed,
            sample_id=view_key(found.sample.id),
            min_area=self.key.min_area,
        )
        return _Prepared(found.position, made)

    def _features(self, items: Sequence[_Prepared], samples: Mapping[int, Sample]) -> tuple[Tensor, Tensor]:
        """Tokens (B, D) and views (B, V − 1, D) of images, on the CPU in the store's precision."""
        tokens = torch.zeros(len(items), self.key.dim, dtype=self.key.dtype)
        others = torch.zeros(len(items), self.key.views - 1, self.key.dim, dtype=self.key.dtype)
        readable = [(place, item.pixels) for place, item in enumerate(items) if item.pixels is not None]
        if readable:
            first = teacher_tokens(self.teacher, torch.stack([pixels[0] for _, pixels in readable]), chunk=CHUNK)
            for (place, pixels), token in zip(readable, first, strict=True):
                tokens[place] = self._kept(token, samples[items[place].number])
                if self.key.views > 1:
                    parts = [self.teacher.encode_image(part) for part in pixels[1:].split(CHUNK)]
                    others[place] = self._kept(torch.cat(parts), samples[items[place].number])
        return tokens, others

    def _kept(self, features: Tensor, sample: Sample) -> Tensor:
        """Features in the store's precision."""
        kept = features.detach().cpu().to(self.key.dtype)
        if (kept.isinf() & features.detach().cpu().isfinite()).any():
            raise ApmError(
                f"{sample.id}: the teacher's values exceed float16, up to {float(features.abs().max()):.3g}. Use "
                "--precision fp32."
            )
        return kept


class _Buffer:
    """Features on their way to the disk."""

    def __init__(self, folder: Path, cell: str, key: StoreKey) -> None:
        self.folder, self.cell, self.key = folder, cell, key
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._rows: list[int] = []
        self._errors: dict[int, str] = {}
        self._begun = 0.0

    def add(self, items: Sequence[_Prepared], tokens: Tensor, views: Tensor, begun: float) -> None:
        """Take the features of a batch begun at `begun`."""
        if not self._rows:
            self._begun = begun
        self._rows += [item.number for item in items]
        self._errors |= {item.number: item.error for item in items if item.error is not None}
        self._parts.append((tokens, views))

    @property
    def full(self) -> bool:
        """Whether there is enough for a shard."""
        return len(self._rows) * self.key.image_bytes >= BLOCK_BYTES

    def since_first(self) -> float:
        """Seconds since the first batch was begun."""
        return time.monotonic() - self._begun

    def flush(self) -> None:
        """Write what there is as one shard."""
        if self._rows:
            tokens, views = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
            write_shard(self.folder, self.cell, np.array(self._rows), tokens, views, self._errors)
            self._rows, self._parts, self._errors = [], [], {}


def _bytes(item: _Prepared) -> int:
    return 0 if item.pixels is None else item.pixels.nbytes
