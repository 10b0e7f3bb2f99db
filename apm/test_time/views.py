"""Augmented views of one image, as test-time augmentation uses them: random resized crops and horizontal flips.

View 0 is the image as the teacher itself prepares it; the others follow Shu et al. 2022 (TPT), whose crops MTA and ZERO
use too: torchvision's RandomResizedCrop (a crop of random area and aspect ratio, resized to the teacher's input,
bilinear), flipped with probability one half. View i depends on (seed, sample id, i) alone, so 33 views are the first 33
of 64, and no view depends on other images, threads or the order of work.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from apm.errors import UsageError
from apm.images.crops import MIN_AREA, crop_box, view_generator
from apm.images.load import normalised
from apm.test_time.augmix import mixed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apm.teachers.base import Teacher


def augmented_view(
    image: Image.Image,
    index: int,
    *,
    seed: int,
    sample_id: str,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    min_area: float = MIN_AREA,
    augmix: bool = False,
) -> Tensor:
    """Make view `index` ≥ 1 of an image.

    Args:
        image: RGB.
        index: which view.
        seed: of the run.
        sample_id: names the image among all of its data set.
        size: side of the view in pixels.
        mean: three channel means, for pixels in [0, 1].
        std: three channel deviations.
        min_area: smallest share of the image's area in a crop, in (0, 1].
        augmix: whether the crop is augmented further, see `apm.test_time.augmix`.

    Returns:
        (3, size, size) float32, normalised.
    """
    generator = view_generator(seed, sample_id, index)
    box = crop_box(*image.size, generator, min_area)
    # Cut first: with `box`, resize would mix pixels from outside the crop into its edges.
    view = image.crop(box).resize((size, size), Image.Resampling.BILINEAR)
    if generator.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if augmix:
        return mixed(view, generator, mean, std)
    return normalised(view, mean, std)


def views(
    image: Image.Image,
    count: int,
    teacher: Teacher,
    *,
    seed: int,
    sample_id: str,
    start: int = 0,
    min_area: float = MIN_AREA,
    augmix: bool = False,
) -> Tensor:
    """Make views `start` … `count` − 1 of an image, ready for the teacher.

    Args:
        image: RGB.
        count: how many views there are in all, ≥ 1.
        teacher: gives view 0 by its own `preprocess`, and size, mean and deviation of the others.
        seed: of the run.
        sample_id: names the image among all of its data set.
        start: the first view wanted; memory stays bounded when views are made and encoded in parts.
        min_area: smallest share of the image's area in a crop, in (0, 1].
        augmix: whether views but the image itself are augmented further, see `apm.test_time.augmix`.

    Returns:
        (count − start, 3, size, size) float32 on the CPU.

    Raises:
        UsageError: no view is asked for, `min_area` is no share, or the teacher's input is not square.
    """
    check(count, min_area)
    check_input(teacher, count)
    made = [
        augmented_view(
            image,
            index,
            seed=seed,
            sample_id=sample_id,
            size=teacher.image_size,
            mean=teacher.mean,
            std=teacher.std,
            min_area=min_area,
            augmix=augmix,
        )
        if index
        else teacher.preprocess(image)
        for index in range(start, count)
    ]
    return torch.stack(made)


def view_tokens(
    image: Image.Image,
    count: int,
    teacher: Teacher,
    *,
    seed: int,
    sample_id: str,
    start: int = 0,
    min_area: float = MIN_AREA,
    augmix: bool = False,
    chunk: int = 64,
) -> Tensor:
    """Make views `start` … `count` − 1 of an image as `views` does, and encode them, `chunk` at a time.

    Returns:
        (count − start, D) float32, not normalised, on the teacher's device.
    """
    parts = [
        teacher.encode_image(
            views(
                image,
                min(first + chunk, count),
                teacher,
                seed=seed,
                sample_id=sample_id,
                start=first,
                min_area=min_area,
                augmix=augmix,
            )
        )
        for first in range(start, count, chunk)
    ]
    return torch.cat(parts) if parts else torch.empty(0, teacher.dim, device=teacher.device)


def pixels_id(image: Image.Image) -> str:
    """Name an image by its pixels: where no data set names it, its views are the same wherever the file lies."""
    return hashlib.sha256(f"{image.mode}|{image.size}|".encode() + image.tobytes()).hexdigest()


def check(count: int, min_area: float) -> None:
    """Refuse impossible numbers of views, with a `UsageError`."""
    if count < 1:
        raise UsageError(f"{count} views: at least 1 is needed, the image itself.")
    if not 0 < min_area <= 1:
        raise UsageError(f"min_area is {min_area}; it must be above 0 and at most 1.")


def check_input(teacher: Teacher, count: int) -> None:
    """Refuse more than one view where the teacher's input is not square, with a `UsageError`."""
    height, width = getattr(teacher, "input_shape", (teacher.image_size, teacher.image_size))
    if count > 1 and height != width:
        raise UsageError(
            f"The teacher {teacher.name} takes images of {width}×{height} pixels, but views are square crops: methods "
            "and targets with views (TPT, MTA, ZERO) need a teacher with a square input."
        )
