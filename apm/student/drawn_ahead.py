"""The students' initial state, drawn in a thread while something else is done, such as loading a teacher."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from apm.student.config import APMConfig
from apm.student.model import draw_numbers, parameter_shapes


class DrawnAhead:
    """The parameters that `apm.student.model.draw_parameters` draws from a seed, begun before all sizes are known.

    One stream of numbers is laid out as parameters, so the sizes need not be known to draw it: those of `config` only
    say how many numbers are likely to be needed. What is missing is drawn when it is asked for.
    """

    def __init__(self, config: APMConfig, seed: int) -> None:
        """Begin; numpy draws without holding up other threads.

        Args:
            config: sizes, as far as they are known.
            seed: of the draw.
        """
        self._std = config.init_std
        self._generator = np.random.Generator(np.random.PCG64(seed))
        likely = sum(math.prod(shape) for shape in parameter_shapes(config).values())
        pool = ThreadPoolExecutor(1, thread_name_prefix="draw")
        self._drawn = pool.submit(draw_numbers, likely, self._std, self._generator)
        pool.shutdown(wait=False)

    def parameters(self, config: APMConfig) -> dict[str, Tensor]:
        """Name -> parameter, for these sizes and the same ``init_std``; may be called once."""
        numbers, shapes = self._drawn.result(), parameter_shapes(config)
        ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
        if (missing := int(ends[-1]) - len(numbers)) > 0:
            numbers = np.concatenate((numbers, draw_numbers(missing, self._std, self._generator)))
        parts = np.split(numbers, ends)  # and what was drawn too much
        return {
            name: torch.from_numpy(part).view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=False)
        }
