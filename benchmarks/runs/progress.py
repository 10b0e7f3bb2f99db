"""How far a process is with what it does image by image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far this process is."""

    cell: str
    cell_number: int
    cells: int
    done: int
    """Images of this cell that this process has answered, earlier runs included."""
    total: int
    """Images of this cell that are this process's part."""
    accuracy: Mapping[str, float]
    """Running accuracy in [0, 1] of each method on the images of this session."""
    images_per_second: float
    remaining_seconds: float
    """Estimate for the rest of the whole run."""
