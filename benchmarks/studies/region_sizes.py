"""Measures of the size of a field's regions, and of the field's spread."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dctn

from apm.student import islands
from apm.student.islands import Labels
from apm.test_time.island_fields import root_mean_square

from .watching import Moment

Field = NDArray[np.float64]

PARTS = 12
SIZES = {
    "cosine 0.9": "locations per region of neighbours with a cosine of 0.9 or more",
    "cosine 0.9, mean out": "the same after removing the field's mean",
    "½ spread": "locations per region of neighbours that differ by at most half the field's spread (root mean square)",
    "¼ spread": "the same for a quarter of the spread",
    "pieces of clusters": "locations per connected piece of the 12 k-means clusters of the features",
    "wavelength": "locations per wave, at the mean frequency of the field's power spectrum (cosine transform)",
}


def measures(one: Moment, places: int) -> dict[str, float]:
    """Sizes of a field's regions (`SIZES`), and how it is spread.

    Returns:
        besides the sizes ``spread``, of the field's length; ``directions``, the effective number of directions in which
        it varies (participation ratio of its variances); ``rounding``, how far float32's reading is from float64's, as
        a share of the spread.
    """
    field: Field = one.field(places, exact=True).astype(np.float64)
    centred = field - field.mean(axis=(0, 1))
    spread = root_mean_square(centred)
    variances = np.linalg.svd(centred.reshape(places**2, -1), compute_uv=False) ** 2
    rounding = root_mean_square(one.field(places) - field)
    sizes = {
        "cosine 0.9": _size(islands.regions(field, 0.9)),
        "cosine 0.9, mean out": _size(islands.regions(centred, 0.9)),
        "½ spread": _size(joined(centred, 1 / 2)),
        "¼ spread": _size(joined(centred, 1 / 4)),
        "pieces of clusters": _size(pieces(islands.clusters(field, PARTS))),
        "wavelength": places / frequency(centred),
    }
    return {
        **sizes,
        "spread": spread / root_mean_square(field),
        "directions": float(variances.sum() ** 2 / (variances**2).sum()),
        "rounding": rounding / spread,
    }


def _size(labels: Labels) -> float:
    """Places a region, in the mean."""
    return labels.size / (int(labels.max()) + 1)


def joined(centred: Field, share: float) -> Labels:
    """Number the regions of neighbours that differ by at most a share of the root mean square distance to the mean."""
    reach = share * math.sqrt(float((centred**2).sum(axis=-1).mean()))
    right = np.linalg.norm(np.diff(centred, axis=1), axis=-1) <= reach
    below = np.linalg.norm(np.diff(centred, axis=0), axis=-1) <= reach
    return islands.connected(right, below)


def pieces(labels: Labels) -> Labels:
    """Number the connected pieces of a partition (H, W)."""
    return islands.connected(labels[:, 1:] == labels[:, :-1], labels[1:] == labels[:-1])


def frequency(centred: Field) -> float:
    """Mean frequency of a field (S, S, D) in waves a side, each weighted by its power."""
    power = (dctn(centred, axes=(0, 1), norm="ortho") ** 2).sum(axis=-1)
    halves = np.arange(len(power)) / 2  # coefficient k of a cosine transform is k half waves
    return float((power * np.hypot(halves[:, None], halves)).sum() / power.sum())
