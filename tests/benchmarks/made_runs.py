"""Small stand-ins for runs: generated images, a teacher without weights, methods without arithmetic worth the name."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from apm.benchmarks.datasets import Dataset, Sample
from apm.benchmarks.methods.base import Batch, Method, Prediction
from apm.benchmarks.runs.run_record import RunOptions
from apm.benchmarks.runs.runner import Summary, run
from apm.errors import ImageError
from tests.fakes import FakeTeacher

CLASSES = ("cat", "dog", "newt")


def picture(number: int, *, seconds: float = 0.0) -> Image.Image:
    time.sleep(seconds)
    pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def broken() -> Image.Image:
    raise ImageError("the file is cut off")


def make_dataset(
    n: int = 12, *, name: str = "digits", bad: Sequence[int] = (), seconds: float = 0.0, **changes: Any
) -> Dataset:
    """Return n generated images of three classes; those numbered in `bad` cannot be decoded."""
    loads: list[Callable[[], Image.Image]] = [
        broken if i in bad else partial(picture, i, seconds=seconds) for i in range(n)
    ]
    samples = [Sample(f"{CLASSES[i % 3]}/{i:03d}.png", i % 3, load) for i, load in enumerate(loads)]
    dataset = Dataset(
        name=name,
        samples=samples,
        class_names=CLASSES,
        templates=("a photo of a {}.",),
        prompts_name="single",
        layout="generated",
        source="a test",
        split="test",
        fingerprint=hashlib.sha256(f"{name}{n}".encode()).hexdigest(),
        notes=(),
        total=n,
    )
    return replace(dataset, **changes)


class Plain:
    """Episodic: the teacher's logits, turned a little by a fixed matrix."""

    stream = False
    gradients = False

    def __init__(self, name: str = "plain", *, turn: float = 3.0, seconds: float = 0.0) -> None:
        self.name = name
        self.settings = {"turn": turn}
        self.seconds = seconds
        self.turn = torch.from_numpy(np.random.default_rng(1).standard_normal((3, 3)).astype(np.float32)) * turn
        self.images = 0

    def predict(self, batch: Batch) -> Prediction:
        time.sleep(self.seconds * len(batch))
        self.images += len(batch)
        logits = batch.head.logits(batch.tokens())
        moved = logits + logits @ self.turn
        steps = torch.stack([logits.flip(1), logits, moved], dim=1)  # (B, 3, C)
        numbers = torch.arange(len(batch), dtype=torch.float32)
        return Prediction(
            logits=moved,
            extras={"cosine": numbers * 0 + 0.5, "steps": numbers.long() * 0 + 2, "entropy": numbers * 0 + 0.25},
            step_logits=steps,
        )


class Stream:
    """Each answer depends on all images before it: on their mean logits, and on how many they were."""

    name = "stream"
    stream = True
    gradients = False

    def __init__(self) -> None:
        self.settings = {"weight": 5.0}
        self.reset()

    def reset(self) -> None:
        self.seen: list[Tensor] = []

    def predict(self, batch: Batch) -> Prediction:
        rows = []
        for logits in batch.head.logits(batch.tokens()):
            self.seen.append(logits)
            rows.append(logits - 5 * torch.stack(self.seen).mean(0) + 0.01 * len(self.seen))
        return Prediction(logits=torch.stack(rows))


class Interrupting(Plain):
    """Stops as Ctrl-C would, after some images."""

    def __init__(self, after: int, error: BaseException | None = None) -> None:
        super().__init__()
        self.after = after
        self.error = error or KeyboardInterrupt()

    def predict(self, batch: Batch) -> Prediction:
        if self.images >= self.after:
            raise self.error
        return super().predict(batch)


def make_run(
    path: Path,
    methods: Sequence[Method] | None = None,
    dataset: Dataset | Sequence[Dataset] | None = None,
    **options: Any,
) -> Summary:
    """Run in one process on a generated data set."""
    notes = options.pop("notes", [])
    datasets = [dataset or make_dataset()] if dataset is None or isinstance(dataset, Dataset) else list(dataset)
    group = {"group": options.pop("group")} if "group" in options else {}
    return run(
        path,
        [partial(lambda one: one, one) for one in datasets],
        methods if methods is not None else [Plain()],
        FakeTeacher(),
        RunOptions(**{"batch_size": 4, "workers": 2, **options}),
        on_note=notes.append,
        on_failure=notes.append,
        **group,
    )
