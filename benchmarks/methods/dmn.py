"""DMN-TF, dual memory networks without training (Zhang et al., 2024): a memory of test images, read by attention.

For each class the memory holds the features of the surest images that were given to it. For a new image each class
makes a classifier of its own from the memory: what it remembers, weighted by likeness to the image. The answer is the
sum of the teacher's probabilities and those of this dynamic classifier. It depends on the images before: the run seeds
and records their order.

The published accuracies choose the weight of the second part, α, among thirteen values by the test labels. That is an
oracle: here the weight is a setting, 1 as in the published code, and ``alpha=oracle``, which a run allows only where it
is asked for ORACLE rows, records beside the answers at 1 those of all thirteen; tables then say what the best would be.

The authors' text features are means over 7 prompts and CuPL's descriptors of the class, all texts alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from apm.errors import UsageError
from apm.test_time.options import setting
from apm.test_time.targets import entropies
from apm.test_time.views import MIN_AREA

from .base import Batch, Json, MethodOptions, Prediction, check_share, display_name, make_settings, settings_record
from .features import answer_each, most_confident
from .published import Published

ORACLE = "oracle"
ALPHAS = (*(factor * 10.0**power for power in range(-3, 3) for factor in (1, 3)), 1000.0)
"""Among these the published accuracies choose, with the test labels."""


def _alpha(text: str) -> float | str:
    """Read the weight."""
    try:
        return ORACLE if text.lower() == ORACLE else float(text)
    except ValueError:
        raise UsageError(f'Setting alpha of method "dmn" is "{text}", which is neither a number nor oracle.') from None


@dataclass(frozen=True, kw_only=True)
class DMNSettings:
    """The published settings, but for 64 views as the other methods have; published are 32."""

    views: int = 64
    min_area: float = MIN_AREA
    keep: float = 0.1
    """Share of the views, those of lowest entropy, whose mean prediction decides what is remembered and where."""
    shots: int = 50
    """Images remembered per class."""
    beta: float = 5.5
    """Sharpness of the attention."""
    alpha: float | str = setting(
        1.0, "Weight of the dynamic classifier's probabilities; or oracle: all of `ALPHAS` beside 1.", parse=_alpha
    )

    def __post_init__(self) -> None:
        check_share("keep", self.keep)
        if isinstance(self.alpha, float) and not 0 <= self.alpha < math.inf:
            raise UsageError(f"DMN's alpha must be 0 or more, not {self.alpha}.")
        if self.shots < 1:
            raise UsageError(f"DMN's shots must be 1 or more, not {self.shots}.")


class DynamicMemory:
    """Features of test images by predicted class.

    A class's classifier is a weighted sum of what is remembered for it, of which only the cosine with the image is
    asked: it follows from the image's cosines with the entries and from those of the entries among each other, which
    are kept. So an image reads every entry once. Memory: E·D numbers for E entries, and C·L² for the cosines, L the
    most entries that any class has, up to `shots`.

    Args:
        text: (C, D) of unit length.
        shots: entries kept per class.
        beta: sharpness: an entry counts exp(−β·(1 − cosine)).
    """

    def __init__(self, text: Tensor, shots: int, beta: float) -> None:
        self.text, self.shots, self.beta = text, shots, beta
        self.entropies: list[list[float]] = [[] for _ in text]
        self._rows: list[list[int]] = [[] for _ in text]  # of `_kept`, by class and slot
        self._count = 0
        self._kept = text.new_empty(64, text.shape[1])  # (≥ E, D)
        self._owners = torch.empty(64, dtype=torch.long, device=text.device)  # (≥ E,) class of each entry
        self._slots = torch.empty(64, dtype=torch.long, device=text.device)  # (≥ E,) its place among those of its class
        # (C, 1 + L, 1 + L) cosines among a class's text, slot 0, and its entries
        self._cosines = (text * text).sum(dim=1)[:, None, None].clone()

    def update(self, predicted: int, entropy: float, feature: Tensor) -> None:
        """Remember a feature (D,) under its predicted class; a full class forgets its most uncertain entry for it."""
        known, rows = self.entropies[predicted], self._rows[predicted]
        if len(known) < self.shots:
            known.append(entropy)
            rows.append(self._new_row(predicted, len(known)))
            slot = len(known)
        else:
            slot = 1 + max(range(self.shots), key=known.__getitem__)
            if entropy >= known[slot - 1]:
                return
            known[slot - 1] = entropy
        self._kept[rows[slot - 1]] = feature
        members = torch.cat([self.text[predicted].unsqueeze(0), self._kept[rows]])  # (1 + entries, D)
        cosines = self._cosines[predicted]
        cosines[slot, : len(members)] = cosines[: len(members), slot] = members @ feature

    def cosines(self, feature: Tensor) -> Tensor:
        """Cosines of a feature (D,) with the classes as they are remembered with regard to it: (C,)."""
        own = self._cosines.new_full(self._cosines.shape[:2], -torch.inf)  # (C, 1 + L); an empty slot has no weight
        own[:, 0] = self.text @ feature
        count = self._count
        own[self._owners[:count], self._slots[:count]] = self._kept[:count] @ feature
        weights = torch.exp(self.beta * (own - 1))
        length = ((weights.unsqueeze(1) @ self._cosines).squeeze(1) * weights).sum(dim=1).clamp_min(0).sqrt()
        return (weights * own.clamp_min(-1)).sum(dim=1) / length.clamp_min(1e-12)

    def _new_row(self, predicted: int, slot: int) -> int:
        """A row of `_kept` for an entry of this class in this slot, from 1."""
        if self._count == len(self._kept):
            self._kept = torch.cat([self._kept, torch.empty_like(self._kept)])
            self._owners = torch.cat([self._owners, torch.empty_like(self._owners)])
            self._slots = torch.cat([self._slots, torch.empty_like(self._slots)])
        if slot == self._cosines.shape[1]:
            more = min(self.shots, 2 * slot) + 1 - slot
            self._cosines = torch.nn.functional.pad(self._cosines, (0, more, 0, more))
        row, self._count = self._count, self._count + 1
        self._owners[row], self._slots[row] = predicted, slot
        return row


PUBLISHED = Published(
    source="DMN-TF: 32 views; CLIP's 7 prompts; α by the test labels is --oracle's",
    settings={"views": 32},
    prompts="simple",
    descriptors="together",
)


class DMN:
    """A stream method: the memory grows with every image until `reset`."""

    published = PUBLISHED
    stream = True
    gradients = False

    def __init__(self, options: MethodOptions) -> None:
        self._chosen = make_settings(DMNSettings, "dmn", options, views=options.views)
        self._searched = self._chosen.alpha == ORACLE
        if self._searched and not options.oracle:
            raise UsageError(
                "dmn:alpha=oracle chooses α with the test labels: it needs --oracle and is marked ORACLE in tables."
            )
        shown = {key: value for key, value in options.overrides.items() if not (self._searched and key == "alpha")}
        self.name = display_name("dmn", replace(options, overrides=shown))  # its own answers are those of α 1
        self.settings: Mapping[str, Json] = settings_record(self._chosen)
        self.reset()

    def reset(self) -> None:
        """Forget every image."""
        self.memory: DynamicMemory | None = None

    def predict(self, batch: Batch) -> Prediction:
        """Classify the images in their order, each after it has been remembered."""
        chosen, text, scale = self._chosen, batch.head.features, batch.head.logit_scale
        alphas = (1.0, *ALPHAS) if self._searched else (float(chosen.alpha),)
        memory = self.memory = self.memory or DynamicMemory(text, chosen.shots, chosen.beta)

        def step(views: Tensor) -> Tensor:
            logits = scale * views @ text.T  # (V, C)
            mean = logits[most_confident(logits, chosen.keep)].softmax(dim=1).mean(dim=0)  # (C,)
            memory.update(int(mean.argmax()), float(entropies(mean)), views[0])
            dynamic = scale * memory.cosines(views[0])  # (C,)
            own, added = logits[0].log_softmax(dim=0), dynamic.log_softmax(dim=0)
            # The logarithm of p_zs + α·p_dyn, also where both underflow.
            return torch.cat([torch.logaddexp(own, added + _log(alpha)) for alpha in alphas])

        views = batch.views(chosen.views, min_area=chosen.min_area)
        answers = answer_each(views, len(alphas) * len(text), step).unflatten(1, (len(alphas), len(text)))
        return Prediction(logits=answers[:, 0], step_logits=answers if self._searched else None)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
