"""APM test-time training (Modi & Rawat, NeurIPS 2024): a fresh student overfit to a target made from the one image.

With the setting ``distil`` the target is, or has beside the token, the teacher's grid of patch features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from apm.errors import UsageError
from apm.settings import settings_of
from apm.student.cells import Cells
from apm.student.field import resample
from apm.teachers.base import check_grid
from apm.test_time.options import StudentOptions
from apm.test_time.readings import read_modes
from apm.test_time.targets import aggregate
from apm.test_time.trainer import TestTimeTrainer
from apm.test_time.view_numbers import number_of

from .base import Batch, Json, MethodOptions, Prediction, display_name, make_settings

_UNSAID = ("distil", "temperature", "rgb_weight", "agree", "guide", "grid_views")
"""Settings that records hold only where they are not the default."""


class APMTestTimeTraining:
    """The student's answer after K steps towards the target, with new random weights for each image."""

    stream = False
    gradients = True

    def __init__(self, options: MethodOptions) -> None:
        self._student = _chosen(options)
        self._policy = self._student.policy()
        self._device, self._batch_size = torch.device(options.device), options.batch_size
        self._adapt = self._student.training(self._device)
        self._record_steps = options.record_steps
        self._trainer: TestTimeTrainer | None = None
        if self._record_steps and self._student.readout == "mode":
            raise UsageError(
                "readout=mode is read only after the last step: do not record steps, or choose another readout."
            )
        TestTimeTrainer.check(self._student.model(dim=512), self._adapt)  # found wrong before any image is read
        self.name = self._name(options)
        defaults = {name: getattr(StudentOptions, name) for name in _UNSAID}
        record = self._student.record(self._device)
        self.settings: Mapping[str, Json] = {
            **{name: value for name, value in record.items() if name not in _UNSAID or value != defaults[name]},
            **({"temperature": self._student.temperature} if self._student.loss == "soft" else {}),
            "aggregate": self._policy.kind,
        }

    def predict(self, batch: Batch) -> Prediction:
        """Adapt a student to each image and classify its token.

        The extras are ``loss`` and ``cosine`` of the last token to the target, and the ``steps`` made. A student whose
        loss was not finite has no answer: its logits are NaN.
        """
        trainer = self._trainer_for(batch)
        images = batch.student_images(trainer.model.image_size)
        grids = self._grids(batch, trainer.model.grid)
        targets, modes = self._targets(batch), self._student.readout == "mode"
        result = trainer.adapt(
            images, targets, grids=grids, head=batch.head, record_tokens=self._record_steps, keep_field=modes
        )
        if modes:
            result = read_modes(result, batch.head, trainer.model.grid, targets)
        return Prediction(
            logits=batch.head.logits(result.tokens),
            extras={"loss": result.final_losses, "cosine": result.final_cosines, "steps": result.steps},
            step_logits=None if result.step_tokens is None else batch.head.logits(result.step_tokens),
        )

    def _targets(self, batch: Batch) -> Tensor:
        """What the students are overfit to: (B, D)."""
        if self._policy.kind == "cls":
            return batch.tokens()
        features = batch.views(self._policy.views, min_area=self._policy.min_area)  # (B, V, D)
        return torch.stack([aggregate(self._policy, views, batch.head) for views in features])

    def _grids(self, batch: Batch, side: int) -> Tensor | Cells | None:
        """What the fields are overfit to: at the students' own locations (B, N, D), or in the cells of views."""
        if self._adapt.distil == "cls":
            return None
        if self._student.grid_views == 1:
            return resample(batch.grids(), side)
        return batch.view_cells(self._student.grid_views, side)

    def _trainer_for(self, batch: Batch) -> TestTimeTrainer:
        """The trainer for students as wide as the teacher's token; it keeps nothing of the images it has seen."""
        if self._trainer is None or self._trainer.model.dim != batch.teacher.dim:
            if self._adapt.distil != "cls" and not number_of(self._student.grid_views)[1]:
                check_grid(batch.teacher)
            model = self._student.model(batch.teacher.dim)
            self._trainer = TestTimeTrainer(model, self._adapt, device=self._device, batch_size=self._batch_size)
        return self._trainer

    def _name(self, options: MethodOptions) -> str:
        """``apm`` for the paper's loss, else with target and views, and what is distilled: ``apm[mta,64,both]``."""
        student, policy = self._student, self._policy
        parts: tuple[str, ...] = () if policy.kind == "cls" else (student.target, str(policy.views))
        if student.distil != "cls":
            parts += (student.distil,)
        if student.grid_views != 1 and "grid_views" not in options.overrides:
            parts += (f"grid_views={student.grid_views}",)
        for name in ("loss", "temperature", "agree"):
            value = getattr(student, name)
            if value != getattr(StudentOptions, name) and name not in options.overrides:
                parts += (f"{name}={value}" if isinstance(value, str) else f"{name}={value:g}",)
        if self._adapt.queries is not None and "queries" not in options.overrides:  # never unmarked: an approximation
            parts += (f"queries={self._adapt.queries}",)
        others = {name: text for name, text in options.overrides.items() if name not in ("target", "views", "distil")}
        return display_name("apm", replace(options, overrides=others), *parts)


def _chosen(options: MethodOptions) -> StudentOptions:
    """The run's student options, overridden by those after the method's name."""
    run = {name: getattr(options.student, name) for name in settings_of(StudentOptions)}
    given = {**run, "seed": options.seed, "target": options.target or options.student.target}
    chosen = make_settings(StudentOptions, "apm", options, **given)
    if chosen.views is None and chosen.policy().kind != "cls":
        return replace(chosen, views=options.views)
    return chosen
