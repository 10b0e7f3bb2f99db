"""Photographs pasted on others, and their maps, for the pointing game."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from apm.student.config import APMConfig
from apm.student.field import resample
from apm.student.position import dense_locations
from apm.teachers.base import Teacher
from apm.test_time.inputs import student_inputs
from apm.test_time.island_fields import square_of
from apm.test_time.label_maps import field_maps, label_maps
from apm.test_time.options import AdaptConfig, StudentOptions
from apm.test_time.trainer import AdaptResult, TestTimeTrainer
from apm.text.zeroshot import ZeroShotHead


@dataclass(frozen=True)
class Composite:
    """A photograph pasted on another."""

    image: Image.Image
    box: tuple[float, float, float, float]
    """Of the pasted one: top, left, bottom, right, as shares of the side."""
    label: int
    """Class of the pasted one."""
    background: int
    """Class of the other."""

    def holds(self, place: tuple[float, float]) -> bool:
        """Whether a place (y, x), in shares of the side, lies in the pasted square."""
        top, left, bottom, right = self.box
        return top <= place[0] < bottom and left <= place[1] < right


def paste(
    photograph: Image.Image,
    background: Image.Image,
    *,
    label: int,
    background_label: int,
    canvas: int,
    side: int,
    rng: np.random.Generator,
) -> Composite:
    """Paste the central square of a photograph, `side` pixels wide, on that of another, `canvas` pixels wide."""
    ground = square_of(background).resize((canvas, canvas), Image.Resampling.BICUBIC)
    top, left = (int(v) for v in rng.integers(0, canvas - side + 1, size=2))
    ground.paste(square_of(photograph).resize((side, side), Image.Resampling.BICUBIC), (left, top))
    box = (top / canvas, left / canvas, (top + side) / canvas, (left + side) / canvas)
    return Composite(ground, box, label, background_label)


def composites(
    samples: Sequence[Any], count: int, *, canvas: int = 224, side: int = 96, seed: int = 0
) -> list[Composite]:
    """Paste `count` photographs, drawn without repeats while there are enough, each on one of another class.

    Args:
        samples: with ``label`` and ``load()``, of two classes or more.
        count: how many.
        canvas: side of the images, in pixels.
        side: side of the pasted squares, in pixels.
        seed: of the choice and the places.
    """
    rng = np.random.default_rng(seed)
    labels = np.array([sample.label for sample in samples])
    order = np.concatenate([rng.permutation(len(samples)) for _ in range(-(-count // len(samples)))])[:count]
    made = []
    for number in order.tolist():
        ground = int(rng.choice(np.flatnonzero(labels != labels[number])))
        made.append(
            paste(
                samples[number].load(),
                samples[ground].load(),
                label=int(labels[number]),
                background_label=int(labels[ground]),
                canvas=canvas,
                side=side,
                rng=rng,
            )
        )
    return made


class Mapper:
    """Makes all maps of an image: adapts one student for each kind of target, from the image alone."""

    def __init__(
        self,
        teacher: Teacher,
        head: ZeroShotHead,
        config: APMConfig,
        adapt: AdaptConfig,
        *,
        size: int = 32,
        device: str | torch.device = "cpu",
    ) -> None:
        self.teacher, self.head, self.size, self.grid = teacher, head, size, config.grid
        adapt = replace(adapt, precision="fp32")  # the fields are measured: bfloat16 would round nearly constant ones
        # the token alone has the steps and the rate that `apm classify` takes by default
        steps = min(StudentOptions.steps, adapt.steps)
        token = replace(adapt, steps=steps, lr=StudentOptions.lr)
        self.trainers = {
            "field, grid": TestTimeTrainer(
                replace(config, readout="mean"), replace(adapt, distil="grid"), device=device
            ),
            "field, both": TestTimeTrainer(config, replace(adapt, distil="both"), device=device),
            "field, token": TestTimeTrainer(config, token, device=device),
        }

    def __call__(self, image: Image.Image) -> Maps:
        """Adapt the students to an image, whose central square is what they and the maps see."""
        seen = student_inputs([image], self.teacher, self.trainers["field, both"].model)
        grid = self.teacher.encode_grid(image)  # (h, w, D)
        targets = resample(grid[None], self.grid)  # (1, N, D)
        results: dict[str, AdaptResult] = {}
        for source, trainer in self.trainers.items():
            by_grid = trainer.config.distil != "cls"
            results[source] = trainer.adapt(
                seen.pixels, seen.tokens, grids=targets if by_grid else None, keep_field=True
            )
        return Maps(self, seen.tokens, grid, results)


@dataclass(frozen=True)
class Maps:
    """The maps of one image, for any label."""

    mapper: Mapper
    token: Tensor
    """(1, D) of the teacher."""
    grid: Tensor
    """(h, w, D) of the teacher."""
    results: dict[str, AdaptResult]

    def of(self, label: int) -> dict[str, Tensor]:
        """Maps (size, size) by source; log odds of the label, or attention. Random and centre have none."""
        mapper, size = self.mapper, self.mapper.size
        smooth = resample(self.grid[None], size)[0].reshape(size, size, -1)
        maps = {"teacher's grid": label_maps(smooth, mapper.head, [label]).log_odds[0]}
        rows, cols = dense_locations(mapper.grid, size)
        for source, result in self.results.items():

            def field(rows: Tensor, cols: Tensor, of: AdaptResult = result) -> Tensor:
                return of.features(rows, cols)[0]

            maps[source] = field_maps(field, mapper.grid, size, mapper.head, [label]).log_odds[0]
            if source != "field, grid":  # whose object query is not trained
                attention = result.attention(rows, cols)[0].mean(dim=0)
                maps[source.replace("field", "attention")] = attention.reshape(size, size)
        return maps
