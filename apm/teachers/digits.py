"""scikit-learn's handwritten digits, and the one rule that says which half trains and which half tests.

The embedded teacher learns from the training half; the ``digits`` benchmark shows the test half only. Both take the
split from here, so that they cannot drift apart.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_SPLIT_SEED = 20241  # changing it moves test digits into the training half: a new teacher must be trained then


class DigitsSplit(NamedTuple):
    """Both halves of the 1,797 digits. Images are (N, 8, 8) uint8, 0 = background; labels (N,) int64 in 0..9."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]
    train_indices: NDArray[np.int64]
    """Position of each training digit in `sklearn.datasets.load_digits`, ascending."""
    test_indices: NDArray[np.int64]
    """Position of each test digit in `sklearn.datasets.load_digits`, ascending."""


def split_indices(labels: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split sample positions into a training and a test half, class by class, with a fixed seed.

    Args:
        labels: (N,) class of each sample.

    Returns:
        Ascending positions of the training half (⌊n/2⌋ of each class) and of the test half (the rest).
    """
    generator = np.random.Generator(np.random.PCG64(_SPLIT_SEED))
    train: list[int] = []
    for label in np.unique(labels):
        positions = generator.permutation(np.flatnonzero(labels == label))
        train.extend(int(position) for position in positions[: len(positions) // 2])
    is_train = np.zeros(len(labels), dtype=bool)
    is_train[train] = True
    return np.flatnonzero(is_train).astype(np.int64), np.flatnonzero(~is_train).astype(np.int64)


def digits_split() -> DigitsSplit:
    """Load the digits that scikit-learn ships (no download) and split them by `split_indices`."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]

    bunch: Any = load_digits()
    images = np.rint(np.asarray(bunch.images) * (255 / 16)).astype(np.uint8)  # the files count 0..16
    labels = np.asarray(bunch.target, dtype=np.int64)
    train, test = split_indices(labels)
    return DigitsSplit(images[train], labels[train], images[test], labels[test], train, test)


def digit_image(pixels: NDArray[np.uint8], size: int = 96) -> Image.Image:
    """Draw one digit as an RGB picture: (8, 8) uint8 → size×size, bicubic, white strokes on black."""
    return Image.fromarray(pixels, "L").resize((size, size), Image.Resampling.BICUBIC).convert("RGB")
