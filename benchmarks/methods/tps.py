"""TPS, test-time prototype shifting (Sui et al., 2024): the text features are shifted until the confident views agree.

TPT's idea without its cost: what is tuned for each image is a shift of the text features, not the words before them,
so that nothing goes through the text tower. The confident views are chosen again at every step.

The authors' best variant takes LLM descriptors of the classes: a class's text feature is the mean of two means, of 80
prompts and of the descriptors, of unit length each text and again the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from apm.errors import UsageError
from apm.test_time.views import MIN_AREA

from .base import Batch, Json, MethodOptions, Prediction, check_share, display_name, make_settings, settings_record
from .features import answer_each, marginal_entropy, most_confident
from .published import IMAGENETS, OTHERS, Published


@dataclass(frozen=True, kw_only=True)
class TPSSettings:
    """The published settings for ImageNet."""

    views: int = 64
    min_area: float = MIN_AREA
    keep: float = 0.1
    """Share of the views, those of lowest entropy, whose mean prediction is sharpened."""
    steps: int = 1
    lr: float = 5e-3
    """Of AdamW, made anew for each image; 1e-3 is published for the cross-dataset sets."""
    weight_decay: float = 0.01
    shared: bool = False
    """One shift for all classes instead of one for each."""

    def __post_init__(self) -> None:
        check_share("keep", self.keep)
        if self.steps < 0:
            raise UsageError(f"TPS's steps must be 0 or more, not {self.steps}.")
        if not self.lr > 0:
            raise UsageError(f"TPS's lr must be above 0, not {self.lr}.")


PUBLISHED = Published(
    source="TPS: lr 5e-3 on ImageNet and its variants, 1e-3 else; CLIP's 80 prompts",
    by_dataset={IMAGENETS: {"lr": 5e-3}, OTHERS: {"lr": 1e-3}},
    prompts="openai",
    augmix=(OTHERS,),
    descriptors="apart",
)


class TPS:
    """Shift the text features anew for each image and classify the image itself by them."""

    published = PUBLISHED
    stream = False
    gradients = True

    def __init__(self, options: MethodOptions) -> None:
        self.name = display_name("tps", options)
        self._chosen = make_settings(TPSSettings, "tps", options, views=options.views)
        self.settings: Mapping[str, Json] = settings_record(self._chosen)

    def predict(self, batch: Batch) -> Prediction:
        """Tune a shift for each image. Memory: a few tensors of the text features' size, C·D numbers."""
        text, scale = batch.head.features, batch.head.logit_scale

        def step(views: Tensor) -> Tensor:
            shift = tune_shift(views, text, scale, self._chosen)
            return scale * views[0] @ normalize(text + shift, dim=1).T

        views = batch.views(self._chosen.views, min_area=self._chosen.min_area)
        return Prediction(logits=answer_each(views, len(text), step))


def tune_shift(views: Tensor, text: Tensor, scale: float, settings: TPSSettings) -> Tensor:
    """Find the shift under which the confident views' mean prediction is sharper.

    Args:
        views: (V, D) of unit length.
        text: (C, D) of unit length.
        scale: of the logits.
        settings: of the method; its number and size of views are not used.

    Returns:
        The shift, (C, D), or (D,) if shared, to be added to `text` before it is normalised again.
    """
    shift = torch.zeros_like(text[0] if settings.shared else text).requires_grad_()
    optimiser = torch.optim.AdamW([shift], lr=settings.lr, weight_decay=settings.weight_decay)
    for _ in range(settings.steps):
        with torch.enable_grad():
            logits = scale * views @ normalize(text + shift, dim=1).T  # (V, C)
            kept = most_confident(logits.detach(), settings.keep)
            (shift.grad,) = torch.autograd.grad(marginal_entropy(logits[kept]), shift)
        optimiser.step()
    return shift.detach()
