"""DynaPrompt, dynamic test-time prompt tuning (Xiao et al., ICLR 2025): a stream method with a buffer of prompts.

The buffer holds residues, added to the context "a photo of a", that persist from image to image. For each image some
are chosen and tuned by one step on the marginal entropy, with an optimiser that remembers nothing of other images; the
chosen prompts' mean logits answer. Chosen is a prompt with which the image's views are surer, and the image differs
more from its views, than with the prompt least recently used. That one is tuned as well, after it has been emptied
where no prompt is unused: so new directions keep entering. The answers depend on the order of the images.

One AdamW holds the whole buffer, as published, so that the other residues decay by a twenty-thousandth an image. Their
texts are encoded anew only when they are chosen, at least once in P images: the ranking sees them as they were.

The published code confuses, when it intersects the two rankings, a prompt with a place in the ranking by entropy: it
tunes the prompt found at the place that bears the candidate's number. A prompt may so be chosen twice, and then counts
twice. It is done here as published, since that is what the published numbers come from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from apm.errors import UsageError
from apm.test_time.targets import entropies, kept_count

from .base import Batch, MethodOptions, Prediction
from .features import marginal_entropy, usable
from .prompted import PromptSettings, PromptTuned, fresh_optimiser, gather, gradient
from .published import OTHERS, Published


@dataclass(frozen=True, kw_only=True)
class DynaPromptSettings(PromptSettings):
    """The published settings."""

    prompts: int = 12
    """P, of the buffer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompts < 1:
            raise UsageError(f"DynaPrompt's prompts must be 1 or more, not {self.prompts}.")


PUBLISHED = Published(
    source="DynaPrompt: 12 prompts; lr 5e-3 on ImageNet and its variants, 3e-3 else; views as TPT",
    by_dataset={OTHERS: {"lr": 3e-3}},
    prompts="single",
    augmix=(OTHERS,),
)


class DynaPrompt(PromptTuned):
    """Tune those prompts of a buffer that suit the image; the buffer lives until `reset`.

    The extras are TPT's ``entropy_first`` and ``entropy_last``, as means over the chosen prompts, and ``prompts``, how
    many were chosen. Memory: P · C · D numbers, the text features of every prompt.
    """

    published = PUBLISHED
    stream = True
    gradients = True
    registered = "dynaprompt"
    settings_type = DynaPromptSettings
    _chosen: DynaPromptSettings

    def __init__(self, options: MethodOptions) -> None:
        super().__init__(options)
        self.reset()

    def reset(self) -> None:
        """Empty the buffer."""
        self._residues = torch.empty(0)
        """(P, M, W); of no prompts before the first image."""
        self._stale: set[int] = set()
        """Prompts whose residue has decayed a little since `_texts` was computed from it."""
        self.used = [0] * self._chosen.prompts
        """How often each prompt was chosen since it was last emptied."""
        self.order = list(range(self._chosen.prompts))
        """The prompts, the least recently used first."""

    def predict(self, batch: Batch) -> Prediction:
        """Answer the images in their order; one with a feature that is zero or not finite leaves no trace."""
        self.prepare(batch)
        if not len(self._residues):
            self._residues = torch.zeros(self._chosen.prompts, *self._prompt.initial.shape, device=batch.teacher.device)
            self._texts = self._start.features.expand(self._chosen.prompts, -1, -1).clone()  # (P, C, D)
        views = batch.views(self._chosen.views, min_area=self._chosen.min_area)
        good = usable(views)
        rows = [self.step(normalize(own.float(), dim=1)) for own, sound in zip(views, good, strict=True) if sound]
        return gather(good, len(batch.head.features), rows)

    def step(self, views: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Choose, tune and answer for one image, (V, D) of unit length: logits (C,) and figures."""
        scale = self._start.logit_scale
        if 0 not in self.used:
            self._empty(self.order[0])
        logits = scale * views @ self._texts.transpose(1, 2)  # (P, V, C)
        chosen = choose(logits, self.order[0])
        self._refresh(chosen)
        for prompt in chosen:
            self.used[prompt] += 1
            self.order.remove(prompt)
            self.order.append(prompt)
        logits = scale * views @ self._texts[chosen].transpose(1, 2)
        confidence = entropies(logits.softmax(dim=2)).mean(dim=0)  # (V,)
        kept = views[confidence.argsort(stable=True)[: kept_count(len(views), self._chosen.keep)]]
        first = self._entropy(kept, chosen)
        self._tune(set(chosen), kept)
        answer = torch.stack([scale * views[0] @ self._texts[prompt].T for prompt in chosen]).mean(dim=0)
        figures = {
            "entropy_first": first,
            "entropy_last": self._entropy(kept, chosen),
            "prompts": torch.tensor(float(len(chosen))),
        }
        return answer, figures

    def _empty(self, prompt: int) -> None:
        self.used[prompt] = 0
        self._residues[prompt] = 0
        self._texts[prompt] = self._start.features

    def _refresh(self, chosen: list[int]) -> None:
        """Encode anew the chosen prompts that have only decayed since they were last tuned."""
        for prompt in set(chosen) & self._stale:
            if self._residues[prompt].any():
                self._texts[prompt] = self._prompt.features(self._prompt.initial + self._residues[prompt])
        self._stale.difference_update(chosen)

    def _tune(self, chosen: set[int], kept: Tensor) -> None:
        """Step the residues of the chosen prompts, by the kept views (K, D); the others only decay.

        The loss is a mean over the chosen prompts: by how many it is divided matters to Adam as little as its scale.
        """
        optimiser = fresh_optimiser(self._residues, self._chosen.lr, self.weight_decay)
        for _ in range(self._chosen.steps):
            slopes = torch.zeros_like(self._residues)
            for prompt in chosen:
                upstream = gradient(
                    lambda leaf: marginal_entropy(self._start.logit_scale * kept @ leaf.T), self._texts[prompt]
                )
                slopes[prompt] = self._prompt.gradient(self._prompt.initial + self._residues[prompt], upstream)
            self._residues.grad = slopes
            optimiser.step()
            for prompt in chosen:
                self._texts[prompt] = self._prompt.features(self._prompt.initial + self._residues[prompt])
        self._residues.grad = None
        self._stale = set(range(len(self._residues))) - chosen

    def _entropy(self, kept: Tensor, chosen: list[int]) -> Tensor:
        scale = self._start.logit_scale
        return torch.stack([marginal_entropy(scale * kept @ self._texts[prompt].T) for prompt in chosen]).mean()


def choose(logits: Tensor, oldest: int) -> list[int]:
    """Choose the prompts to tune for an image.

    Args:
        logits: (P, V, C) of each prompt and view, view 0 the image itself.
        oldest: the prompt least recently used.

    Returns:
        Prompts in the order in which they count as used, perhaps one twice; the last is `oldest`.
    """
    prompts = len(logits)
    entropy = entropies(logits.softmax(dim=2)).mean(dim=1)  # (P,)
    peak = logits.amax(dim=2)  # (P, V)
    difference = peak[:, 0] - peak[:, 1:].mean(dim=1)
    by_entropy = entropy.topk(prompts).indices.tolist()
    by_difference = difference.topk(prompts).indices.tolist()
    rank = by_entropy.index(oldest)
    certain = by_entropy[min(rank + 1, prompts - 1) :]
    candidates = [prompt for prompt in certain if prompt in by_difference[:rank]]
    return [*(by_entropy[place] for place in candidates), oldest]
