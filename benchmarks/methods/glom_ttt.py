"""Test-time training with GLOM (Hinton 2021) in the student's place: overfit to the teacher's token or grid, as APM is.

The first weights are the same for every image, and nothing of one image is there when the next one comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from apm.glom.test_time import GLOMStudentOptions, GLOMTestTimeTrainer
from apm.student.field import resample
from apm.teachers.base import check_grid

from .base import Batch, Json, MethodOptions, Prediction, display_name, make_settings, settings_record


class GLOMTestTimeTraining:
    """The answer of columns that were overfit to what the teacher makes of the one image."""

    stream = False
    gradients = True

    def __init__(self, options: MethodOptions) -> None:
        student = options.student
        self._student = make_settings(
            GLOMStudentOptions, "glom-ttt", options, steps=student.steps, distil=student.distil, seed=options.seed
        )
        self._device, self._batch_size = torch.device(options.device), options.batch_size
        self._record_steps = options.record_steps
        self._trainer: GLOMTestTimeTrainer | None = None
        others = {name: text for name, text in options.overrides.items() if name != "distil"}
        parts = () if self._student.distil == "cls" else (self._student.distil,)
        self.name = display_name("glom-ttt", replace(options, overrides=others), *parts)
        self.settings: Mapping[str, Json] = settings_record(self._student)

    def predict(self, batch: Batch) -> Prediction:
        """Adapt columns to each image and classify their token.

        The extras are ``loss`` and ``cosine`` of the last token to the teacher's, and the ``steps`` made. Columns whose
        loss was not finite have no answer: their logits are NaN.
        """
        trainer = self._trainer_for(batch)
        grids = None
        if self._student.distil != "cls":
            grids = resample(batch.grids(), self._student.sizes().grid)  # (B, N, D)
        images = batch.student_images(self._student.image_size)
        result = trainer.adapt(images, batch.tokens(), grids=grids, record_tokens=self._record_steps)
        return Prediction(
            logits=batch.head.logits(result.tokens),
            extras={
                "loss": result.final_losses,
                "cosine": result.final_cosines,
                "steps": torch.full((len(batch),), self._student.steps),
            },
            step_logits=None if result.step_tokens is None else batch.head.logits(result.step_tokens),
        )

    def _trainer_for(self, batch: Batch) -> GLOMTestTimeTrainer:
        """The trainer for columns read as wide as the teacher's token; it keeps nothing of the images it has seen."""
        width = batch.teacher.dim
        if self._trainer is None or self._trainer.width != width:
            if self._student.distil != "cls":
                check_grid(batch.teacher)
            self._trainer = GLOMTestTimeTrainer(self._student, width, device=self._device, batch_size=self._batch_size)
        return self._trainer
