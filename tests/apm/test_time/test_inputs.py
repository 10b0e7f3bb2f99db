"""Images as student and teacher see them: against the plain steps, one image at a time."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from apm.images.load import student_input
from apm.student.config import APMConfig
from apm.student.field import resample
from apm.test_time.inputs import student_inputs, teacher_tokens
from tests.fakes import FakeTeacher

CONFIG = APMConfig.preset("small", dim=64)


def pictures(count: int) -> list[Image.Image]:
    generator = np.random.default_rng(3)
    return [Image.fromarray(generator.integers(0, 256, (20, 30 + i, 3), dtype=np.uint8)) for i in range(count)]


def test_all_inputs_are_those_of_each_image_alone() -> None:
    teacher = FakeTeacher(dim=64)
    images = pictures(3)
    seen = student_inputs(images, teacher, CONFIG, grids=True)
    assert seen.grids is not None and student_inputs(images, teacher, CONFIG).grids is None
    assert seen.pixels.shape == (3, 3, CONFIG.image_size, CONFIG.image_size)
    for row, image in enumerate(images):
        assert torch.equal(seen.pixels[row], student_input(image, CONFIG.image_size))
        assert torch.equal(seen.tokens[row], teacher.encode_image(teacher.preprocess(image)[None])[0])
        assert torch.equal(seen.grids[row], resample(teacher.encode_grid(image), CONFIG.grid))


def test_on_a_cpu_a_teacher_encodes_one_by_one_unless_a_chunk_is_asked_for() -> None:
    sizes: list[int] = []

    class Counting(FakeTeacher):
        def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
            sizes.append(len(pixels))
            return super().encode_image(pixels)

    teacher = Counting(dim=64)
    pixels = torch.stack([teacher.preprocess(image) for image in pictures(5)])
    teacher_tokens(teacher, pixels)
    assert sizes == [1] * 5
    teacher_tokens(teacher, pixels, chunk=2)
    assert sizes[5:] == [2, 2, 1]
