"""One image's fields, fitted under every condition, and measures of their islands.

Steps and readings are in float32: bfloat16 rounds a nearly constant field into stripes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from apm.images.load import central_square
from apm.student import islands
from apm.student.cells import Cells
from apm.student.config import APMConfig
from apm.student.position import grid_locations
from apm.teachers.base import Teacher
from apm.test_time.grid_views import view_cells
from apm.test_time.inputs import student_inputs
from apm.test_time.label_maps import LR
from apm.test_time.options import AdaptConfig, IslandOptions
from apm.test_time.trainer import TestTimeTrainer
from apm.test_time.views import pixels_id

Field = NDArray[np.float32]

Inputs = tuple[Tensor, Tensor, Tensor | Cells]

PATCHES = 8
"""Patches a side of the shuffled image."""


@dataclass(frozen=True)
class Watched:
    """One student's field during its fit."""

    fields: dict[int, Field]
    """By the number of steps made: (H, H, D)."""
    losses: dict[int, float]
    """By the number of steps made."""
    rounding: float | None = None
    """Root mean square difference of the last field from the same weights' in float64, as a share of its spread."""

    @property
    def last(self) -> Field:
        """The field after the last step."""
        return self.fields[max(self.fields)]


@dataclass(frozen=True)
class Subject:
    """One image, the controls' inputs, and what its regions are compared with."""

    inputs: dict[str, Inputs]
    """By condition: pixels (1, 3, S, S), the teacher's token (1, D), its grid at the student's locations (1, N, D), or
    the cells of many views."""
    superpixels: islands.Labels
    other_superpixels: islands.Labels


def square_of(image: Image.Image) -> Image.Image:
    """Cut out the central square, which is what the student sees."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.convert("RGB").crop((left, top, left + side, top + side))


def coordinates(side: int) -> Field:
    """Row and column of each location (side, side, 2)."""
    return np.stack(np.meshgrid(*[np.arange(side, dtype=np.float32)] * 2, indexing="ij"), axis=-1)


def prepare(
    image: Image.Image,
    other: Image.Image,
    teacher: Teacher,
    config: APMConfig,
    *,
    parts: int,
    seed: int,
    grid_size: int | None = None,
    grid_views: int | str = 1,
) -> Subject:
    """Make the inputs of every condition; "no steps" has none of its own.

    Args:
        image: the image watched.
        other: another one, for the control with its target.
        teacher: gives tokens and grids.
        config: of the student.
        parts: number of superpixels.
        seed: of random targets and of the patches' order.
        grid_size: side, in pixels, at which the teacher's grid is made; None for its default.
        grid_views: views of an image whose grids are the target, see `apm.test_time.grid_views`.
    """
    square, second = square_of(image), square_of(other)
    shuffled = islands.shuffle_patches(square, PATCHES, seed)

    def inputs(one: Image.Image) -> Inputs:
        seen = student_inputs([one], teacher, config, grids=grid_views == 1, size=grid_size)
        if seen.grids is not None:
            return seen.pixels, seen.tokens.cpu(), seen.grids.cpu()
        found = view_cells(
            [one], teacher, config.grid, grid_views, seed=seed, sample_ids=[pixels_id(one)], size=grid_size
        )
        return seen.pixels, seen.tokens.cpu(), Cells(found.shares.cpu(), found.features.cpu())

    def at_random(target: Tensor | Cells) -> Tensor | Cells:
        if isinstance(target, Cells):
            return Cells(target.shares, islands.random_like(target.features, seed))
        return islands.random_like(target, seed)

    pixels, token, grid = inputs(square)
    return Subject(
        inputs={
            "image": (pixels, token, grid),
            "random target": (pixels, islands.random_like(token, seed), at_random(grid)),
            "shuffled image": inputs(shuffled),
            "other target": (pixels, *inputs(second)[1:]),
        },
        superpixels=islands.superpixels(square, config.grid, parts),
        other_superpixels=islands.superpixels(second, config.grid, parts),
    )


def trainers(
    config: APMConfig, adapt: AdaptConfig, *, grid_lr: float = LR, device: str | torch.device = "cpu"
) -> dict[str, TestTimeTrainer]:
    """Make one trainer for each target, in float32 whatever `adapt` says, because the fields are shown and measured.

    The grid trains no object query, so its student is read by the mean; and it has a learning rate of its own, because
    at a rate that suits the token its loss hardly falls.
    """
    adapt = replace(adapt, precision="fp32")
    return {
        "cls": TestTimeTrainer(replace(config, readout="query"), replace(adapt, distil="cls"), device=device),
        "grid": TestTimeTrainer(
            replace(config, readout="mean"), replace(adapt, distil="grid", lr=grid_lr), device=device
        ),
    }


def watch(trainer: TestTimeTrainer, inputs: Inputs, snapshots: Sequence[int]) -> Watched:
    """Fit a new student and keep its field after the given numbers of steps (the last must be the config's)."""
    pixels, token, grid = inputs
    by_grid = trainer.config.distil != "cls"
    result = trainer.adapt(pixels, token, grids=grid if by_grid else None, snapshots=snapshots, keep_field=True)
    assert result.folded is not None
    side = trainer.model.grid
    losses = [*result.losses[0].tolist(), float(result.final_losses[0])]
    exact = result.folded.double().features(*grid_locations(side))[0].cpu().numpy()
    watched = Watched(
        fields={step: field[0].reshape(side, side, -1).cpu().numpy() for step, field in result.fields.items()},
        losses={step: losses[step] for step in result.fields},
    )
    apart, spread = (
        root_mean_square(v) for v in (watched.last.reshape(exact.shape) - exact, exact - exact.mean(axis=0))
    )
    return replace(watched, rounding=apart / spread if spread else 0.0)  # the same everywhere: a student that died


def root_mean_square(values: NDArray[np.floating]) -> float:
    """Root mean square of all values."""
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def watch_all(
    trainer: TestTimeTrainer, subject: Subject, snapshots: Sequence[int], *, controls: bool = True
) -> dict[str, Watched]:
    """Fit one student for each condition, or for the image alone."""
    runs = {
        name: watch(trainer, inputs, snapshots)
        for name, inputs in subject.inputs.items()
        if controls or name == "image"
    }
    first = runs["image"]
    untrained = {0: first.fields[0]}
    return {**runs, "no steps": Watched(untrained, {0: first.losses[0]})} if controls else runs


@dataclass(frozen=True)
class Observation:
    """One image watched with both targets under every condition, or without the controls, and measured."""

    square: Image.Image
    """What the student sees."""
    subject: Subject
    runs: dict[str, dict[str, Watched]]
    """By target and condition."""
    measured: dict[str, dict[str, dict[int, dict[str, float]]]]
    """By target, condition and step: see `measures`."""
    clusters: dict[str, dict[str, islands.Labels]]
    """By target and condition: the parts of the last field."""

    @property
    def of_image(self) -> dict[str, Watched]:
        """By target, without the controls."""
        return {target: of["image"] for target, of in self.runs.items()}


def observe(
    image: Image.Image,
    other: Image.Image,
    teacher: Teacher,
    by_target: Mapping[str, TestTimeTrainer],
    options: IslandOptions,
    *,
    shown: Sequence[int],
    kept: Sequence[int] = (),
    controls: bool = True,
) -> Observation:
    """Watch and measure one image.

    Args:
        image: the image watched.
        other: another one, for the control with its target.
        teacher: gives tokens and grids.
        by_target: of `trainers`.
        options: how to measure.
        shown: steps after which the field is measured; the last must be the trainers'.
        kept: further steps after which it is kept.
        controls: whether the controls are fitted.
    """
    config, seed, parts = by_target["cls"].model, options.seed, options.parts
    grids: dict[str, Any] = {"grid_size": options.grid_size, "grid_views": options.grid_views}
    subject = prepare(image, other, teacher, config, parts=parts, seed=seed, **grids)
    steps = sorted({*shown, *kept})
    runs = {target: watch_all(trainer, subject, steps, controls=controls) for target, trainer in by_target.items()}

    def measured(run: Watched) -> dict[int, dict[str, float]]:
        return {
            step: measures(run.fields[step], subject, threshold=options.threshold, parts=parts, seed=seed)
            for step in run.fields
            if step in shown
        }

    return Observation(
        square=central_square(image, config.image_size),
        subject=subject,
        runs=runs,
        measured={target: {name: measured(run) for name, run in of.items()} for target, of in runs.items()},
        clusters={
            target: {name: islands.clusters(run.last, parts, seed=seed) for name, run in of.items()}
            for target, of in runs.items()
        },
    )


def measures(
    field: Field,
    subject: Subject,
    *,
    threshold: float,
    parts: int,
    seed: int = 0,
    found: islands.Labels | None = None,
) -> dict[str, float]:
    """Measure one field (H, H, D): its islands, and what its clusters agree with; `found`, where these are known."""
    plain = islands.measure(field, threshold=threshold)
    centred = islands.measure(field, threshold=threshold, centred=True)
    if found is None:
        found = islands.clusters(field, parts, seed=seed)
    joined = islands.regions(field - field.mean(axis=(0, 1)), threshold)
    return {
        "cosine": plain.cosine,
        "regions": float(plain.regions),
        "centred cosine": centred.cosine,
        "centred regions": float(centred.regions),
        "centred largest": centred.largest,
        "AMI image": islands.agreement(found, subject.superpixels),
        "AMI other image": islands.agreement(found, subject.other_superpixels),
        "AMI regions": islands.agreement(joined, subject.superpixels),
        "contrast image": islands.boundary_contrast(field, subject.superpixels),
        "contrast other image": islands.boundary_contrast(field, subject.other_superpixels),
    }
