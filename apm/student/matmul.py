"""Matrix products: batched so that no sample depends on another, in float32 or bfloat16, chosen by measurement.

float32 means torch's float32: on a GPU without TensorFloat-32, unless the caller has allowed that in torch itself.
"""

import time
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from apm.student.config import Precision

# bfloat16 must be this much faster before "auto" gives up float32's digits for it
WORTHWHILE = 1.3

# How often the measurement times each product, and how many seconds the largest ones may take together
REPEATS = 5
SECONDS = 0.1


def _one_by_one(a: Tensor) -> bool:
    """Whether the samples of ``a`` are multiplied one after the other (see `product`) or as one batch."""
    return a.device.type == "cpu"


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply the matrices of each sample: (B, ..., m, k) by (B, ..., k, n) -> (B, ..., m, n), into ``out`` if given.

    On a CPU one sample at a time: a batched product may split its work by the batch's size and then rounds differently,
    while one product alone fills the cores just as well. So an answer does not depend on its batch, bit for bit.
    """
    if not _one_by_one(a):
        return torch.matmul(a, b, out=out)
    if out is None and len(a) == 1:
        return torch.matmul(a[0], b[0])[None]  # nothing to copy together
    if out is None:
        return torch.stack([torch.matmul(x, y) for x, y in zip(a, b, strict=True)])
    for x, y, z in zip(a, b, out, strict=True):
        torch.matmul(x, y, out=z)
    return out


def affine(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """Apply each sample's own linear layer: (B, n, k), (B, m, k), (B, m) -> ``out`` (B, n, m)."""
    if not _one_by_one(x):
        return torch.baddbmm(bias[:, None], x, weight.mT, out=out)
    for i, w, b, o in zip(x, weight, bias, out, strict=True):
        torch.addmm(b, i, w.mT, out=o)
    return out


def accumulate(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Add the matrix products of each sample, (B, m, k) by (B, k, n), to ``out`` (B, m, n)."""
    if not _one_by_one(a):
        out.baddbmm_(a, b)
        return
    for x, y, z in zip(a, b, out, strict=True):
        z.addmm_(x, y)


def mean_of(x: Tensor) -> Tensor:
    """Mean of each sample: (B, ...) -> (B,)."""
    if not _one_by_one(x):
        return x.flatten(1).mean(dim=1)
    return torch.stack([y.mean() for y in x])


def mean_square(x: Tensor) -> Tensor:
    """Mean of the squares of each sample: (B, ...) -> (B,)."""
    return mean_of(x.square())


def mean_square_of_rows(x: Tensor) -> Tensor:
    """Mean of the squares of each row of each sample: (B, R, D) -> (B, R)."""
    if not _one_by_one(x):
        return x.square().mean(dim=2)
    return torch.stack([y.square().mean(dim=1) for y in x])


def relu_backward(gradient: Tensor, activation: Tensor) -> None:
    """Zero ``gradient`` in place wherever the ReLU's output ``activation`` (same shape) is zero: one pass, no mask."""
    torch.ops.aten.threshold_backward.grad_input(gradient, activation, 0.0, grad_input=gradient)


@cache
def bf16_gain(device: torch.device) -> float:
    """How many times as fast bfloat16's products are as float32's here; measured once a process, in about 0.1 s.

    By the clock and not by the processor's name: what counts is the kernel that this build of torch has for it. A
    processor without bfloat16 units emulates them hundreds of times slower, so the products start small and grow only
    while that may change the decision and there is time. On one thread: several wait for each other where other
    programs are at work, for longer than a product takes.
    """
    size, largest = 128, 512 if device.type == "cpu" else 4096
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        while True:
            fp32, bf16 = (_seconds_per_product(device, dtype, size) for dtype in (torch.float32, torch.bfloat16))
            hopeless, next_seconds = (
                bf16 > 10 * fp32,
                8 * REPEATS * (fp32 + bf16),
            )  # twice the size: eight times the work
            if size == largest or hopeless or next_seconds > SECONDS:
                return fp32 / bf16
            size *= 2
    finally:
        torch.set_num_threads(threads)


def measured_precision(device: torch.device) -> Literal["fp32", "bf16"]:
    """``bf16`` if its products are clearly faster than float32's here, else ``fp32``."""
    return "bf16" if bf16_gain(device) >= WORTHWHILE else "fp32"


def slowness(asked: Precision, device: torch.device) -> str | None:
    """Notice for a user who chose the slower precision on this machine; None if it is not slower."""
    if asked != "bf16" or (gain := bf16_gain(device)) >= 1:
        return None
    return (
        f"Products in bf16 are slower than in fp32 on this machine ({1 / gain:,.1f} times as long in a small test): "
        "--precision auto takes the faster."
    )


def _seconds_per_product(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Time the shortest of a few products of two square matrices."""
    a, b = torch.ones(2, size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)
    times = []
    for _ in range(REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
