"""Checks of what a segmentation is told. Nothing here imports torch: they are made before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from apm.errors import UsageError

PLACES = 112
"""Places of the lattice along the shorter side."""


def check(
    labels: Sequence[str] | None, background: Sequence[str], min_probability: float, min_area: float, places: int
) -> None:
    """Refuse values that cannot work; see `apm.segmentation.segment_image`.

    Args:
        labels: all of them; None where they are not known yet: the background is not compared with them then.
        background: those that count as none.
        min_probability: in [0, 1].
        min_area: in [0, 1).
        places: 1 or more.

    Raises:
        UsageError: a background label that is none of the labels, no other label left, or a number out of range.
    """
    unknown = [name for name in background if labels is not None and name not in labels]
    if unknown:
        raise UsageError(f'The background label "{unknown[0]}" is not one of the labels.')
    if labels is not None and not set(labels) - set(background):
        raise UsageError("All labels are background: at least one must be left.")
    if not 0 <= min_probability <= 1:
        raise UsageError(f"min_probability is {min_probability}; it must lie between 0 and 1.")
    if not 0 <= min_area < 1:
        raise UsageError(f"min_area is a share of the image's area, from 0 to below 1, not {min_area}.")
    if places < 1:
        raise UsageError(f"places is {places}; it must be at least 1.")
