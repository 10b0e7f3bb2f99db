"""Floating-point operations of some work, counted by torch."""

from __future__ import annotations

from collections.abc import Callable

from torch.utils.flop_counter import FlopCounterMode


def measured_flops(work: Callable[[], object]) -> int:
    """Operations of all matrix products and convolutions while ``work`` runs, two for each multiply-add."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())
