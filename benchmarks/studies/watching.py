"""Students whose fields are kept at given steps or losses of their fit, to be read at any location.

`apm.test_time.island_fields` keeps fields at the student's own locations and at steps chosen in advance; studies that
read between these locations, or wait for a loss, use this. Steps are those of `apm.student.engine`, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from apm.student.cells import Cells
from apm.student.config import APMConfig
from apm.student.engine import Engine
from apm.student.field import SavedField
from apm.student.model import draw_parameters
from apm.student.position import dense_locations
from apm.test_time.island_fields import Inputs
from apm.test_time.options import AdaptConfig


@dataclass(frozen=True)
class Moment:
    """A student between two steps."""

    step: int
    """Steps made."""
    loss: float
    kept: SavedField

    def field(self, places: int, *, exact: bool = False) -> NDArray[np.floating]:
        """Read the field (places, places, D) at the middles of equal cells of the square; exact: in float64."""
        kept = self.kept.double() if exact else self.kept
        side = math.isqrt(kept.columns.shape[1])
        found: NDArray[np.floating] = kept.features(*dense_locations(side, places))[0].cpu().numpy()
        return found.reshape(places, places, -1)


class Watcher:
    """Fits a fresh student to one image after the other, all from the same first weights."""

    def __init__(self, model: APMConfig, adapt: AdaptConfig, *, device: str | torch.device = "cpu") -> None:
        """Draw the initial weights.

        Args:
            model: sizes of the student.
            adapt: most steps, learning rate, seed, what is distilled; every location is read at each step.
            device: where.
        """
        self.model, self.adapt, self.device = model, adapt, device
        self._initial = draw_parameters(model, np.random.Generator(np.random.PCG64(adapt.seed)))

    def __call__(self, inputs: Inputs, wanted: Callable[[int, float], bool]) -> Iterator[Moment]:
        """Fit, and yield the student whenever `wanted` says so of the steps made and the loss, until all are made."""
        pixels, token, grid = inputs
        by_grid = self.adapt.distil != "cls"
        engine = Engine(
            self.model,
            self._initial,
            lr=self.adapt.lr,
            seed=self.adapt.seed,
            distil=self.adapt.distil,
            agree=self.adapt.agree,
            view_cells=grid.features.shape[1] if by_grid and isinstance(grid, Cells) else None,
            device=self.device,
        )
        engine.load(pixels, token, grid if by_grid else None)
        for step in range(self.adapt.steps + 1):
            engine.evaluate()
            if wanted(step, loss := float(engine.loss)):
                yield Moment(step, loss, engine.fold(1))
            if step < self.adapt.steps:
                engine.backward()
                engine.update()
