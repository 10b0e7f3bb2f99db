"""A student's inputs and targets: images as it and its teacher see them, for classifier, runs and studies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from apm.images.load import student_input
from apm.student.config import APMConfig
from apm.student.field import resample

if TYPE_CHECKING:
    from apm.teachers.base import Teacher


@dataclass(frozen=True)
class Inputs:
    """B images as `TestTimeTrainer.adapt` takes them."""

    pixels: Tensor
    """(B, 3, S, S) float32 on the CPU: the student's."""
    tokens: Tensor
    """(B, D): the teacher's."""
    grids: Tensor | None = None
    """(B, N, D): the teacher's grid at the student's own N locations; None where it was not asked for."""


def student_inputs(
    images: Sequence[Image.Image], teacher: Teacher, config: APMConfig, *, grids: bool = False, size: int | None = None
) -> Inputs:
    """Compute the inputs of RGB images.

    Args:
        images: B ≥ 1, RGB.
        teacher: gives tokens, and grids if they are wanted.
        config: of the student.
        grids: whether the teacher's grids are wanted.
        size: side, in pixels, at which the grids are made; None for the teacher's default.
    """
    return Inputs(
        pixels=student_pixels(images, config.image_size),
        tokens=teacher_tokens(teacher, torch.stack([teacher.preprocess(image) for image in images])),
        grids=torch.stack([resample(teacher.encode_grid(image, size=size), config.grid) for image in images])
        if grids
        else None,
    )


def student_pixels(images: Sequence[Image.Image], size: int) -> Tensor:
    """Images as the student takes them: (B, 3, size, size) float32 on the CPU."""
    return torch.stack([student_input(image, size) for image in images])


def teacher_tokens(teacher: Teacher, pixels: Tensor, *, chunk: int | None = None) -> Tensor:
    """Encode pixels (B, 3, H, W) to tokens (B, D), not normalised, on the teacher's device.

    Args:
        teacher: its own `preprocess` has made the pixels.
        pixels: on any device.
        chunk: images encoded at a time. None: one by one on a CPU, where batching gains nothing and would change the
            last bits with the batch's size; on a GPU all.
    """
    rows = chunk or (1 if teacher.device.type == "cpu" else len(pixels))
    return torch.cat([teacher.encode_image(part) for part in pixels.to(teacher.device).split(rows)])
