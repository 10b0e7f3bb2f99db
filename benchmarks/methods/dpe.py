"""DPE, dual prototype evolving (Zhang et al., 2024): text and image prototypes that are tuned per image and remembered.

For each image small shifts of the text features and of the class means of a cache (as TDA's, of the most confident
images) are tuned by one step, so that the confident views' prediction is sharper and text and image prototypes of a
class agree. The shifts are thrown away, but after a confident answer the shifted text features enter a running mean,
from which the next image starts. An answer depends on the images before: the run seeds and records their order.

Two choices of the published code are kept, which its third-party copies differ in: the teacher's logits stay in the
graph, so that the text shift learns through them; and the running mean is not normalised again.

The authors' text features are means over the prompts and CuPL's descriptors of the class, all texts alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from apm.errors import UsageError, unknown
from apm.test_time.views import MIN_AREA

from .base import Batch, Json, MethodOptions, Prediction, check_share, display_name, make_settings, settings_record
from .features import answer_each, entropy_share, marginal_entropy, most_confident
from .published import IMAGENETS, OTHERS, Published
from .tda import Cache


@dataclass(frozen=True, kw_only=True)
class DPESettings:
    """The published settings for ImageNet."""

    views: int = 64
    min_area: float = MIN_AREA
    keep: float = 0.1
    """Share of the views, those of lowest entropy, that stand for the image while the shifts are tuned."""
    shots: int = 3
    """Images kept per predicted class."""
    alpha: float = 6.0
    """Weight of the image prototypes in the logits."""
    beta: float = 5.0
    """Sharpness of the likeness to them."""
    lr: float = 6e-4
    """Of AdamW, made anew for each image, with an ε of 1e-3 and a weight decay of 0.1."""
    align: float = 0.5
    """Weight of the contrastive loss between text and image prototypes."""
    confident: float = 0.1
    """The shifted text features are remembered where the answer's entropy, over log2 of the classes, is below this."""
    answer: str = "image"
    """What is classified at the end: ``image``, itself; ``mean``, its confident views, as published for ImageNet-A."""

    def __post_init__(self) -> None:
        check_share("keep", self.keep)
        if self.answer not in ("image", "mean"):
            raise unknown("answer", self.answer, ("image", "mean"))
        if self.shots < 1 or not self.lr > 0:
            raise UsageError("DPE must keep at least one image per class, and its learning rate must be above 0.")


class DualPrototypes:
    """The state of a stream. Memory: about 5·C·D numbers, and as many again while an image's shifts are tuned.

    Args:
        text: (C, D) of unit length.
        scale: of the teacher's logits, the inverse of the contrastive loss's temperature too.
        settings: of the method.
    """

    def __init__(self, text: Tensor, scale: float, settings: DPESettings) -> None:
        self.scale, self.settings = scale, settings
        self.text, self.remembered = text.clone(), 0
        self.cache = Cache(len(text), settings.shots, settings.beta)
        self._means: dict[int, Tensor] = {}

    def step(self, views: Tensor) -> Tensor:
        """Answer an image's views (V, D), of unit length, and learn from it: (C,) logits."""
        chosen = self.settings
        kept, feature, logits = self._stand_in(views, self.text)
        probabilities = (self.scale * views[kept] @ normalize(self.text, dim=1).T).softmax(dim=1).mean(dim=0)
        self._enter(int(logits.argmax()), entropy_share(probabilities), feature)
        classes = torch.tensor(sorted(self._means), device=views.device)  # (M,)
        means = torch.stack([self._means[owner] for owner in sorted(self._means)])  # (M, D)
        text, prototypes = self._tune(views[kept], feature, classes, means)
        if chosen.answer == "mean":
            _, feature, logits = self._stand_in(views, text)
        else:
            feature, logits = views[0], self.scale * views[0] @ text.T
        answer = logits + self._likeness(feature, classes, prototypes)
        if entropy_share(answer.softmax(dim=0)) < chosen.confident:
            self.remembered += 1
            self.text = self.text * (self.remembered / (self.remembered + 1)) + text / (self.remembered + 1)
        return answer

    def _stand_in(self, views: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The confident views' indices, mean feature (D,), not normalised, and mean logits (C,)."""
        logits = self.scale * views @ normalize(text, dim=1).T
        kept = most_confident(logits, self.settings.keep)
        return kept, views[kept].mean(dim=0), logits[kept].mean(dim=0)

    def _enter(self, predicted: int, entropy: float, feature: Tensor) -> None:
        """Put an image into the cache and bring its class's mean up to date."""
        self.cache.update(predicted, entropy, feature, feature.new_zeros(0, dtype=torch.long))
        self._means[predicted] = torch.stack([key for _, key in self.cache.entries(predicted)]).mean(dim=0)

    def _tune(self, kept: Tensor, feature: Tensor, classes: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
        """One step on the shifts: the text (C, D) and the prototypes (M, D) with them, of unit length."""
        chosen = self.settings
        shifts = [torch.zeros_like(self.text).requires_grad_(), torch.zeros_like(means).requires_grad_()]
        optimiser = torch.optim.AdamW(shifts, lr=chosen.lr, eps=1e-3, weight_decay=0.1)
        with torch.enable_grad():
            text, prototypes = normalize(self.text + shifts[0], dim=1), normalize(means + shifts[1], dim=1)
            logits = self.scale * (kept @ text.T).mean(dim=0) + self._likeness(feature, classes, prototypes)
            agreement = self.scale * prototypes @ text[classes].T  # (M, M), a row per image prototype
            alignment = cross_entropy(agreement, torch.arange(len(classes), device=classes.device))
            loss = marginal_entropy(logits.unsqueeze(0)) + chosen.align * alignment
            shifts[0].grad, shifts[1].grad = torch.autograd.grad(loss, shifts)
        optimiser.step()
        return normalize(self.text + shifts[0].detach(), dim=1), normalize(means + shifts[1].detach(), dim=1)

    def _likeness(self, feature: Tensor, classes: Tensor, prototypes: Tensor) -> Tensor:
        """What the image prototypes add to the logits of a feature (D,): (C,)."""
        weights = torch.exp(self.settings.beta * (prototypes @ feature - 1))  # (M,)
        added = feature.new_zeros(len(self.text)).index_add(0, classes, weights)
        return self.settings.alpha * added


_BY_DATASET = {  # α, β, learning rate / 1e-4, weight of the alignment
    "imagenet": (6.0, 5.0, 6.0, 0.5),
    "imagenet-c": (6.0, 5.0, 6.0, 0.5),
    "imagenet-a": (6.0, 5.0, 3.0, 2.5),
    "imagenet-v2": (3.0, 8.0, 5.0, 0.5),
    "imagenet-r": (3.0, 8.0, 6.0, 0.0),
    "imagenet-sketch": (7.0, 7.45, 6.0, 0.2),
    "caltech101": (15.0, 5.0, 6.0, 0.2),
    "dtd": (6.0, 3.0, 6.0, 0.2),
    "eurosat": (3.0, 8.0, 0.5, 0.2),
    "aircraft": (6.0, 2.0, 6.0, 0.2),
    "food101": (3.0, 1.0, 2.0, 0.2),
    "flowers102": (2.5, 5.0, 1.0, 0.2),
    "pets": (4.0, 7.0, 0.5, 0.2),
    "sun397": (6.0, 3.0, 2.0, 0.2),
    "ucf101": (9.0, 8.0, 4.0, 0.2),
}
PUBLISHED = Published(
    source="DPE: α, β, learning rate and alignment by data set; the data set's own prompt",
    by_dataset={
        OTHERS: {"views": 1},
        **{
            name: {
                "alpha": alpha,
                "beta": beta,
                "lr": rate * 1e-4,
                "align": align,
                "answer": "mean" if name == "imagenet-a" else "image",
            }
            for name, (alpha, beta, rate, align) in _BY_DATASET.items()
        },
    },
    augmix=(IMAGENETS,),
    descriptors="together",
)


class DPE:
    """A stream method: prototypes evolve until `reset`."""

    published = PUBLISHED
    stream = True
    gradients = True

    def __init__(self, options: MethodOptions) -> None:
        self.name = display_name("dpe", options)
        self._chosen = make_settings(DPESettings, "dpe", options, views=options.views)
        self.settings: Mapping[str, Json] = settings_record(self._chosen)
        self.reset()

    def reset(self) -> None:
        """Go back to the text features and an empty cache."""
        self.state: DualPrototypes | None = None

    def predict(self, batch: Batch) -> Prediction:
        """Classify the images in their order, each after it has been entered into the cache."""
        head, chosen = batch.head, self._chosen
        state = self.state = self.state or DualPrototypes(head.features, head.logit_scale, chosen)
        views = batch.views(chosen.views, min_area=chosen.min_area)
        return Prediction(logits=answer_each(views, len(head.features), state.step))
