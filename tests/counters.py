"""Counts instead of clocks: what tests use to see that something stays cheap on any machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Operations(TorchDispatchMode):
    """Tells of every operation: which one, and all tensors that it takes and makes."""

    def __init__(self, see: Callable[[Any, list[Tensor], list[Tensor]], object]) -> None:
        super().__init__()
        self.see = see

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        taken, made = ([x for x in tree_leaves(of) if isinstance(x, Tensor)] for of in ((args, kwargs), result))
        self.see(func, taken, made)
        return result


class Allocations(TorchDispatchMode):
    """Counts the tensors that operations make anew (views of what they were given are none), and their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.count = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        before = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **kwargs)
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in before:
                size = value.untyped_storage().nbytes()
                self.bytes += size
                self.count += 1
                self.largest = max(self.largest, size)
        return result


def allocations(work: Callable[[], Any]) -> Allocations:
    """What ``work`` allocates."""
    with Allocations() as counter, torch.no_grad():
        work()
    return counter
