"""TDA, a training-free dynamic adapter (Karmanov et al., CVPR 2024): two caches filled from the stream of test images.

The positive cache keeps, for each predicted class, the features of the most confident images; the negative cache those
of moderately uncertain ones, with the classes that they are probably not. An image's logits gain by its likeness to
the first and lose by its likeness to the second. An answer depends on the images before it: the run seeds and records
their order.

Two forms of an image are published: its own feature (``mode=image``, the default), and on ImageNet-A, -V2, -R and
-Sketch, as in ``mode=mean``, the mean of its confident views, of features as of logits. The mean feature is not brought
to unit length, neither in the caches nor where it is compared with them.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from apm.errors import UsageError, unknown
from apm.test_time.targets import entropies
from apm.test_time.views import MIN_AREA

from .base import Batch, Json, MethodOptions, Prediction, check_share, display_name, make_settings, settings_record
from .features import answer_each, entropy_share, most_confident
from .published import Published

_OF_VIEWS = ("views", "min_area", "keep")


@dataclass(frozen=True, kw_only=True)
class TDASettings:
    """The published settings for ImageNet."""

    positive_shots: int = 3
    """Images kept per predicted class."""
    positive_alpha: float = 2.0
    """Weight of the positive cache in the logits."""
    positive_beta: float = 5.0
    """Sharpness of its likeness."""
    negative_shots: int = 2
    negative_alpha: float = 0.117
    negative_beta: float = 1.0
    entropy_low: float = 0.2
    """An image enters the negative cache when its normalised entropy is above this …"""
    entropy_high: float = 0.5
    """… and below this."""
    mask_low: float = 0.03
    """A class is marked as probably wrong when its probability is above this …"""
    mask_high: float = 1.0
    """… and below this."""
    mode: str = "image"
    """What stands for an image: ``image``, its own feature; ``mean``, that of its confident views."""
    views: int = 64
    min_area: float = MIN_AREA
    keep: float = 0.1
    """Share of the views, those of lowest entropy, that count as confident."""

    def __post_init__(self) -> None:
        check_share("keep", self.keep)
        if min(self.positive_shots, self.negative_shots) < 0:
            raise UsageError(
                f"The caches' shots must be 0 or more, not {self.positive_shots} and {self.negative_shots}."
            )
        if self.mode not in ("image", "mean"):
            raise unknown("mode", self.mode, ("image", "mean"))


class Cache:
    """Features of test images by predicted class, the most confident ones, each with the classes that it speaks of.

    Args:
        classes: C.
        shots: entries kept per class.
        beta: sharpness: an entry counts exp(−β·(1 − cosine)).
    """

    def __init__(self, classes: int, shots: int, beta: float) -> None:
        self.classes = classes
        self.shots = shots
        self.beta = beta
        self._entries: dict[int, list[tuple[float, Tensor, Tensor]]] = {}
        self._stacked: tuple[Tensor, Tensor, Tensor] | None = None

    def update(self, predicted: int, entropy: float, feature: Tensor, marked: Tensor) -> None:
        """Enter an image under its predicted class; a full class drops its most uncertain entry, or this one.

        Args:
            predicted: index of the predicted class.
            entropy: of the prediction; low is kept.
            feature: (D,), of unit length, or a mean of such.
            marked: indices of the classes that the entry speaks of: few, so that memory stays far below C per entry.
        """
        entries = self._entries.setdefault(predicted, [])
        if len(entries) == self.shots:
            if not entries or entropy >= entries[-1][0]:
                return
            entries.pop()
        bisect.insort(entries, (entropy, feature, marked), key=lambda entry: entry[0])
        self._stacked = None

    def entries(self, predicted: int) -> list[tuple[float, Tensor]]:
        """Entropies and features (D,) under a predicted class, the most confident first."""
        return [(entropy, feature) for entropy, feature, _ in self._entries.get(predicted, [])]

    def logits(self, feature: Tensor) -> Tensor:
        """For each class, the sum of the entries that speak of it, weighted by likeness to a (D,) feature: (C,)."""
        total = feature.new_zeros(self.classes)
        if self._stacked is None:
            entries = [entry for predicted in sorted(self._entries) for entry in self._entries[predicted]]
            if not entries:
                return total
            counts = torch.tensor([len(marked) for _, _, marked in entries], device=feature.device)
            self._stacked = (
                torch.stack([kept for _, kept, _ in entries]),
                torch.cat([marked for _, _, marked in entries]),
                torch.arange(len(entries), device=feature.device).repeat_interleave(counts),
            )
        features, classes, owners = self._stacked  # (E, D), (M,) marked classes of all entries, (M,) whose they are
        weights = torch.exp(self.beta * (features @ feature - 1))  # (E,)
        return total.index_add_(0, classes, weights[owners])


ALPHA_BETA: dict[str, tuple[float, float]] = {
    "imagenet-r": (1.0, 8.0),
    "imagenet-v2": (1.0, 8.0),
    "imagenet-sketch": (2.363, 7.45),
    "caltech101": (5.0, 5.0),
    "dtd": (2.0, 3.0),
    "sun397": (2.0, 3.0),
    "eurosat": (4.0, 8.0),
    "aircraft": (2.0, 2.0),
    "food101": (1.0, 1.0),
    "flowers102": (1.0, 5.0),
    "pets": (2.0, 7.0),
    "ucf101": (3.0, 8.0),
}
"""The authors' α and β of the positive cache by data set; ImageNet's 2 and 5 elsewhere."""
OF_CONFIDENT_VIEWS = ("imagenet-a", "imagenet-v2", "imagenet-r", "imagenet-sketch")
"""Where the authors' features are means of confident views."""
_POSITIVE = ("positive_alpha", "positive_beta")
PUBLISHED = Published(
    source="TDA: α and β of the positive cache by data set; confident AugMix views on A, V2, R and Sketch; own prompts",
    by_dataset={
        name: dict(zip(_POSITIVE, ALPHA_BETA.get(name, ()), strict=False))
        | ({"mode": "mean"} if name in OF_CONFIDENT_VIEWS else {})
        for name in (*ALPHA_BETA, "imagenet-a")
    },
    augmix=OF_CONFIDENT_VIEWS,
)


class TDA:
    """A stream method: the caches grow with every image until `reset`."""

    published = PUBLISHED
    stream = True
    gradients = False

    def __init__(self, options: MethodOptions) -> None:
        self.name = display_name("tda", options)
        chosen = self._chosen = make_settings(TDASettings, "tda", options, views=options.views)
        recorded = settings_record(chosen)
        if chosen.mode == "image":
            given = [name for name in _OF_VIEWS if name in options.overrides]
            if given and options.protocol == "common":
                raise UsageError(f"TDA has no views without mode=mean: add that, or leave out {' and '.join(given)}.")
            for name in ("mode", *_OF_VIEWS):  # so records stay as they were before there was a choice
                del recorded[name]
        self.settings: Mapping[str, Json] = recorded
        self.reset()

    def reset(self) -> None:
        """Empty both caches."""
        self._caches: tuple[Cache, Cache] | None = None

    def predict(self, batch: Batch) -> Prediction:
        """Classify the images in their order, each after it has been entered into the caches."""
        chosen, text, scale = self._chosen, batch.head.features, batch.head.logit_scale

        def of_image(views: Tensor) -> Tensor:
            logits = scale * views[0] @ text.T
            return self._step(views[0], logits, logits.softmax(dim=0))

        def of_views(views: Tensor) -> Tensor:
            logits = scale * views @ text.T  # (V, C)
            kept = most_confident(logits, chosen.keep)
            mean = logits[kept].softmax(dim=1).mean(dim=0)
            return self._step(views[kept].mean(dim=0), logits[kept].mean(dim=0), mean)

        if chosen.mode == "mean":
            views = batch.views(chosen.views, min_area=chosen.min_area)
            return Prediction(logits=answer_each(views, len(text), of_views))
        return Prediction(logits=answer_each(batch.tokens().unsqueeze(1), len(text), of_image))

    def _step(self, feature: Tensor, logits: Tensor, probabilities: Tensor) -> Tensor:
        """Update the caches with one image, (D,), (C,) and (C,), and return its adapted logits (C,)."""
        chosen, classes = self._chosen, len(logits)
        positive, negative = self._caches_for(classes)
        entropy = float(entropies(probabilities))
        predicted = int(logits.argmax())
        positive.update(predicted, entropy, feature, logits.argmax().reshape(1))
        # As published: the thresholds are meant for this mixture of units.
        if chosen.entropy_low < entropy_share(probabilities) < chosen.entropy_high:
            doubted = (probabilities > chosen.mask_low) & (probabilities < chosen.mask_high)
            negative.update(predicted, entropy, feature, doubted.nonzero().flatten())
        gain = chosen.positive_alpha * positive.logits(feature)
        return logits + gain - chosen.negative_alpha * negative.logits(feature)

    def _caches_for(self, classes: int) -> tuple[Cache, Cache]:
        """The positive and the negative cache, empty at the start of a stream."""
        if self._caches is None:
            chosen = self._chosen
            self._caches = (
                Cache(classes, chosen.positive_shots, chosen.positive_beta),
                Cache(classes, chosen.negative_shots, chosen.negative_beta),
            )
        return self._caches
