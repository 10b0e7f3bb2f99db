"""Classifiers trained on labels, on a masked autoencoder (He et al. 2022), and TTT-MAE (Gandelsman et al. 2022).

They need no teacher: classes are those that the head was trained on, of which a data set's are picked out by name. The
checkpoint is one of `apm mae probe`, `finetune` or `joint`, and the answers are no test of learning without labels:
tables say so beside the names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from apm.errors import UsageError
from apm.images.paths import printable
from apm.mae.config import Kind
from apm.mae.test_time import TestTimeAdapter, TestTimeSettings
from apm.mae.training import load_mae
from apm.settings import check_values, setting
from apm.text.zeroshot import ZeroShotHead

from .base import CHUNK, Batch, Json, MethodOptions, Prediction, display_name, make_settings, settings_record
from .published import Published

_FILE = "Checkpoint with a head, as `apm mae probe` makes it."
_CROP = "Share of the central square's side that is looked at; 0.875 is the square of 224 pixels in one of 256."


def _share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise UsageError(f"{name} is a share of the side, above 0 and at most 1, not {value}.")


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """Which trained head."""

    file: str = setting("", _FILE)
    crop: float = setting(1.0, _CROP, check=_share)

    def __post_init__(self) -> None:
        """Check each value."""
        check_values(self)


@dataclass(frozen=True, kw_only=True)
class TTTMAESettings(TestTimeSettings):
    """Which trained head, and how the encoder is adapted."""

    file: str = setting("", _FILE)
    crop: float = setting(1.0, _CROP, check=_share)


PUBLISHED = Published(source="TTT-MAE: 224 pixels out of 256", settings={"crop": 0.875})


class ViTProbe:
    """The answer of a head on the frozen encoder; the image is seen whole, nothing is masked."""

    published = PUBLISHED
    registered: ClassVar[str] = "vit-probe"
    kinds: ClassVar[tuple[Kind, ...]] = ("probe",)
    """How its checkpoint may have been trained."""
    settings_type: ClassVar[type[HeadSettings] | type[TTTMAESettings]] = HeadSettings
    stream = False
    gradients = False

    def __init__(self, options: MethodOptions) -> None:
        self._chosen = chosen = make_settings(self.settings_type, self.registered, options)
        if not chosen.file:
            raise UsageError(
                f"{self.registered} needs a trained head: name its file, as in {self.registered}:file="
                f"{self.kinds[0]}.safetensors; `apm mae {self.kinds[0]}` makes one."
            )
        path = Path(chosen.file).expanduser()
        self._device = torch.device(options.device)
        self._trained = load_mae(path, device=self._device)
        if self._trained.kind not in self.kinds:
            said = f"of `apm mae {self._trained.kind}`" if self._trained.kind else "without a head"
            raise UsageError(
                f"{printable(path)} is a checkpoint {said}: {self.registered} needs one of `apm mae {self.kinds[0]}`."
            )
        self._numbers: dict[str, list[int]] = {}
        for number, name in enumerate(self._trained.class_names):
            self._numbers.setdefault(name, []).append(number)
        others = {key: value for key, value in options.overrides.items() if key != "file"}
        self.name = display_name(self.registered, replace(options, overrides=others), path.stem)
        self.settings: Mapping[str, Json] = {
            **settings_record(chosen),
            "file": path.name,  # where it is has no part in the answers
            "weights": self._trained.digest,
            "trained_steps": self._trained.step,
            "uses_training_data": "yes",
        }

    def own_prompt(self, templates: Sequence[str]) -> str:
        """What stands in the place of prompts: the head's own classes."""
        return f"{len(self._trained.class_names)} learned classes"

    @torch.no_grad()
    def predict(self, batch: Batch) -> Prediction:
        """Classify the images: on a CPU one by one, where batching would change the last bits."""
        chosen = self._classes(batch.head)
        size = 1 if self._device.type == "cpu" else CHUNK
        parts = self._pixels(batch).to(self._device).split(size)
        return Prediction(logits=torch.cat([self._trained.model.logits(part) for part in parts])[:, chosen].cpu())

    def _pixels(self, batch: Batch) -> Tensor:
        """What is looked at of the images (B, 3, S, S)."""
        size = self._trained.model.config.image_size
        if self._chosen.crop == 1:
            return batch.student_images(size)
        whole = max(size, round(size / self._chosen.crop))
        start = (whole - size) // 2
        return batch.student_images(whole)[..., start : start + size, start : start + size]

    def check_classes(self, names: Sequence[str]) -> None:
        """Refuse classes of a data set that the head was not trained on, by a `UsageError`."""
        if strange := [name for name in names if name not in self._numbers]:
            shown = ", ".join(strange[:3]) + (", …" if len(strange) > 3 else "")
            raise UsageError(
                f"{self.name} was not trained on {len(strange)} of the {len(names)} classes ({shown}). Leave the "
                "method out for these images, or train a head on their classes."
            )

    def _classes(self, head: ZeroShotHead) -> list[int]:
        """The head's numbers of a data set's classes, which are checked.

        Where a name occurs several times, as two of ImageNet's do, its occurrences are taken in their order.
        """
        self.check_classes(head.labels)
        left = {name: list(numbers) for name, numbers in self._numbers.items()}
        return [left[name].pop(0) if len(left[name]) > 1 else left[name][0] for name in head.labels]


class MAEFineTuned(ViTProbe):
    """The answer of head and encoder that were trained together on labels."""

    registered = "mae-finetune"
    kinds = ("finetune",)


class MAEJoint(ViTProbe):
    """The answer of head and encoder that were trained on labels and on masked patches at once."""

    registered = "mae-joint"
    kinds = ("joint",)


class TTTMAE(ViTProbe):
    """The answer after the encoder was adapted to the one image; every image begins with the trained weights.

    The extras are ``loss_first``, the reconstruction error before the first step, ``loss``, that before the last, and
    the ``steps`` made; where steps are recorded also ``loss_0`` … ``loss_K``, before each step and after the last.
    """

    registered = "ttt-mae"
    kinds = ("probe", "joint")
    settings_type = TTTMAESettings
    gradients = True

    def __init__(self, options: MethodOptions) -> None:
        super().__init__(options)
        if self._trained.settings.get("decoder") == "drawn":
            raise UsageError(
                f"{self.name}: the decoder of {printable(self._chosen.file)} was never trained, so there is nothing to "
                "adapt with. Train the head on a masked autoencoder that has its decoder."
            )
        assert isinstance(self._chosen, TTTMAESettings)
        self._adapter = TestTimeAdapter(self._trained.model, self._chosen, seed=options.seed)
        self._record_steps = options.record_steps
        self.settings = {**self.settings, "seed": options.seed}

    def predict(self, batch: Batch) -> Prediction:
        """Adapt to each image and classify it."""
        chosen = self._classes(batch.head)
        settings = self._adapter.settings
        whole = batch.images if settings.crops == "random" else None
        found = self._adapter.adapt(self._pixels(batch), whole, record_steps=self._record_steps)
        each = [] if found.step_losses is None else found.step_losses.unbind(1)
        return Prediction(
            logits=found.logits[:, chosen].cpu(),
            extras={
                "loss_first": found.first_losses,
                "loss": found.last_losses,
                "steps": torch.full((len(batch),), settings.steps),
                **{f"loss_{step}": losses for step, losses in enumerate(each)},
            },
            step_logits=None if found.step_logits is None else found.step_logits[:, :, chosen].cpu(),
        )
