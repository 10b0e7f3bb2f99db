"""APM test-time training (Modi & Rawat, NeurIPS 2024): a fresh student overfit to a target made from the one image.

With the setting ``distil`` the target is, or has beside the token, the teacher's grid of patch features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apm.classifier import check_grid, default_readout
from apm.errors import UsageError
from apm.student.config import APMConfig
from apm.student.field import resample
from apm.test_time.queries import locations_a_step
from apm.test_time.targets import TargetPolicy, aggregate, check_distilled, policy
from apm.test_time.trainer import AdaptConfig, TestTimeTrainer

from .base import Batch, Json, MethodOptions, Prediction, display_name, make_settings

_TARGET_FIELDS = ("views", "min_area", "keep", "cls_weight")
_ADAPT_FIELDS = ("steps", "lr", "loss", "precision", "seed", "tolerance", "queries")
_DISTIL_FIELDS = ("distil", "rgb_weight")


@dataclass(frozen=True, kw_only=True)
class APMSettings:
    """What can be set. None leaves the value of the target (`apm.test_time.targets`) or the trainer (`AdaptConfig`)."""

    target: str = "cls"
    views: int | None = None
    min_area: float | None = None
    keep: float | None = None
    cls_weight: float | None = None
    preset: str = "paper"
    readout: str | None = None
    distil: str = "cls"
    rgb_weight: float = 0.0
    steps: int | None = None
    lr: float | None = None
    loss: str | None = None
    precision: str | None = None
    seed: int | None = None
    tolerance: float | None = None
    queries: int | None = None


class APMTestTimeTraining:
    """The student's answer after K steps towards the target, its weights drawn afresh for each image."""

    stream = False

    def __init__(self, options: MethodOptions) -> None:
        given = {
            name: getattr(options, name)
            for name in ("target", "preset", "readout", "distil", "steps", "lr", "precision", "seed")
        }
        chosen = _with_queries(make_settings(APMSettings, "apm", options, **given), options)
        self._policy = _target_policy(chosen, options)
        self._adapt = AdaptConfig(**_set(chosen, _ADAPT_FIELDS + _DISTIL_FIELDS))
        check_distilled(chosen.target, chosen.distil)
        self._preset, self._readout = chosen.preset, chosen.readout or default_readout(chosen.distil)
        self._device, self._batch_size = torch.device(options.device), options.batch_size
        self._record_steps = options.record_steps
        self._trainer: TestTimeTrainer | None = None
        TestTimeTrainer.check(self._model(dim=512), self._adapt)  # what is wrong is found before any image is read
        self.name = _name(chosen, self._policy, options)
        self.settings: Mapping[str, Json] = {
            **_recorded(chosen),
            "readout": self._readout,
            **{name: getattr(self._policy, name) for name in _TARGET_FIELDS},
            **{name: getattr(self._adapt, name) for name in _ADAPT_FIELDS},
            "aggregate": self._policy.kind,
        }

    def predict(self, batch: Batch) -> Prediction:
        """Adapt a student to each image and classify its token.

        The extras are ``loss`` and ``cosine`` of the last token to the target, and the ``steps`` made. A student whose
        loss was not finite has no answer: its logits are NaN.
        """
        trainer = self._trainer_for(batch)
        images = batch.student_images(trainer.model.image_size)
        grids = None if self._adapt.distil == "cls" else resample(batch.grids(), trainer.model.grid)  # (B, N, D)
        result = trainer.adapt(images, self._targets(batch), grids=grids, record_tokens=self._record_steps)
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

    def _trainer_for(self, batch: Batch) -> TestTimeTrainer:
        """The trainer for students as wide as the teacher's token; it keeps nothing of the images it has seen."""
        if self._trainer is None or self._trainer.model.dim != batch.teacher.dim:
            if self._adapt.distil != "cls":
                check_grid(batch.teacher)
            model = self._model(batch.teacher.dim)
            self._trainer = TestTimeTrainer(model, self._adapt, device=self._device, batch_size=self._batch_size)
        return self._trainer

    def _model(self, dim: int) -> APMConfig:
        return APMConfig.preset(self._preset, dim=dim, readout=self._readout)  # type: ignore[arg-type]  # checked inside


def _with_queries(chosen: APMSettings, options: MethodOptions) -> APMSettings:
    """The settings with the run's own number of locations a step, unless the method's own name sets one."""
    if "queries" in options.overrides:
        return chosen
    queries = locations_a_step(
        options.queries,
        preset=chosen.preset,
        readout=chosen.readout or default_readout(chosen.distil),
        distil=chosen.distil,
        rgb_weight=chosen.rgb_weight,
        device=torch.device(options.device),
    )
    return dataclasses.replace(chosen, queries=queries)


def _set(chosen: APMSettings, names: tuple[str, ...]) -> dict[str, Any]:
    """Those of the named settings that are not None."""
    return {name: value for name in names if (value := getattr(chosen, name)) is not None}


def _recorded(chosen: APMSettings) -> dict[str, Json]:
    """Settings for the record. What is distilled is written where it is not the token alone: older records hold on."""
    default = APMSettings()
    values = dataclasses.asdict(chosen)
    return {
        name: value for name, value in values.items() if name not in _DISTIL_FIELDS or value != getattr(default, name)
    }


def _target_policy(chosen: APMSettings, options: MethodOptions) -> TargetPolicy:
    """The named target with what was set for it; a setting that the paper's own target does not read is refused."""
    named, changes = policy(chosen.target), _set(chosen, _TARGET_FIELDS)
    if named.kind == "cls":
        if changes:
            raise UsageError(
                f'Method "apm" with {", ".join(changes)} but the target "cls", which is the image\'s own token and '
                "uses no views; add target=mean, confident, mta or best."
            )
        return named
    if options.views is not None:
        changes.setdefault("views", options.views)
    return dataclasses.replace(named, **changes)


def _name(chosen: APMSettings, target: TargetPolicy, options: MethodOptions) -> str:
    """``apm`` for the paper's loss, else with target and views, and what is distilled: ``apm[mta,64,both]``."""
    parts: tuple[str, ...] = () if target.kind == "cls" else (chosen.target, str(target.views))
    if chosen.distil != "cls":
        parts += (chosen.distil,)
    if chosen.queries is not None and "queries" not in options.overrides:  # an approximation is never unmarked
        parts += (f"queries={chosen.queries}",)
    others = {name: text for name, text in options.overrides.items() if name not in ("target", "views", "distil")}
    return display_name("apm", dataclasses.replace(options, overrides=others), *parts)
