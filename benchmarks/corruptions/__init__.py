"""The 15 corruptions of ImageNet-C (Hendrycks & Dietterich, ICLR 2019) at 5 levels, made from their parameters.

A picture made here is *not* the official file: the random draws differ, the official files went through JPEG, and the
frost pictures are drawn instead of photographed (see `weather.frost`). Results carry the mark "generated: not
comparable with the official files".

`corrupt` depends on the image, the corruption, the level, the seed and the image's id, and on nothing else: not on the
order, the process, or what was corrupted before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from apm.errors import UsageError, unknown

from . import blur, digital, noise, weather

Corruption = Callable[[NDArray[np.float32], int, np.random.Generator], NDArray[Any]]
"""(H, W, 3) float32 in [0, 1], level 1..5, generator → (H, W, 3), clipped to [0, 1] by the caller."""

CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": noise.gaussian_noise,
    "shot_noise": noise.shot_noise,
    "impulse_noise": noise.impulse_noise,
    "defocus_blur": blur.defocus_blur,
    "glass_blur": blur.glass_blur,
    "motion_blur": blur.motion_blur,
    "zoom_blur": blur.zoom_blur,
    "snow": weather.snow,
    "frost": weather.frost,
    "fog": weather.fog,
    "brightness": digital.brightness,
    "contrast": digital.contrast,
    "elastic_transform": digital.elastic_transform,
    "pixelate": digital.pixelate,
    "jpeg_compression": digital.jpeg_compression,
}

LEVELS = (1, 2, 3, 4, 5)
CROP = 224
"""Side of the pictures that ImageNet-C holds, in pixels."""
RESIZE = 256
"""Short side that ImageNet-C's pictures were resized to before the crop, in pixels."""
VERSION = 2
"""Raised whenever a corruption's pixels change; stands in records and in written trees."""
MARK = "generated: not comparable with the official files"
SETTINGS_FILE = "apm-corrupt.json"
"""Lies at the top of a tree written by `datasets.corrupted_tree` and says how it was made."""


def corrupt(image: NDArray[np.uint8], name: str, level: int, *, seed: int, image_id: str) -> NDArray[np.uint8]:
    """Corrupt one image.

    Args:
        image: (H, W, 3) uint8 RGB, sides at least 32; the published parameters are meant for 224×224.
        name: one of `CORRUPTIONS`.
        level: severity, 1 to 5.
        seed: the run's seed.
        image_id: what names the image within its data set; with `seed`, `name` and `level` it fixes every random draw.

    Returns:
        (H, W, 3) uint8, a new array.

    Raises:
        UsageError: unknown name or level, or an image of another shape or type.
    """
    function = CORRUPTIONS.get(name)
    if function is None:
        raise unknown("corruption", name, CORRUPTIONS)
    check_level(level)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < 32:
        raise UsageError(
            f"Expected an image (H, W, 3) of uint8 with sides of 32 or more, got {image.shape} {image.dtype}."
        )
    key = hashlib.sha256("\0".join((str(seed), name, str(level), image_id)).encode("utf-8", "surrogateescape")).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(key[:16], "little")))
    corrupted = np.clip(function(image.astype(np.float32) / np.float32(255), level, generator), 0, 1)
    # The published pictures are truncated to whole grey levels, not rounded; the small term undoes float32's rounding.
    return (corrupted * 255 + 1e-3).astype(np.uint8)


def check_level(level: int) -> None:
    """Raise UsageError unless `level` is 1, 2, 3, 4 or 5."""
    if level not in LEVELS:
        raise UsageError(f"Corruption level {level} does not exist: use 1 (weak) to 5 (strong).")


def centre_crop(image: Image.Image, *, resize: int = RESIZE) -> Image.Image:
    """Resize the short side to `resize` (bilinear, antialiased) and cut the central 224×224 square.

    Pixel by pixel what torchvision's Resize and CenterCrop give, which made ImageNet-C's pictures with 256 and 224:
    the long side is truncated to whole pixels, and half a pixel of margin goes to the even neighbour. With `resize` =
    `CROP` only the ends of the long side are lost.
    """
    short = min(image.size)
    width, height = (int(resize * side / short) for side in image.size)
    resized = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - CROP) / 2), round((height - CROP) / 2)
    return resized.crop((left, top, left + CROP, top + CROP))


def corrupt_image(
    image: Image.Image, name: str, level: int, *, seed: int, image_id: str, resize: int = RESIZE
) -> Image.Image:
    """Crop a picture by `centre_crop` and corrupt it by `corrupt`; returns a 224×224 RGB picture."""
    pixels = np.asarray(centre_crop(image, resize=resize))
    return Image.fromarray(corrupt(pixels, name, level, seed=seed, image_id=image_id))
