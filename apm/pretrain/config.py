"""Settings of a training on images, and what follows from them alone: split, order, locations, learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from apm.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How to train a network on images. Every value decides the weights: a checkpoint is continued with the same ones.

    Raises:
        UsageError: a value that cannot work.
    """

    steps: int = 3000  # optimiser steps
    batch_size: int = 32  # images a step, over all processes
    lr: float = 2e-3  # of AdamW at its highest: it rises over `warmup` steps and falls along a cosine to zero
    warmup: int = 100  # steps
    weight_decay: float = 0.01  # of AdamW, on weights but not on biases
    clip: float = 1.0  # largest norm of the gradient
    held_out: float = 0.05  # share of the images that is never trained on
    seed: int = 0  # of weights, split and order

    def __post_init__(self) -> None:
        """Check each value."""
        if self.steps < 1 or self.batch_size < 1 or self.warmup < 0:
            raise UsageError(f"Steps and batch size must be 1 or more, warm-up 0 or more: {self}.")
        self._check_numbers(positive=("lr", "clip"), not_negative=("weight_decay",))
        if not 0 < self.held_out < 1:
            raise UsageError(f"held_out is a share of the images, above 0 and below 1, not {self.held_out}.")

    def learning_rate(self, step: int) -> float:
        """Rate of step 0, 1, ...: linear warm-up, then a cosine that would reach zero at step `steps`."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))

    def split(self, images: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Numbers of the images to train on and of the held-out ones; at least one of each."""
        order = np.random.default_rng([self.seed, 1]).permutation(images)
        count = min(max(1, round(self.held_out * images)), images - 1)
        return np.sort(order[count:]), np.sort(order[:count])

    def batch(self, train: NDArray[np.int64], step: int) -> NDArray[np.int64]:
        """Numbers of the images of one step: each pass over `train` in its own order, passes joined without gaps."""
        size = min(self.batch_size, len(train))
        places = np.arange(step * size, (step + 1) * size)
        orders = {
            epoch: np.random.default_rng([self.seed, 2, epoch]).permutation(train)
            for epoch in map(int, np.unique(places // len(train)))
        }
        return np.array([orders[int(place // len(train))][place % len(train)] for place in places])

    def _check_numbers(self, *, positive: tuple[str, ...] = (), not_negative: tuple[str, ...] = ()) -> None:
        for name in positive:
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise UsageError(f"{name} must be a positive number, not {getattr(self, name)}.")
        for name in not_negative:
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise UsageError(f"{name} must be 0 or a positive number, not {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(Schedule):
    """How to train a student against grids.

    Raises:
        UsageError: a value that cannot work.
    """

    locations: int | None = None  # drawn anew for each step and trained at; None: all of them
    rgb_weight: float = 1.0  # of the colours' loss, beside 1 for the grid's

    def __post_init__(self) -> None:
        """Check each value."""
        super().__post_init__()
        if self.locations is not None and self.locations < 1:
            raise UsageError(f"locations must be 1 or more, or None for all of them, not {self.locations}.")
        self._check_numbers(not_negative=("rgb_weight",))

    def places(self, cells: int, step: int) -> NDArray[np.int64]:
        """Numbers of the grid's cells that one step trains at, the same for all its images; in reading order."""
        if self.locations is None or self.locations >= cells:
            return np.arange(cells)
        return np.sort(np.random.default_rng([self.seed, 3, step]).choice(cells, self.locations, replace=False))
