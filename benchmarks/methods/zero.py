"""ZERO (Farina et al., NeurIPS 2024): the confident views vote, each for its first class alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from apm.test_time.targets import entropies, kept_count
from apm.test_time.views import MIN_AREA

from .base import Batch, Json, MethodOptions, Prediction, check_share, display_name, make_settings, settings_record
from .published import OTHERS, Published


@dataclass(frozen=True, kw_only=True)
class ZeroSettings:
    """The published settings."""

    views: int = 64
    min_area: float = MIN_AREA
    keep: float = 0.3
    """Share of the views, those of lowest entropy, that vote."""

    def __post_init__(self) -> None:
        check_share("keep", self.keep)


PUBLISHED = Published(source="ZERO: one setting; prompt and views as TPT", prompts="single", augmix=(OTHERS,))


class Zero:
    """Majority vote of the confident views: the mean of their predictions at temperature zero."""

    published = PUBLISHED
    stream = False
    gradients = False

    def __init__(self, options: MethodOptions) -> None:
        self.name = display_name("zero", options)
        self._chosen = make_settings(ZeroSettings, "zero", options, views=options.views)
        self.settings: Mapping[str, Json] = settings_record(self._chosen)

    def predict(self, batch: Batch) -> Prediction:
        """Let each image's views vote; ``vote_share`` is the winner's share of the confident views."""
        features = batch.views(self._chosen.views, min_area=self._chosen.min_area)
        logits, shares = [], []
        for view_features in features:
            probabilities = batch.head.probabilities(view_features)  # (V, C)
            votes = zero_votes(probabilities, self._chosen.keep)  # (C,)
            logits.append(vote_logits(votes, probabilities))
            shares.append(votes.max() / votes.sum())
        return Prediction(logits=torch.stack(logits), extras={"vote_share": torch.stack(shares)})


def zero_votes(probabilities: Tensor, keep: float) -> Tensor:
    """Count the votes of one image's confident views.

    A tie is decided by the remaining views in order of confidence: the first whose class is among the tied gives it one
    more vote. Where none is, the most confident view of all chooses among the tied.

    Args:
        probabilities: (V, C) of the views.
        keep: share of the views that vote, in (0, 1].

    Returns:
        (C,) float32: the number of votes, one winner.
    """
    ranked = entropies(probabilities).argsort(stable=True)  # (V,), most confident first
    count = kept_count(len(ranked), keep)
    choices = probabilities.argmax(dim=1)[ranked]  # (V,)
    votes = torch.bincount(choices[:count], minlength=probabilities.shape[1]).float()  # (C,)
    tied = votes == votes.max()
    if int(tied.sum()) > 1:
        deciding = choices[count:][tied[choices[count:]]]  # remaining views that are for a tied class
        best_liked = probabilities[ranked[0]].masked_fill(~tied, -1.0).argmax()
        votes[deciding[0] if len(deciding) else best_liked] += 1
    return votes


def vote_logits(votes: Tensor, probabilities: Tensor) -> Tensor:
    """Votes as logits whose softmax is nearly the share of the votes.

    A class without a vote would have probability zero, an infinite loss and no rank. One more vote, split as all views
    together predict, orders the classes that have as many votes and can never overturn a majority.

    Args:
        votes: (C,) counts.
        probabilities: (V, C) of all views.

    Returns:
        (C,) float32.
    """
    return ((votes + probabilities.mean(dim=0)) / (votes.sum() + 1)).clamp_min(1e-12).log()
