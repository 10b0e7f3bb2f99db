"""BoostAdapter (Zhang et al., 2024): TDA whose positive cache is lent the image's own confident views.

The positive cache holds the most confident images of each predicted class. To answer an image, the confident views of
the image itself are added to a copy of it, each under the class that it is taken for; the copy is then thrown away. The
negative cache is as TDA's, except that, as published, it keeps the latest images of a class and not the most confident
ones. An answer depends on the images before: the run seeds and records their order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from apm.errors import UsageError
from apm.test_time.targets import entropies

from .base import Batch, Json, MethodOptions, Prediction, display_name, make_settings, settings_record
from .features import answer_each, entropy_share, most_confident
from .published import Published
from .tda import ALPHA_BETA, OF_CONFIDENT_VIEWS, Cache, TDASettings


@dataclass(frozen=True, kw_only=True)
class BoostAdapterSettings(TDASettings):
    """The published settings for ImageNet: TDA's, whose confident views are also lent to the cache."""

    extra: int = 1
    """δ: entries that a class may have in the copy beyond those of the positive cache."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positive_shots < 1 or self.extra < 0 or self.negative_shots < 1:
            raise UsageError("BoostAdapter must keep at least one image per class, and no fewer in the copy.")


_EXTRA = {"imagenet-a": 3, "imagenet-r": 3, "food101": 3, "caltech101": 2, "aircraft": 2}
_EXTRA |= dict.fromkeys(("imagenet", "imagenet-c", "imagenet-v2", "imagenet-sketch", "sun397"), 1)
PUBLISHED = Published(
    source="BoostAdapter: TDA's α and β, δ by data set; mean features on A, R, V2 and Sketch; plain crops",
    settings={"extra": 0},
    by_dataset={
        name: {
            "extra": _EXTRA.get(name, 0),
            "mode": "mean" if name in OF_CONFIDENT_VIEWS else "image",
            **dict(zip(("positive_alpha", "positive_beta"), ALPHA_BETA.get(name, ()), strict=False)),
        }
        for name in sorted({*ALPHA_BETA, *_EXTRA})
    },
)


class BoostAdapter:
    """A stream method: both caches grow until `reset`. Memory: at most 5·C·D numbers at the default settings."""

    published = PUBLISHED
    stream = True
    gradients = False

    def __init__(self, options: MethodOptions) -> None:
        self.name = display_name("boostadapter", options)
        self._chosen = make_settings(BoostAdapterSettings, "boostadapter", options, views=options.views)
        self.settings: Mapping[str, Json] = settings_record(self._chosen)
        self.reset()

    def reset(self) -> None:
        """Empty both caches."""
        self._caches: tuple[Cache, Cache] | None = None
        self._seen = 0

    def predict(self, batch: Batch) -> Prediction:
        """Classify the images in their order, each after it has been entered into the caches."""
        chosen, text, scale = self._chosen, batch.head.features, batch.head.logit_scale
        if self._caches is None:
            positive = Cache(len(text), chosen.positive_shots, chosen.positive_beta)
            self._caches = positive, Cache(len(text), chosen.negative_shots, chosen.negative_beta)
        views = batch.views(chosen.views, min_area=chosen.min_area)
        return Prediction(logits=answer_each(views, len(text), lambda one: self._step(one, scale * one @ text.T)))

    def _step(self, views: Tensor, logits: Tensor) -> Tensor:
        """Update the caches with one image, (V, D) and (V, C), and return its adapted logits (C,)."""
        assert self._caches is not None
        (positive, negative), chosen = self._caches, self._chosen
        kept = most_confident(logits, chosen.keep)
        rows = kept if chosen.mode == "mean" else kept.new_zeros(1)
        feature, answer = views[rows].mean(dim=0), logits[rows].mean(dim=0)  # (D,), (C,)
        probabilities = logits[rows].softmax(dim=1).mean(dim=0)
        predicted = int(answer.argmax())
        positive.update(predicted, float(entropies(probabilities)), feature, answer.argmax().reshape(1))
        self._seen += 1
        if chosen.entropy_low < entropy_share(probabilities) < chosen.entropy_high:
            doubted = (probabilities > chosen.mask_low) & (probabilities < chosen.mask_high)
            # Ranked by age in the place of entropy: the latest come first.
            negative.update(predicted, -float(self._seen), feature, doubted.nonzero().flatten())
        gain = self._boosted(positive, views[kept], logits[kept], feature)
        return answer + chosen.positive_alpha * gain - chosen.negative_alpha * negative.logits(feature)

    def _boosted(self, cache: Cache, views: Tensor, logits: Tensor, feature: Tensor) -> Tensor:
        """The cache's logits (C,) for a feature (D,) when views (K, D) and (K, C) are added temporarily."""
        lent: dict[int, list[tuple[float, Tensor]]] = {}
        for view, entropy, owner in zip(
            views, entropies(logits.softmax(dim=1)).tolist(), logits.argmax(dim=1).tolist(), strict=True
        ):
            lent.setdefault(owner, []).append((entropy, view))
        total = cache.logits(feature)
        for owner, entries in lent.items():
            ranked = sorted([*cache.entries(owner), *entries], key=lambda entry: entry[0])
            keys = torch.stack([key for _, key in ranked[: self._chosen.positive_shots + self._chosen.extra]])
            total[owner] = torch.exp(cache.beta * (keys @ feature - 1)).sum()
        return total
