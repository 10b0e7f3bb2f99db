"""What each method is charged for, on a clock that moves only when something is computed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from PIL import Image
from torch import Tensor

from apm.benchmarks.runs import timed_batch as clock
from apm.benchmarks.runs.timed_batch import TimedBatch
from apm.text.zeroshot import ZeroShotHead
from tests.fakes import FakeTeacher


class Time:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class SlowTeacher(FakeTeacher):
    """An image takes a second."""

    def __init__(self, time: Time) -> None:
        super().__init__()
        self.time = time

    def encode_image(self, pixels: Tensor) -> Tensor:
        self.time.now += len(pixels)
        return super().encode_image(pixels)

    def encode_grid(self, image: Image.Image, *, size: int | None = None) -> Tensor:
        self.time.now += 3
        return super().encode_grid(image, size=size)


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Iterator[Time]:
    time = Time()
    monkeypatch.setattr(clock, "time", time)
    yield time


def test_shared_parts_are_computed_once_and_charged_to_all_who_use_them(time: Time) -> None:
    teacher = SlowTeacher(time)
    head = ZeroShotHead.build(teacher, ("cat", "dog"), ("{}",))
    batch = TimedBatch(("a", "b"), (Image.new("RGB", (40, 40)),) * 2, teacher, head)

    def work(seconds: float, views: int) -> str:
        batch.tokens()
        if views:
            batch.views(views)
        time.now += seconds
        batch.tokens()
        return "done"

    assert batch.measure(lambda: work(0.5, 0)) == ("done", 0.5, 2.0)  # two tokens
    assert batch.measure(lambda: work(0.25, 0)) == ("done", 0.25, 2.0)  # had already: charged all the same
    assert batch.measure(lambda: work(4.0, 11)) == ("done", 4.0, 22.0)  # and ten more views of each of the two
    assert batch.measure(lambda: work(4.0, 6)) == ("done", 4.0, 12.0)  # five of these views
    assert batch.measure(lambda: work(0.0, 0)) == ("done", 0.0, 2.0)
    assert batch.measure(lambda: work(1.0, 21)) == ("done", 1.0, 42.0)
    assert teacher.image_calls == 2 * 21
    for _ in range(2):
        assert batch.measure(lambda: len(batch.grids())) == (2, 0.0, 6.0)


def test_a_clocked_batch_answers_as_a_plain_one(time: Time) -> None:
    teacher = SlowTeacher(time)
    head = ZeroShotHead.build(teacher, ("cat", "dog"), ("{}",))
    images = (Image.effect_noise((40, 40), 80).convert("RGB"),)
    one = TimedBatch(("a",), images, teacher, head, seed=3)
    plain = clock.Batch(("a",), images, teacher, head, seed=3)
    torch.testing.assert_close(one.tokens(), plain.tokens())
    torch.testing.assert_close(one.views(5), plain.views(5))
    torch.testing.assert_close(one.student_images(28), plain.student_images(28))
    torch.testing.assert_close(one.grids(), plain.grids())
