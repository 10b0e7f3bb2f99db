"""Places of random crops of an image, drawn from nothing but names and numbers."""

from __future__ import annotations

import hashlib
import math

import numpy as np

MIN_AREA = 0.08
"""Smallest share of the image's area that a crop holds, as in TPT (and Inception's training crops)."""
ASPECT_RATIOS = (3 / 4, 4 / 3)
"""Range of a crop's width over height."""
CROP_ATTEMPTS = 10
"""Draws of area and ratio before a narrow image gets the largest central crop of an allowed ratio instead."""


def view_generator(seed: int, sample_id: str, index: int) -> np.random.Generator:
    """The source of randomness of one view: a function of its three arguments only."""
    key = hashlib.sha256(f"{seed}|{index}|{sample_id}".encode("utf-8", "surrogatepass")).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(key[:16], "little")))


def crop_box(width: int, height: int, generator: np.random.Generator, min_area: float) -> tuple[int, int, int, int]:
    """Draw a crop of an image of `width` × `height` pixels, with the distribution of torchvision's RandomResizedCrop.

    Returns:
        (left, top, right, bottom), in pixels.
    """
    low, high = (math.log(ratio) for ratio in ASPECT_RATIOS)
    for _ in range(CROP_ATTEMPTS):
        area = width * height * generator.uniform(min_area, 1.0)
        ratio = math.exp(generator.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * ASPECT_RATIOS[1])), min(height, round(width / ASPECT_RATIOS[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
