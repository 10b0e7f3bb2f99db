"""One image's fields: conditions that differ as they should, kept with their losses, in float32."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from apm.benchmarks.studies.islands import CONDITIONS
from apm.student import islands
from apm.student.cells import Cells
from apm.test_time import island_fields
from apm.test_time.options import AdaptConfig
from tests.benchmarks.studies.test_pointing import TINY, ColourTeacher

ADAPT = AdaptConfig(steps=120, lr=1e-4, precision="fp32")


def quarters(row: int, col: int, *colours: str) -> Image.Image:
    """An image of 64 × 64 cut into four at a row and a column."""
    image = Image.new("RGB", (64, 64), colours[0])
    for colour, box in zip(colours[1:], ((col, 0, 64, row), (0, row, col, 64), (col, row, 64, 64)), strict=True):
        image.paste(colour, box)
    return image


IMAGES = [quarters(32, 32, "red", "blue", "lime", "white"), quarters(16, 48, "lime", "white", "blue", "red")]


@pytest.fixture(scope="module")
def subject() -> island_fields.Subject:
    return island_fields.prepare(*IMAGES, ColourTeacher(), TINY, parts=4, seed=0)  # type: ignore[arg-type]


def test_controls_differ_from_the_image_where_they_should(subject: island_fields.Subject) -> None:
    pixels, token, grid = subject.inputs["image"]
    assert pixels.shape == (1, 3, 32, 32) and token.shape == (1, 16) and grid.shape == (1, 64, 16)
    assert set(subject.inputs) | {"no steps"} == set(CONDITIONS)
    drawn = subject.inputs["random target"]
    assert torch.equal(drawn[0], pixels)
    torch.testing.assert_close(drawn[2].norm(dim=-1), grid.norm(dim=-1))
    torch.testing.assert_close(drawn[1].norm(), token.norm())
    assert torch.cosine_similarity(drawn[2], grid, dim=-1).mean() < 0.5
    other = subject.inputs["other target"]
    assert torch.equal(other[0], pixels) and not torch.allclose(other[2], grid)
    assert not torch.equal(subject.inputs["shuffled image"][0], pixels)
    torch.testing.assert_close(subject.inputs["shuffled image"][0].mean(), pixels.mean(), atol=0.05, rtol=0)
    assert islands.agreement(subject.superpixels, np.kron([[0, 1], [2, 3]], np.ones((4, 4)))) == pytest.approx(1)


def test_many_views_are_a_target_of_every_condition() -> None:
    subject = island_fields.prepare(*IMAGES, ColourTeacher(), TINY, parts=4, seed=0, grid_views=3)  # type: ignore[arg-type]
    targets = {name: inputs[2] for name, inputs in subject.inputs.items()}
    for target in targets.values():
        assert isinstance(target, Cells) and target.shares.shape == (1, 3 * 64, 64)
    drawn, grid = targets["random target"], targets["image"]
    assert isinstance(drawn, Cells) and isinstance(grid, Cells)
    torch.testing.assert_close(drawn.features.norm(dim=-1), grid.features.norm(dim=-1))
    assert torch.cosine_similarity(drawn.features, grid.features, dim=-1).mean() < 0.5
    run = island_fields.watch(
        island_fields.trainers(TINY, replace(ADAPT, steps=5))["grid"], subject.inputs["image"], (0, 5)
    )
    assert run.losses[5] < run.losses[0] and run.last.shape == (8, 8, 16)


def test_the_field_is_kept_with_its_loss(subject: island_fields.Subject) -> None:
    trainer = island_fields.trainers(TINY, replace(ADAPT, steps=5))["grid"]
    run = island_fields.watch(trainer, subject.inputs["image"], (0, 2, 5))
    assert list(run.fields) == list(run.losses) == [0, 2, 5]
    assert run.last.shape == (8, 8, 16) and run.last is run.fields[5]
    grid = subject.inputs["image"][2].reshape(8, 8, 16).numpy()
    for step, field in run.fields.items():
        assert run.losses[step] == pytest.approx(float(((field - grid) ** 2).mean()), rel=1e-3)


def test_fields_are_fitted_and_read_in_float32_whatever_is_asked_for(subject: island_fields.Subject) -> None:
    trainers = island_fields.trainers(TINY, replace(ADAPT, steps=30, precision="bf16"))
    for target, trainer in trainers.items():
        assert trainer.precision == "fp32"
        run = island_fields.watch(trainer, subject.inputs["image"], (0, 30))
        assert run.rounding is not None and 0 < run.rounding < 1e-2, target
