"""What the methods that tune a prompt for each image have in common: which words are tuned, and the steps.

What is tuned are the vectors of the words before the class name, "a photo of a" in the papers. Where the run has a
single prompt with such words, it is taken, so that zero-shot and these methods start from the same prompt. An ensemble
of prompts cannot be tuned: then the papers' is taken, the log says so, and the run's record and tables name it. Some
methods can start from a context that CoOp learned instead, see `learned`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from apm.errors import UsageError
from apm.test_time.views import MIN_AREA
from apm.text.prompts import TunablePrompt
from apm.text.zeroshot import ZeroShotHead

from .base import Batch, Json, MethodOptions, Prediction, check_share, display_name, make_settings, settings_record
from .features import marginal_entropy, most_confident, usable
from .learned import LearnedContext

PAPER_PROMPT = "a photo of a {}."

_log = logging.getLogger("apm")


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """Settings of every method that tunes a prompt; the defaults are TPT's."""

    prompt: str | None = None
    """Its words before the ``{}`` are tuned; None: the run's own prompt if it has a single one, else the paper's."""
    views: int = 64
    min_area: float = MIN_AREA
    keep: float = 0.1
    """Share of the views, those of lowest entropy, that the loss looks at."""
    steps: int = 1
    lr: float = 5e-3
    """Of AdamW with torch's default weight decay, 0.01."""
    group: int = 32
    """Classes whose text is encoded at a time; never changes an answer."""

    def __post_init__(self) -> None:
        if self.steps < 0 or self.group < 1:
            raise UsageError(f"steps must be 0 or more and group 1 or more, not {self.steps} and {self.group}.")
        check_share("keep", self.keep)
        if self.prompt is not None and not has_context(self.prompt):
            raise UsageError(f'The prompt "{self.prompt}" cannot be tuned: it needs words before a {{}}.')
        if not self.lr > 0:
            raise UsageError(f"lr must be above 0, not {self.lr}.")


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """One image's prompt and what it says."""

    context: Tensor
    """(M, W) the tuned word vectors."""
    logits: Tensor
    """(C,) the answer."""
    extras: dict[str, Tensor]
    """Figures of the image, scalars."""


class PromptTuned:
    """A method that tunes the prompt's context anew for each image; what differs is the loss, and how it answers."""

    stream = False
    gradients = True
    registered: ClassVar[str]
    """Its name in the registry."""
    settings_type: ClassVar[type[PromptSettings]] = PromptSettings
    weight_decay = 0.01
    learned: LearnedContext | None = None
    """Where it starts instead of words."""

    def __init__(self, options: MethodOptions) -> None:
        self.name = display_name(self.registered, options)
        self._chosen = make_settings(self.settings_type, self.registered, options, views=options.views)
        self.settings: Mapping[str, Json] = settings_record(self._chosen)
        self._run_head: ZeroShotHead | None = None

    def predict(self, batch: Batch) -> Prediction:
        """Tune the prompt for each image and classify it.

        An image of which a view's feature is zero or not finite has no answer: its row is NaN. The extras are what
        `figures` says before the first step, ``…_first``, and after the last, ``…_last``.
        """
        self.prepare(batch)
        views = batch.views(self._chosen.views, min_area=self._chosen.min_area)  # (B, V, D)
        good = usable(views)
        pairs = zip(views, self.beside(batch), good, strict=False)
        tuned = [self.tune(normalize(rows.float(), dim=1), beside) for rows, beside, sound in pairs if sound]
        return gather(good, len(batch.head.features), [(one.logits, one.extras) for one in tuned])

    def loss(self, logits: Tensor, text: Tensor, beside: Tensor | None) -> Tensor:
        """What a step lowers, as a function of the kept views' logits (K, C) and the text features (C, D): a scalar."""
        raise NotImplementedError

    def figures(self, logits: Tensor, text: Tensor) -> dict[str, Tensor]:
        """What is recorded of the kept views' logits (K, C) and the text features (C, D): name → scalar."""
        return {"entropy": marginal_entropy(logits)}

    def answer(self, views: Tensor, text: Tensor) -> Tensor:
        """The logits (C,) of an image, from its views (V, D) and the tuned text features (C, D)."""
        return self._start.logit_scale * views[0] @ text.T

    def beside(self, batch: Batch) -> Iterable[Tensor | None]:
        """What the loss is given for each image besides its views, (V, …) each; nothing by default."""
        return repeat(None)

    def own_prompt(self, templates: Sequence[str]) -> str:
        """The prompt that is tuned in a run with these templates."""
        return self.words(templates) if self.learned is None else self.learned.template

    def words(self, templates: Sequence[str]) -> str:
        """As `own_prompt`, in words also where the context was learned."""
        suits = len(templates) == 1 and has_context(templates[0])
        return self._chosen.prompt or (templates[0] if suits else PAPER_PROMPT)

    def prepare(self, batch: Batch) -> None:
        """Make the prompt and its untuned features, once for a teacher and its class names."""
        if self._run_head is batch.head:
            return
        if self.learned is None:
            self._prompt, self._start = self._from_words(batch)
        else:
            self._prompt, self._start = self.learned.before(batch.head, batch.teacher, group=self._chosen.group)
        self._run_head = batch.head

    def _from_words(self, batch: Batch) -> tuple[TunablePrompt, ZeroShotHead]:
        """The prompt, and its zero-shot head before any step."""
        names, template = batch.head.labels, self.words(batch.head.templates)
        prompt = TunablePrompt(batch.teacher, names, template=template, group=self._chosen.group)
        if batch.head.templates == (template,):
            return prompt, batch.head
        _log.warning(
            '%s starts from the prompt "%s", which is not what the run\'s other methods use.', self.name, template
        )
        return prompt, ZeroShotHead.build(batch.teacher, names, (template,))

    def tune(self, views: Tensor, beside: Tensor | None = None) -> Tuned:
        """Tune the prompt for one image.

        Args:
            views: (V, D) of unit length, view 0 the image itself.
            beside: one of what `beside` gives.
        """
        return self._steps(views, self._prompt.initial, self._start.features, beside)

    def _steps(self, views: Tensor, initial: Tensor, text: Tensor, beside: Tensor | None) -> Tuned:
        """As `tune`, from a context (M, W) and its text features (C, D)."""
        scale = self._start.logit_scale
        chosen = most_confident(scale * views @ text.T, self._chosen.keep)  # once, before the first step
        kept, beside = views[chosen], None if beside is None else beside[chosen]
        first = self.figures(scale * kept @ text.T, text)
        context = initial.clone()
        optimiser = fresh_optimiser(context, self._chosen.lr, self.weight_decay)
        for _ in range(self._chosen.steps):
            upstream = gradient(lambda leaf: self.loss(scale * kept @ leaf.T, leaf, beside), text)
            context.grad = self._prompt.gradient(context, upstream)
            optimiser.step()
            text = self._prompt.features(context)
        last = self.figures(scale * kept @ text.T, text)
        extras = {f"{name}_first": value for name, value in first.items()}
        extras |= {f"{name}_last": value for name, value in last.items()}
        return Tuned(context=context, logits=self.answer(views, text), extras=extras)


def has_context(template: str) -> bool:
    """Whether a prompt has words before its ``{}``."""
    return "{}" in template and bool(template.partition("{}")[0].strip())


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The gradient of a scalar function at a tensor, of the tensor's shape."""
    leaf = at.detach().clone().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(loss(leaf), leaf)
    return slope


def fresh_optimiser(context: Tensor, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """The papers' optimiser, with no memory of other images."""
    return torch.optim.AdamW([context], lr=lr, weight_decay=weight_decay)


def gather(good: Sequence[bool], classes: int, rows: Sequence[tuple[Tensor, Mapping[str, Tensor]]]) -> Prediction:
    """Put the answers (C,) and figures of the images that have one in their places, and NaN in the others."""
    places = torch.tensor(good).nonzero().flatten()
    logits = torch.full((len(good), classes), math.nan)
    extras: dict[str, Tensor] = {}
    for place, (row, figures) in zip(places.tolist(), rows, strict=True):
        logits = logits.to(row.device)
        logits[place] = row
        for name, value in figures.items():
            extras.setdefault(name, torch.full((len(good),), math.nan, device=value.device))[place] = value
    return Prediction(logits=logits, extras=extras)
