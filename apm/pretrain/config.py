"""Settings of a training on images, and what depends only on them: split, order, locations, learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from apm.errors import UsageError
from apm.settings import at_least, between, check_values, not_negative, positive, setting, share_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How to train a network on images. Every value affects the weights: checkpoints are continued with the same ones.

    Raises:
        UsageError: a value that cannot work.
    """

    steps: int = setting(3000, "Optimiser steps.", check=at_least(1))
    batch_size: int = setting(32, "Images per step, over all processes.", check=at_least(1))
    lr: float = setting(2e-3, "Peak learning rate of AdamW.", check=positive)
    warmup: int = setting(100, "Warm-up steps until the peak learning rate.", check=at_least(0))
    weight_decay: float = setting(
        0.01, "AdamW's weight decay, applied to weights but not to biases.", check=not_negative
    )
    clip: float = setting(1.0, "Largest norm of the gradient.", check=positive, option=False)
    held_out: float = setting(0.05, "Share of the images held out for evaluation.", check=share_of("the images"))
    seed: int = setting(0, "Seed of weights, split and order.", check=between(0, 2**63 - 1))

    def __post_init__(self) -> None:
        """Check each value."""
        check_values(self)

    def learning_rate(self, step: int) -> float:
        """Rate of step 0, 1, ...: linear warm-up, then a cosine that would reach zero at step `steps`."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))

    def split(self, images: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Numbers of the images to train on and of the held-out ones; at least one of each."""
        import numpy as np

        order = np.random.default_rng([self.seed, 1]).permutation(images)
        count = min(max(1, round(self.held_out * images)), images - 1)
        return np.sort(order[count:]), np.sort(order[:count])

    def batch(self, train: NDArray[np.int64], step: int) -> NDArray[np.int64]:
        """Numbers of the images of one step: each pass over `train` in its own order, passes joined without gaps."""
        import numpy as np

        size = min(self.batch_size, len(train))
        places = np.arange(step * size, (step + 1) * size)
        orders = {
            epoch: np.random.default_rng([self.seed, 2, epoch]).permutation(train)
            for epoch in map(int, np.unique(places // len(train)))
        }
        return np.array([orders[int(place // len(train))][place % len(train)] for place in places])


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(Schedule):
    """How to train a student against grids, colours, or both.

    Raises:
        UsageError: a value that cannot work.
    """

    locations: int | None = setting(
        None, "Number of random locations per step.", default_words="all", check=at_least(1)
    )
    rgb_weight: float = setting(1.0, "Weight of the colour loss, relative to 1 for the grid's.", check=not_negative)
    grey_input: bool = setting(False, "The student sees the images in grey and learns their colours.")

    def __post_init__(self) -> None:
        """Check each value, and that colours are learned where the input has none."""
        super().__post_init__()
        if self.grey_input and not self.rgb_weight:
            raise UsageError("Grey input is for learning colours: rgb_weight must be above 0, not 0.")

    def places(self, cells: int, step: int) -> NDArray[np.int64]:
        """Numbers of the grid's cells that one step trains at, the same for all its images; in reading order."""
        import numpy as np

        if self.locations is None or self.locations >= cells:
            return np.arange(cells)
        return np.sort(np.random.default_rng([self.seed, 3, step]).choice(cells, self.locations, replace=False))
