"""The blurs of ImageNet-C: defocus, glass, motion, zoom."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

_DEFOCUS = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))  # radius, σ of the antialiasing
_GLASS = ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2))  # Gaussian σ, largest shift, rounds
_MOTION = ((10, 3.0), (15, 5.0), (15, 8.0), (15, 12.0), (20, 15.0))  # radius, σ
_ZOOM = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))  # end (excluded), step


@lru_cache(maxsize=8)
def _disk(radius: int, sigma: float) -> NDArray[np.float32]:
    """A disk of ones that sums to 1, its rim softened by a small Gaussian; at least 17×17."""
    side = np.arange(-max(radius, 8), max(radius, 8) + 1)
    disk = (side[:, None] ** 2 + side[None, :] ** 2 <= radius**2).astype(np.float32)
    window = (3, 3) if radius <= 8 else (5, 5)
    return np.asarray(cv2.GaussianBlur(disk / disk.sum(), window, sigma), dtype=np.float32)


def defocus_blur(image: NDArray[np.float32], level: int, rng: np.random.Generator) -> NDArray[Any]:
    """Convolve with a disk, mirrored at the edges (without repeating the edge)."""
    return cv2.filter2D(image, -1, _disk(*_DEFOCUS[level - 1]))


def _gaussian(image: NDArray[Any], sigma: float) -> NDArray[Any]:
    """Gaussian blur cut at 4σ, the edge pixel repeated."""
    side = 2 * int(4 * sigma + 0.5) + 1
    return cv2.GaussianBlur(image, (side, side), sigma, borderType=cv2.BORDER_REPLICATE)


def _shuffled(height: int, width: int, shift: int, rounds: int, rng: np.random.Generator) -> list[int]:
    """For each pixel, the flat index of the pixel whose colour it ends with.

    Pixels are visited from the far corner to the near one and each sees the earlier changes, so they cannot be made at
    once; done on plain integers they take a few milliseconds.
    """
    colour = list(range(height * width))
    rows = np.arange(height - shift, shift, -1)
    columns = np.arange(width - shift, shift, -1)
    for _ in range(rounds):
        dy, dx = rng.integers(-shift, shift, size=(2, len(rows), len(columns)))  # the upper end is excluded
        here = rows[:, None] * width + columns[None, :]
        there = here + dy * width + dx
        for a, b in zip(here.ravel().tolist(), there.ravel().tolist(), strict=True):
            # Described as an exchange; the reference's figures (tests/golden) are those of a copy.
            colour[a] = colour[b]
    return colour


def glass_blur(image: NDArray[np.float32], level: int, rng: np.random.Generator) -> NDArray[Any]:
    """Blur, give every pixel the colour of a random neighbour, blur again.

    Neighbours are within the largest shift (offsets −s … s−1); a frame of that width is left in place.
    """
    sigma, shift, rounds = _GLASS[level - 1]
    height, width = image.shape[:2]
    blurred = np.floor(_gaussian(image, sigma) * 255 + 1e-3)  # whole grey levels between the steps, as published
    moved = blurred.reshape(-1, 3)[_shuffled(height, width, shift, rounds, rng)].reshape(image.shape)
    return _gaussian(moved / np.float32(255), sigma)


def motion_kernel(radius: int, sigma: float, degrees: float) -> NDArray[np.float64]:
    """The trace of a moving point: a half Gaussian of 2·radius + 1 steps from the centre in one direction.

    As ImageMagick's motion blur: weights exp(−i²/2σ²), offsets rounded to whole pixels, halves downward.

    Args:
        radius: half the number of steps, in pixels.
        sigma: width of the Gaussian, in pixels.
        degrees: direction, clockwise from the x axis (images count rows downward).

    Returns:
        A square kernel with the anchor in its middle that sums to 1.
    """
    steps = 2 * radius + 1
    weights = np.exp(-(np.arange(steps) ** 2) / (2 * sigma**2))
    along, down = steps * math.cos(math.radians(degrees)), steps * math.sin(math.radians(degrees))
    kernel = np.zeros((2 * steps + 1, 2 * steps + 1))
    for step, weight in enumerate(weights / weights.sum()):
        dx, dy = (math.ceil(step * part / math.hypot(along, down) - 0.5) for part in (along, down))
        kernel[steps + dy, steps + dx] += weight
    return kernel


def blur_along(image: NDArray[np.float32], radius: int, sigma: float, degrees: float) -> NDArray[np.float64]:
    """Convolve (H, W) or (H, W, 3) with `motion_kernel`, the edge pixel repeated."""
    kernel = motion_kernel(radius, sigma, degrees)
    return np.asarray(cv2.filter2D(image, cv2.CV_64F, kernel, borderType=cv2.BORDER_REPLICATE), dtype=np.float64)


def blur_levels_along(image: NDArray[np.float32], radius: int, sigma: float, degrees: float) -> NDArray[np.float64]:
    """`blur_along` of a picture of 8 bits, in [0, 1], with ImageMagick's grey levels.

    The published code hands pictures of 8 bits to ImageMagick, which rounds its sums to 16 bits and truncates those to
    the 8 of the picture that it hands back.
    """
    sixteen = np.floor(blur_along(np.rint(image * 255), radius, sigma, degrees) * 257 + 0.5)
    return np.floor(sixteen / 257) / 255


def motion_blur(image: NDArray[np.float32], level: int, rng: np.random.Generator) -> NDArray[Any]:
    """Move the camera along a straight line, at an angle drawn evenly from −45° to 45°."""
    radius, sigma = _MOTION[level - 1]
    return blur_levels_along(image, radius, sigma, rng.uniform(-45, 45))


@lru_cache(maxsize=256)
def _zoom_matrix(size: int, factor: float) -> NDArray[np.float32]:
    """Linear interpolation that magnifies the middle of `size` samples by `factor` back to `size`, as (size, size)."""
    kept = math.ceil(size / factor)
    first = (size - kept) // 2
    magnified = round(kept * factor)
    trim = (magnified - size) // 2
    position = first + np.arange(trim, trim + size) * ((kept - 1) / (magnified - 1))
    left = np.clip(np.floor(position).astype(int), 0, size - 2)
    share = position - left
    matrix = np.zeros((size, size), dtype=np.float32)
    np.add.at(matrix, (np.arange(size), left), 1 - share)
    np.add.at(matrix, (np.arange(size), left + 1), share)
    return matrix


def clipped_zoom(image: NDArray[np.float32], factor: float) -> NDArray[np.float32]:
    """Magnify the middle of an (H, W) or (H, W, C) image by `factor`, keeping its size; linear interpolation.

    Interpolation is separable, so it is two matrix products.
    """
    height, width = image.shape[:2]
    planes = np.atleast_3d(image).transpose(2, 0, 1)  # (C, H, W)
    zoomed = _zoom_matrix(height, factor) @ planes @ _zoom_matrix(width, factor).T
    return np.ascontiguousarray(zoomed.transpose(1, 2, 0)).reshape(image.shape)


def zoom_blur(image: NDArray[np.float32], level: int, rng: np.random.Generator) -> NDArray[Any]:
    """Mean of the image and its zooms, from 1 up to the end factor in equal steps."""
    end, step = _ZOOM[level - 1]
    factors = np.arange(1, end, step)
    total = image.astype(np.float32)
    for factor in factors:
        total = total + clipped_zoom(image, float(factor))
    return total / (len(factors) + 1)
