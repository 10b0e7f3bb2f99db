"""R-TPT, robust test-time prompt tuning (Sheng et al., CVPR 2025): every view sharpens itself, and like views vote.

The loss is the mean of the confident views' entropies, where TPT takes the entropy of their mean: views that disagree
need not be brought together. With the tuned prompt ALL views answer, each weighted by how much it is like its nearest
neighbours among the others.

A view is never its own neighbour here. The published code leaves out what has a cosine below 1 to be another view, and
in float32 rounding decides whether a view's cosine with itself is below 1: about a third of the views count themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apm.errors import UsageError
from apm.test_time.targets import entropies

from .prompted import PromptSettings, PromptTuned
from .published import OTHERS, Published


@dataclass(frozen=True, kw_only=True)
class RTPTSettings(PromptSettings):
    """The published settings."""

    neighbours: int = 20
    """Views by which a view's weight is judged; fewer than there are views."""
    temperature: float = 1.0
    """Of the weights, in units of the teacher's own: published are 0.01 with a teacher of 0.01. They are a softmax of
    the mean cosine."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.neighbours < self.views:
            raise UsageError(
                f"R-TPT's neighbours must be from 1 to views - 1, not {self.neighbours} of {self.views} views. Use "
                f"more views, rtpt:views={max(64, self.neighbours + 1)}, or fewer neighbours."
            )
        if not self.temperature > 0:
            raise UsageError(f"R-TPT's temperature must be above 0, not {self.temperature}.")


PUBLISHED = Published(source="R-TPT: one setting; prompt and views as TPT", prompts="single", augmix=(OTHERS,))


class RTPT(PromptTuned):
    """Minimise the confident views' mean entropy; then all views answer, weighted by their neighbours.

    The extras ``entropy_first`` and ``entropy_last`` are that mean, in nats, before the first step and after the last.
    """

    published = PUBLISHED
    registered = "rtpt"
    settings_type = RTPTSettings
    _chosen: RTPTSettings

    def loss(self, logits: Tensor, text: Tensor, beside: Tensor | None) -> Tensor:
        """The mean of the kept views' entropies."""
        log = logits.log_softmax(dim=1)
        return -(log.exp() * log).sum(dim=1).mean()

    def figures(self, logits: Tensor, text: Tensor) -> dict[str, Tensor]:
        """The mean of the kept views' entropies."""
        return {"entropy": entropies(logits.softmax(dim=1)).mean()}

    def answer(self, views: Tensor, text: Tensor) -> Tensor:
        """The weighted mean of all views' logits."""
        weights = view_weights(views, self._chosen.neighbours, self._chosen.temperature / self._start.logit_scale)
        return weights @ (self._start.logit_scale * views @ text.T)


def view_weights(views: Tensor, neighbours: int, temperature: float) -> Tensor:
    """Weigh views by the mean of their largest cosines with others.

    Args:
        views: (V, D) of unit length.
        neighbours: how many cosines are averaged, from 1 to V - 1.
        temperature: of the softmax.

    Returns:
        (V,) with sum 1.
    """
    cosines = (views @ views.T).fill_diagonal_(-torch.inf)
    return (cosines.topk(neighbours, dim=1).values.mean(dim=1) / temperature).softmax(dim=0)
