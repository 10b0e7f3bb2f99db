"""MTA, MeanShift for Test-time Augmentation (Zanella & Ben Ayed, CVPR 2024): the mode of the views is classified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from apm.errors import UsageError
from apm.test_time.mean_shift import mean_shift_mode
from apm.test_time.views import MIN_AREA

from .base import Batch, Json, MethodOptions, Prediction, check_share, display_name, make_settings, settings_record
from .published import OTHERS, Published


@dataclass(frozen=True, kw_only=True)
class MTASettings:
    """The published settings; see `apm.test_time.mean_shift.mean_shift_mode` for what they mean."""

    views: int = 64
    min_area: float = MIN_AREA
    lambda_y: float = 0.2
    lambda_q: float = 4.0
    iterations: int = 5
    neighbours: float = 0.3

    def __post_init__(self) -> None:
        check_share("neighbours", self.neighbours)
        if not self.lambda_y > 0 or not self.lambda_q >= 0 or self.iterations < 0:
            raise UsageError(
                "MTA's lambda_y must be above 0, its lambda_q and iterations 0 or more, not "
                f"{self.lambda_y}, {self.lambda_q} and {self.iterations}."
            )


PUBLISHED = Published(source="MTA: one setting; prompt and views as TPT", prompts="single", augmix=(OTHERS,))


class MTA:
    """Classify the robust mode of the views' features."""

    published = PUBLISHED
    stream = False
    gradients = False

    def __init__(self, options: MethodOptions) -> None:
        self.name = display_name("mta", options)
        self._chosen = make_settings(MTASettings, "mta", options, views=options.views)
        self.settings: Mapping[str, Json] = settings_record(self._chosen)

    def predict(self, batch: Batch) -> Prediction:
        """Classify each image's mode; ``own_inlierness`` is how much the image itself counted for it."""
        chosen = self._chosen
        modes = [
            mean_shift_mode(
                normalize(features, dim=1),
                batch.head.probabilities(features),
                lambda_y=chosen.lambda_y,
                lambda_q=chosen.lambda_q,
                iterations=chosen.iterations,
                neighbours=chosen.neighbours,
            )
            for features in batch.views(chosen.views, min_area=chosen.min_area)
        ]
        return Prediction(
            logits=batch.head.logits(torch.stack([mode.vector for mode in modes])),
            extras={"own_inlierness": torch.stack([mode.inlierness[0] for mode in modes])},
        )
