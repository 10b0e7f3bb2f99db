"""How long each method takes, when several share what is expensive."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from apm.student.cells import Cells
from apm.teachers.base import Teacher
from apm.test_time.views import MIN_AREA
from apm.text.zeroshot import ZeroShotHead

from ..methods.base import Batch, KnownViews

T = TypeVar("T")


class TimedBatch(Batch):
    """A batch that keeps account of the time spent on its shared parts.

    Teacher tokens, views and the students' inputs are computed once, for the first method that asks. Each method that
    uses them is charged for them in full, so that its images per second are those of a run with this method alone.
    """

    def __init__(
        self,
        ids: Sequence[str],
        images: Sequence[Image.Image] | Callable[[], Sequence[Image.Image]],
        teacher: Teacher,
        head: ZeroShotHead,
        *,
        seed: int = 0,
        stream_length: int | None = None,
        known: KnownViews | None = None,
    ) -> None:
        super().__init__(ids, images, teacher, head, seed=seed, stream_length=stream_length, known=known)
        self._cost: dict[Hashable, float] = {}  # seconds spent on each shared part
        self._used: dict[Hashable, float] = {}  # share of each part that the method being measured uses
        self._inside = 0.0  # seconds that the method being measured has spent inside of shared parts

    def measure(self, work: Callable[[], T]) -> tuple[T, float, float]:
        """Run one method's work.

        Returns:
            Its result, the seconds it took without shared parts, and the seconds that the shared parts it uses cost
            when they were computed.
        """
        self._inside, self._used = 0.0, {}
        begun = time.perf_counter()
        result = work()
        self._synchronize()
        own = time.perf_counter() - begun - self._inside
        shared = sum(self._cost[part] * share for part, share in self._used.items())
        return result, max(own, 0.0), shared

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """As `Batch.images`; decoding is nobody's cost."""
        with self._charged("images", 0.0):
            return super().images

    def tokens(self) -> Tensor:
        """As `Batch.tokens`."""
        with self._charged("tokens", 1.0):
            return super().tokens()

    def views(self, count: int, *, min_area: float = MIN_AREA) -> Tensor:
        """As `Batch.views`; of views made for a method that wanted more, this many are charged."""
        self.tokens()
        policy = (min_area, self.augmix)
        part = f"views {policy}"
        with self._charged(part, 0.0):
            found = super().views(count, min_area=min_area)
        made = self._views[policy].shape[1] if policy in self._views else 1  # view 0 is the token
        self._used[part] = max(self._used[part], (count - 1) / max(made - 1, 1))
        return found

    def student_images(self, size: int) -> Tensor:
        """As `Batch.student_images`."""
        with self._charged(f"student {size}", 1.0):
            return super().student_images(size)

    def grids(self) -> Tensor:
        """As `Batch.grids`."""
        with self._charged("grids", 1.0):
            return super().grids()

    def view_cells(self, views: int | str, side: int) -> Cells:
        """As `Batch.view_cells`."""
        with self._charged(f"grid views {views}, {side}", 1.0):
            return super().view_cells(views, side)

    @contextmanager
    def _charged(self, part: Hashable, share: float) -> Iterator[None]:
        """Put the seconds of the body on the account of `part`, and mark it as used.

        Nested parts are not counted twice.
        """
        self._synchronize()
        inside_before, begun = self._inside, time.perf_counter()
        yield
        self._synchronize()
        elapsed = time.perf_counter() - begun
        nested = self._inside - inside_before
        self._cost[part] = self._cost.get(part, 0.0) + elapsed - nested
        self._inside = inside_before + elapsed
        self._used[part] = max(self._used.get(part, 0.0), share)

    def _synchronize(self) -> None:
        if self.teacher.device.type == "cuda":
            torch.cuda.synchronize(self.teacher.device)
