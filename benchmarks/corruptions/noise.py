"""The noises of ImageNet-C: each draws for every pixel and channel on its own."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_GAUSSIAN_SIGMA = (0.08, 0.12, 0.18, 0.26, 0.38)
_SHOT_PHOTONS = (60, 25, 12, 5, 3)
_IMPULSE_AMOUNT = (0.03, 0.06, 0.09, 0.17, 0.27)


def gaussian_noise(image: NDArray[np.float32], level: int, rng: np.random.Generator) -> NDArray[Any]:
    """Add normal noise of standard deviation σ."""
    return image + _GAUSSIAN_SIGMA[level - 1] * rng.standard_normal(image.shape, dtype=np.float32)


def shot_noise(image: NDArray[np.float32], level: int, rng: np.random.Generator) -> NDArray[Any]:
    """Count photons: Poisson(c·x) / c."""
    photons = _SHOT_PHOTONS[level - 1]
    return rng.poisson(image * photons) / photons


def impulse_noise(image: NDArray[np.float32], level: int, rng: np.random.Generator) -> NDArray[Any]:
    """Set a share of all values to 1 (salt) or 0 (pepper), each with even chance."""
    amount = _IMPULSE_AMOUNT[level - 1]
    draw = rng.random(image.shape, dtype=np.float32)
    return np.where(draw < amount / 2, np.float32(0), np.where(draw < amount, np.float32(1), image))
