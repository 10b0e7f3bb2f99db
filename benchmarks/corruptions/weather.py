"""The weather of ImageNet-C: snow, frost, fog."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage  # type: ignore[import-untyped, unused-ignore]

from .blur import blur_along, blur_levels_along, clipped_zoom

_SNOW = (  # mean, sd, zoom, threshold, blur radius, blur σ, share of the image
    (0.1, 0.3, 3.0, 0.5, 10, 4.0, 0.8),
    (0.2, 0.3, 2.0, 0.5, 12, 4.0, 0.7),
    (0.55, 0.3, 4.0, 0.9, 12, 8.0, 0.7),
    (0.55, 0.3, 4.5, 0.85, 12, 8.0, 0.65),
    (0.55, 0.3, 2.5, 0.85, 12, 12.0, 0.55),
)
_FROST = ((1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))  # weight of the image, of the frost
_FOG = ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))  # strength, decay of the roughness


def snow(image: NDArray[np.float32], level: int, rng: np.random.Generator) -> NDArray[Any]:
    """Whiten the scene and add flakes: zoomed noise, cut below a threshold, blurred downward, and its half-turn."""
    mean, sd, zoom, threshold, radius, sigma, mix = _SNOW[level - 1]
    flakes: NDArray[Any] = rng.normal(mean, sd, size=image.shape[:2]).astype(np.float32)
    flakes = clipped_zoom(flakes, zoom)
    flakes[flakes < threshold] = 0
    flakes = np.floor(np.clip(flakes, 0, 1) * 255) / np.float32(255)  # the published layer passes through 8 bits
    flakes = blur_levels_along(flakes, radius, sigma, rng.uniform(-135, -45))[..., None]
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
    whitened = mix * image + (1 - mix) * np.maximum(image, grey * 1.5 + 0.5)
    return whitened + flakes + np.rot90(flakes, 2)


def _midpoint(total: NDArray[Any], amplitude: float, rng: np.random.Generator) -> NDArray[Any]:
    """A quarter of the sum of four neighbours, moved by uniform noise in ±amplitude."""
    return total / 4 + rng.uniform(-amplitude, amplitude, size=total.shape)


def plasma(side: int, decay: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """A cloudy random field by the diamond–square algorithm on a torus, scaled to [0, 1].

    The noise falls by decay² when the grid is halved: in the published code the amplitude enters twice.

    Args:
        side: of the square field, a power of two.
        decay: how fast fine detail fades; larger is smoother.
        rng: draws the field.
    """
    field = np.zeros((side, side))
    step, amplitude = side, 1.0
    while step >= 2:
        half = step // 2
        corners = field[::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=0)
        centres = _midpoint(pairs + np.roll(pairs, -1, axis=1), amplitude, rng)
        field[half::step, half::step] = centres
        beside = centres + np.roll(centres, 1, axis=0) + corners + np.roll(corners, -1, axis=1)
        field[::step, half::step] = _midpoint(beside, amplitude, rng)
        below = centres + np.roll(centres, 1, axis=1) + corners + np.roll(corners, -1, axis=0)
        field[half::step, ::step] = _midpoint(below, amplitude, rng)
        step, amplitude = half, amplitude / decay**2
    field -= field.min()
    return field / field.max()


def fog(image: NDArray[np.float32], level: int, rng: np.random.Generator) -> NDArray[Any]:
    """Add a plasma cloud and scale back to the image's range."""
    strength, decay = _FOG[level - 1]
    height, width = image.shape[:2]
    side = max(256, 1 << (max(height, width) - 1).bit_length())
    cloud = plasma(side, decay, rng)[:height, :width, None]
    peak = float(image.max())
    return (image + strength * cloud) * (peak / (peak + strength))


_FROST_TEXTURES = 5
_FROST_SIDE = 480  # pixels of a square texture
_FROST_MEAN = (0.46, 0.53, 0.62, 0.73, 0.84)  # grey of each texture: the photographs differ as much
_FROST_TINT = np.array([0.95, 1.0, 1.05], dtype=np.float32)  # a little blue


def _smooth_noise(side: int, sigma: float, rng: np.random.Generator) -> NDArray[Any]:
    """Smoothed white noise of mean 0 and standard deviation 1, (side, side)."""
    field = ndimage.gaussian_filter(rng.standard_normal((side, side)), sigma, mode="wrap")
    return np.asarray((field - field.mean()) / field.std())


@lru_cache(maxsize=_FROST_TEXTURES)
def frost_texture(index: int) -> NDArray[np.float32]:
    """Draw ice on a window: feathery needles that follow a slowly turning direction, over a milky ground.

    Args:
        index: which of the textures, 0 to 4; always the same picture.

    Returns:
        (480, 480, 3) float32 in [0, 1].
    """
    rng = np.random.Generator(np.random.PCG64(1000 + index))
    margin = 50  # longer than a needle: those at the edge of the drawing would be cut off
    side = _FROST_SIDE + 2 * margin
    seeds = (rng.random((side, side)) < 0.02).astype(np.float32) * rng.random((side, side), dtype=np.float32)
    turning = 180 * _smooth_noise(side, 60, rng)  # degrees
    angles = np.arange(0, 180, 15)
    needles: NDArray[Any] = np.zeros((side, side), dtype=np.float32)
    for angle in angles:
        strokes = blur_along(seeds, 24, 10.0, float(angle)) + blur_along(seeds, 24, 10.0, float(angle) + 180)
        apart = np.abs((turning - angle + 90) % 180 - 90)  # degrees between the stroke and the direction wanted here
        needles = np.maximum(needles, strokes * np.exp(-((apart / 25) ** 2)).astype(np.float32))
    needles = needles / np.quantile(needles, 0.99)
    ridges = 1 - np.abs(_smooth_noise(side, 5, rng))
    ice = 0.6 * np.minimum(needles, 1.3) + 0.08 * ridges + 0.06 * _smooth_noise(side, 40, rng)
    ice += 0.04 * rng.standard_normal((side, side))
    ice = 0.1 * (ice - ice.mean()) / ice.std() + _FROST_MEAN[index]
    ice = ice[margin:-margin, margin:-margin, None]
    return np.clip(ice * _FROST_TINT, 0, 1).astype(np.float32)


def frost(image: NDArray[np.float32], level: int, rng: np.random.Generator) -> NDArray[Any]:
    """Lay ice over the image: a weighted sum with a random crop of one of five frost pictures.

    The published corruption uses five photographs, which cannot be shipped here. The five pictures are drawn instead
    (`frost_texture`): their mean greys and contrast are chosen so that the corrupted images come near in mean, contrast
    and amount of change, but the ice has no leaves, edges or scenery of a photograph and its structure is more even.
    Accuracy under this frost is not that under the published one.
    """
    image_weight, frost_weight = _FROST[level - 1]
    height, width = image.shape[:2]
    texture: NDArray[Any] = frost_texture(int(rng.integers(_FROST_TEXTURES)))
    if height > _FROST_SIDE or width > _FROST_SIDE:
        texture = cv2.resize(texture, (max(width, _FROST_SIDE), max(height, _FROST_SIDE)))
    top = int(rng.integers(texture.shape[0] - height + 1))
    left = int(rng.integers(texture.shape[1] - width + 1))
    return image_weight * image + frost_weight * texture[top : top + height, left : left + width]
