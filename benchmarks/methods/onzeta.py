"""OnZeta, online zero-shot transfer (Qian & Hu, 2024): class proxies learned from the stream, for balanced answers.

Two classifiers answer together: the text features, with a weight for each class that keeps any from being chosen too
often over the whole stream, and class vectors that start as the text features and are moved by every image towards what
the first says. Over the stream the second gains weight. An answer depends on the images before and on the length of the
stream, which must be known in advance: the run tells it (a number of images, nothing of what they show). The answer to
an image uses the state before it.

With the published learning rate a short stream is chaotic: rounding alone makes two runs part ways after some dozens of
images, whose answers are then equally good but not the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import normalize

from apm.errors import UsageError

from .base import Batch, Json, MethodOptions, Prediction, display_name, make_settings, settings_record
from .features import answer_each
from .published import IMAGENETS, OTHERS, Published


@dataclass(frozen=True, kw_only=True)
class OnZetaSettings:
    """The published settings for ImageNet."""

    proxy_rate: float = 0.5
    """Learning rate of the class vectors."""
    weight_rate: float = 20.0
    """Learning rate of the classes' weights."""
    alpha: float = 1.0
    """The least share of the stream that a class is given, in units of 1/C; 0 gives the weights no say."""
    beta: float = 0.8
    """Weight of the class vectors at the end of the stream."""
    temperature: float = 4.0
    """Of the class vectors, in units of the teacher's own: published are 0.04 with a teacher of 0.01."""

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not 0 <= self.beta <= 1:
            raise UsageError("OnZeta's temperature must be above 0 and its beta between 0 and 1.")


class OnlineProxies:
    """The state of a stream. Memory: C·D + C numbers.

    Args:
        text: (C, D) of unit length.
        scale: of the teacher's logits, the inverse of its temperature.
        images: n ≥ 1, the length of the stream.
        settings: of the method.
    """

    def __init__(self, text: Tensor, scale: float, images: int, settings: OnZetaSettings) -> None:
        self.text, self.scale, self.images, self.settings = text, scale, images, settings
        self.proxies = text.clone()
        self.weights = text.new_zeros(len(text))
        self.seen = 0

    def step(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Answer an image (D,) and learn from it.

        Returns:
            Its probabilities (C,), and those of the weighted text features alone.
        """
        chosen, scale = self.settings, self.scale
        self.seen += 1
        root = math.sqrt(self.seen)
        # The old weights: ρ in the exponent multiplies the softmax by exp(ρ).
        by_text = (scale * self.text @ feature + self.weights).softmax(dim=0)
        rate = chosen.weight_rate / root
        self.weights = (self.weights - rate * (by_text - chosen.alpha / len(self.text))).clamp_min(0)
        sharpness = scale / chosen.temperature
        by_proxies = (sharpness * self.proxies @ feature).softmax(dim=0)
        share = chosen.beta * math.sqrt(min(self.seen / self.images, 1))
        answer = share * by_proxies + (1 - share) * by_text
        rate = chosen.proxy_rate * sharpness / root
        self.proxies = normalize(self.proxies - rate * (by_proxies - by_text).outer(feature), dim=1)
        return answer, by_text


PUBLISHED = Published(
    source="OnZeta: β 0.8 on ImageNet and its variants, 0.4 else; α 1, and 0 on Caltech",
    by_dataset={IMAGENETS: {"beta": 0.8}, OTHERS: {"beta": 0.4}, "caltech101": {"alpha": 0.0}},
    prompts="single",
)


class OnZeta:
    """A stream method: class vectors and weights are learned until `reset`."""

    published = PUBLISHED
    stream = True
    gradients = False

    def __init__(self, options: MethodOptions) -> None:
        self.name = display_name("onzeta", options)
        self._chosen = make_settings(OnZetaSettings, "onzeta", options)
        self.settings: Mapping[str, Json] = settings_record(self._chosen)
        self.reset()

    def reset(self) -> None:
        """Go back to the text features and to the start of the stream."""
        self._state: OnlineProxies | None = None

    def predict(self, batch: Batch) -> Prediction:
        """Classify the images in their order.

        Raises:
            ValueError: the batch does not say how long the stream is.
        """
        if self._state is None:
            if batch.stream_length is None:
                raise ValueError("OnZeta needs the stream's length in advance: make the Batch with stream_length.")
            self._state = OnlineProxies(batch.head.features, batch.head.logit_scale, batch.stream_length, self._chosen)
        state = self._state

        def step(views: Tensor) -> Tensor:
            return state.step(views[0])[0].clamp_min(1e-30).log()

        return Prediction(logits=answer_each(batch.tokens().unsqueeze(1), len(state.text), step))
