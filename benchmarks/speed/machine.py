"""What the machine itself can do: the rates of its matrix products and of its memory, and the floor they set."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apm.student.config import APMConfig
from apm.student.matmul import product

from .profile import ADAM_BYTES, middle_flops, trained_parameters
from .timing import Work

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def rate_probe(config: APMConfig, precision: str, batch: int, device: torch.device) -> tuple[Work, int]:
    """The two large products of a forward pass (layers 2 and 3), bare and into memory that is there already.

    Returns:
        What to time, and its number of floating-point operations.
    """
    numbers = partial(_random, batch, DTYPES[precision], device)
    (h1, h2, h3), n = config.hidden, config.cells
    jobs = [(numbers(n, i), numbers(i, o), numbers(n, o)) for i, o in ((h1, h2), (h2, h3))]
    return partial(_multiply, jobs), batch * middle_flops(config) // 3


def six_products(
    config: APMConfig, precision: str, batch: int, device: torch.device, *, queries: int | None = None
) -> Work:
    """All six large products of a step, laid out in memory as the engine has them: the floor as its own code meets it.

    Forward, weight gradient and input gradient of layers 2 and 3, at so many locations (None: all); weights are stored
    (outputs, inputs).
    """
    numbers = partial(_random, batch, DTYPES[precision], device)
    (h1, h2, h3), n = config.hidden, queries or config.cells
    jobs = []
    for inputs, outputs in ((h1, h2), (h2, h3)):
        x, d, weight = numbers(n, inputs), numbers(n, outputs), numbers(outputs, inputs)
        turned = d.mT.contiguous() if device.type == "cpu" and precision == "bf16" else d.mT
        jobs += [(x, weight.mT, d.clone()), (turned, x, weight.clone()), (d, weight, x.clone())]
    return partial(_multiply, jobs)


def first_layer(config: APMConfig, device: torch.device) -> Work:
    """All products of the first layer, in its cheap form, of one student: the same at any number of locations."""
    numbers = partial(_random, 1, torch.float32, device)
    h1, half, grid = config.hidden[0], config.position_dim // 2, config.grid
    weight = numbers(h1, config.cells + 2 * half)
    gradient, jobs = weight.clone(), []
    for rows, start, width in ((1, 0, config.cells), *((grid, config.cells + side, half) for side in (0, half))):
        x, d, part = numbers(rows, width), numbers(rows, h1), slice(start, start + width)
        jobs.append((d.mT, x, gradient[..., part]))
        if start:
            jobs.append((weight[..., part], x.mT, d.mT.clone()))
        else:  # the column's gradient leads on to the filter's
            jobs += [(x, weight[..., part].mT, d.clone()), (d, weight[..., part], x.clone())]
    return partial(_multiply, jobs)


def _multiply(jobs: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    for a, b, out in jobs:
        product(a, b, out=out)


def _random(batch: int, dtype: torch.dtype, device: torch.device, rows: int, cols: int) -> Tensor:
    """Numbers as products of real layers meet them: neither zero nor denormal."""
    generator = torch.Generator(device=device).manual_seed(0)
    return torch.randn(batch, rows, cols, generator=generator, device=device).to(dtype)


def stream_probe(config: APMConfig, batch: int, device: torch.device) -> tuple[Work, int]:
    """One array as large as a student's parameters, scaled in place.

    So are six of Adam's seven streams, a number read and written back; but there is next to nothing to compute.

    Returns:
        What to time, and the bytes that it reads and writes.
    """
    values = torch.ones(batch * trained_parameters(config), device=device)
    return partial(values.mul_, 1.0), 8 * len(values)


def floor(config: APMConfig, *, rate: Any, bandwidth: Any, queries: int | None = None) -> dict[str, Any]:
    """The minimum of seconds that one step of one student can take, at rates that are numbers or arrays of them.

    Returns:
        ``compute``, the two middle layers' operations, at ``queries`` locations or all, at ``rate`` operations a second
        (in the precision of the products); ``memory``, Adam's traffic at ``bandwidth`` bytes a second; ``seconds``, the
        larger of the two.
    """
    compute, memory = middle_flops(config, queries) / rate, ADAM_BYTES * trained_parameters(config) / bandwidth
    return {"compute": compute, "memory": memory, "seconds": np.maximum(compute, memory)}
