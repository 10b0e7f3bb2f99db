"""Random crops and mirror images of a batch of squares, drawn from numbers alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from apm.images.crops import crop_box


def crop_maps(count: int, size: int, *, min_area: float, draw: tuple[int, ...]) -> Tensor:
    """Draw a random-resized crop for each of `count` squares, one in two mirrored: maps (count, 2, 3) for `crop`.

    Args:
        count: squares.
        size: of each, in pixels.
        min_area: smallest share of a square in its crop.
        draw: numbers that decide; the same ones give the same.
    """
    generator = np.random.default_rng(draw)
    boxes = np.array([crop_box(size, size, generator, min_area) for _ in range(count)], dtype=np.float64)
    mirrored = generator.random(count) < 0.5
    left, top, right, bottom = boxes.T / size * 2 - 1  # the square lies from -1 to 1
    maps = np.zeros((count, 2, 3))
    maps[:, 0, 0] = (right - left) / 2 * np.where(mirrored, -1, 1)
    maps[:, 0, 2] = (right + left) / 2
    maps[:, 1, 1] = (bottom - top) / 2
    maps[:, 1, 2] = (bottom + top) / 2
    return torch.from_numpy(maps).float()


def crop(images: Tensor, maps: Tensor) -> Tensor:
    """Cut the crops out of squares (B, 3, S, S) and scale them to these squares' size, bicubic: (B, 3, S, S)."""
    if not len(images):  # a process without a part of the batch
        return images
    places = F.affine_grid(maps.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, places, mode="bicubic", padding_mode="border", align_corners=False)
