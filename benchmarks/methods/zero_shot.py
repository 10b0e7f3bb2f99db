"""The teacher itself: the image's token against the text features. What every other method is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .base import Batch, Json, MethodOptions, Prediction, make_settings, settings_record


@dataclass(frozen=True, kw_only=True)
class ZeroShotSettings:
    """Nothing to set: prompts and class names belong to the run."""


class ZeroShot:
    """The frozen teacher's own answer."""

    name = "zero-shot"
    stream = False
    gradients = False

    def __init__(self, options: MethodOptions) -> None:
        self.settings: Mapping[str, Json] = settings_record(make_settings(ZeroShotSettings, self.name, options))

    def predict(self, batch: Batch) -> Prediction:
        """Compare the images' tokens with the text features."""
        return Prediction(logits=batch.head.logits(batch.tokens()))
