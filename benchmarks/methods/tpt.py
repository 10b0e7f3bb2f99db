"""TPT, test-time prompt tuning (Shu et al., NeurIPS 2022): the prompt is tuned until the confident views agree.

What is tuned are the vectors of the words before the class name, "a photo of a" in the paper. Where the run has a
single prompt with such words, it is taken, so that zero-shot and TPT start from the same prompt and TPT with zero steps
is zero-shot, bit for bit. An ensemble of prompts cannot be tuned: then TPT takes the paper's, says so in the log,
and the run's record and its tables name what was used.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from apm.errors import UsageError
from apm.prompt_tuning import TunablePrompt
from apm.targets import entropies, kept_count
from apm.views import MIN_AREA
from apm.zeroshot import ZeroShotHead

from .base import Batch, Json, MethodOptions, Prediction, check_share, display_name, make_settings, settings_record

PAPER_PROMPT = "a photo of a {}."

_log = logging.getLogger("apm")


@dataclass(frozen=True, kw_only=True)
class TPTSettings:
    """The published settings."""

    prompt: str | None = None
    """Its words before the ``{}`` are tuned; None: the run's own prompt if it has a single one, else the paper's."""
    views: int = 64
    min_area: float = MIN_AREA
    keep: float = 0.1
    """Share of the views, those of lowest entropy, whose mean prediction is sharpened."""
    steps: int = 1
    lr: float = 5e-3
    """Of AdamW with torch's default weight decay, 0.01."""
    group: int = 32
    """Classes whose text is encoded at a time; never changes an answer."""

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UsageError(f"TPT with {self.steps} steps: 0 or more are possible.")
        check_share("keep", self.keep)
        if self.prompt is not None and not _has_context(self.prompt):
            raise UsageError(f'TPT cannot tune the prompt "{self.prompt}": it needs words before a {{}}.')
        if not self.lr > 0:
            raise UsageError(f"TPT with learning rate {self.lr}: it must be above 0.")


class TPT:
    """Minimise the entropy of the confident views' mean prediction over the prompt's context, for each image afresh."""

    stream = False

    def __init__(self, options: MethodOptions) -> None:
        self.name = display_name("tpt", options)
        self._chosen = make_settings(TPTSettings, "tpt", options, views=options.views)
        self.settings: Mapping[str, Json] = settings_record(self._chosen)
        self._run_head: ZeroShotHead | None = None

    def predict(self, batch: Batch) -> Prediction:
        """Tune the prompt for each image and classify the image itself.

        The extras ``entropy_first`` and ``entropy_last`` are the entropies, in nats, of the kept views' mean prediction
        before the first step and after the last.
        """
        self._prepare(batch)
        views = batch.views(self._chosen.views, min_area=self._chosen.min_area)  # (B, V, D)
        rows = [self._tune(normalize(features, dim=1)) for features in views]
        if self._chosen.steps == 0:
            logits = self._start.logits(batch.tokens())
        else:
            logits = torch.stack([row for row, _, _ in rows])
        return Prediction(
            logits=logits,
            extras={
                "entropy_first": torch.stack([first for _, first, _ in rows]),
                "entropy_last": torch.stack([last for _, _, last in rows]),
            },
        )

    def own_prompt(self, templates: Sequence[str]) -> str:
        """The prompt that is tuned in a run with these templates."""
        usable = len(templates) == 1 and _has_context(templates[0])
        return self._chosen.prompt or (templates[0] if usable else PAPER_PROMPT)

    def _prepare(self, batch: Batch) -> None:
        """Make the prompt and its untuned features, once for a teacher and its class names."""
        if self._run_head is batch.head:
            return
        own = batch.head.templates
        template = self.own_prompt(own)
        names = batch.head.labels
        self._prompt = TunablePrompt(batch.teacher, names, template=template, group=self._chosen.group)
        if own == (template,):
            self._start = batch.head
        else:
            _log.warning('TPT starts from the prompt "%s", which is not what the run\'s other methods use.', template)
            self._start = ZeroShotHead.build(batch.teacher, names, (template,))
        self._run_head = batch.head

    def _tune(self, views: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tune the prompt for one image.

        Args:
            views: (V, D) of unit length, view 0 the image itself.

        Returns:
            The image's logits (C,), and the kept views' entropy before and after.
        """
        scale = self._start.logit_scale
        text = self._start.features  # (C, D)
        confidence = entropies((scale * views @ text.T).softmax(dim=1))
        kept = views[confidence.argsort(stable=True)[: kept_count(len(views), self._chosen.keep)]]  # chosen once
        context = self._prompt.initial.clone().requires_grad_()  # (M, W)
        optimiser = torch.optim.AdamW([context], lr=self._chosen.lr)
        first = marginal_entropy(scale * kept @ text.T)
        for _ in range(self._chosen.steps):
            leaf = text.detach().clone().requires_grad_()
            with torch.enable_grad():
                (upstream,) = torch.autograd.grad(marginal_entropy(scale * kept @ leaf.T), leaf)
            context.grad = self._prompt.gradient(context, upstream)
            optimiser.step()
            text = self._prompt.features(context)
        return scale * views[0] @ text.T, first, marginal_entropy(scale * kept @ text.T)


def _has_context(template: str) -> bool:
    return "{}" in template and bool(template.partition("{}")[0].strip())


def marginal_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of the mean prediction of several views: (V, C) logits → scalar."""
    mean = logits.log_softmax(dim=1).logsumexp(dim=0) - torch.tensor(float(len(logits)), device=logits.device).log()
    return -(mean.exp() * mean).sum()
