"""How many of the student's locations a step reads: all of them, as in the paper, or fewer, new ones each time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apm.errors import UsageError

if TYPE_CHECKING:
    import torch

ALL, AUTO = "all", "auto"

FEWER = {"paper": 64}
"""What ``auto`` reads on a CPU, by preset; with other presets, all. `python -m apm.benchmarks.studies.queries` counts
the answers that change."""


def check_queries(queries: int | str) -> None:
    """Refuse what is neither a number of 1 or more, nor ``all``, nor ``auto``.

    Raises:
        UsageError: with the value.
    """
    if queries not in (ALL, AUTO) and (not isinstance(queries, int) or queries < 1):
        raise UsageError(f'queries is "{queries}"; it must be a number of 1 or more, all, or auto.')


def locations_a_step(
    queries: int | str,
    *,
    preset: str,
    readout: str,
    distil: str,
    loss: str,
    rgb_weight: float,
    agree: float,
    device: torch.device,
) -> int | None:
    """Return how many locations each step reads, None for all.

    ``auto`` reads fewer where that is measured: on a CPU, with the object query, and with the token as the only target,
    by its mean squared error. A GPU is no faster with fewer, and a loss of the grid, of colours or of agreement is
    about every location.

    Raises:
        UsageError: as `check_queries`.
    """
    check_queries(queries)
    if isinstance(queries, int):
        return queries
    alone = distil == "cls" and loss == "mse" and rgb_weight == agree == 0
    measured = alone and readout == "query" and device.type == "cpu"
    return FEWER.get(preset) if queries == AUTO and measured else None


def parse_queries(text: str) -> int | str:
    """Read a number, ``all`` or ``auto``.

    Raises:
        UsageError: it is none of them.
    """
    queries = int(text) if text.isdecimal() else text
    check_queries(queries)
    return queries
