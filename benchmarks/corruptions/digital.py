"""The digital corruptions of ImageNet-C: brightness, contrast, elastic transform, pixelate, JPEG."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage  # type: ignore[import-untyped, unused-ignore]

_BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)
_CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)
_ELASTIC = ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))
_ELASTIC_UNIT = 244  # pixels; the published code multiplies by 244, not by the images' 224
_PIXELATE = (0.6, 0.5, 0.4, 0.3, 0.25)
_JPEG_QUALITY = (25, 18, 15, 10, 7)


def brightness(image: NDArray[np.float32], level: int, rng: np.random.Generator) -> NDArray[Any]:
    """Raise the value of HSV, clipped at 1; hue and saturation stay.

    With hue and saturation fixed, the three channels are proportional to the value: no conversion is needed.
    """
    value = image.max(axis=2, keepdims=True)
    raised = np.minimum(value + _BRIGHTNESS[level - 1], 1)
    return np.where(value > 0, image * (raised / np.maximum(value, 1e-6)), raised)  # black has no hue: it becomes grey


def contrast(image: NDArray[np.float32], level: int, rng: np.random.Generator) -> NDArray[Any]:
    """Pull every channel towards its mean."""
    mean = image.mean(axis=(0, 1), keepdims=True, dtype=np.float64)
    return (image - mean) * _CONTRAST[level - 1] + mean


@lru_cache(maxsize=16)
def _smoothing_matrix(size: int, sigma: float) -> NDArray[np.float32]:
    """Gaussian smoothing of `size` samples cut at 3σ, mirrored at the ends, as a (size, size) matrix."""
    reach = int(3 * sigma + 0.5)
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    weights /= weights.sum()
    source = (np.arange(size)[:, None] + offsets[None, :]) % (2 * size)
    source = np.where(source < size, source, 2 * size - 1 - source)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.arange(size)[:, None], source), weights)
    return matrix.astype(np.float32)


def displace(
    image: NDArray[np.float32], alpha: float, sigma: float, amplitude: float, rng: np.random.Generator
) -> NDArray[Any]:
    """Move every pixel by smoothed noise: linear interpolation, mirrored at the edges.

    The smoothing runs as two matrix products: its Gaussian may be wider than the image.

    Args:
        image: (H, W, 3) float32.
        alpha: factor on the smoothed noise.
        sigma: of the smoothing Gaussian, in pixels, cut at 3σ.
        amplitude: the noise is uniform in ±amplitude, for rows and columns apart.
        rng: draws the noise.
    """
    height, width = image.shape[:2]
    draws = rng.uniform(-amplitude, amplitude, size=(2, height, width)).astype(np.float32)
    dx, dy = np.float32(alpha) * (_smoothing_matrix(height, sigma) @ draws @ _smoothing_matrix(width, sigma).T)
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    places = np.stack([rows + dy, columns + dx])
    channels = [ndimage.map_coordinates(image[..., c], places, order=1, mode="reflect") for c in range(3)]
    return np.stack(channels, axis=2)


def elastic_transform(image: NDArray[np.float32], level: int, rng: np.random.Generator) -> NDArray[Any]:
    """Map three points of the image a little aside (affine), then move every pixel by smoothed noise.

    The parameters are ImageNet-C's. The `imagecorruptions` package (Michaelis et al. 2019) leaves the affine map out
    and uses another displacement: its pictures change less, most of all at levels 1 and 2.
    """
    alpha, sigma, affine = (_ELASTIC_UNIT * value for value in _ELASTIC[level - 1])
    height, width = image.shape[:2]
    centre, third = np.array([height // 2, width // 2]), min(height, width) // 3
    corners = np.array([centre + third, [centre[0] + third, centre[1] - third], centre - third], dtype=np.float32)
    moved = corners + rng.uniform(-affine, affine, size=corners.shape).astype(np.float32)
    matrix = cv2.getAffineTransform(corners, moved)
    warped = cv2.warpAffine(image, matrix, (width, height), borderMode=cv2.BORDER_REFLECT_101)
    return displace(np.asarray(warped, dtype=np.float32), alpha, sigma, 1.0, rng)


def _picture(image: NDArray[np.float32]) -> Image.Image:
    return Image.fromarray(np.rint(image * 255).astype(np.uint8))


def pixelate(image: NDArray[np.float32], level: int, rng: np.random.Generator) -> NDArray[Any]:
    """Shrink by box averaging and enlarge again."""
    height, width = image.shape[:2]
    factor = _PIXELATE[level - 1]
    small = _picture(image).resize((int(width * factor), int(height * factor)), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.BOX), dtype=np.float32) / 255


def jpeg_compression(image: NDArray[np.float32], level: int, rng: np.random.Generator) -> NDArray[Any]:
    """Write as JPEG of low quality and read back."""
    with io.BytesIO() as buffer:
        _picture(image).save(buffer, "JPEG", quality=_JPEG_QUALITY[level - 1])
        return np.asarray(Image.open(buffer), dtype=np.float32) / 255
