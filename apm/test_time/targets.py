"""What the student is overfit to: the teacher's token of the image, or a robust aggregate of many views of it.

With the CLS token as its target a converged student predicts what its teacher predicts, so only another target can
honestly change its accuracy. Those here are made from one image's views and the teacher's own predictions on them:
nothing here is told, or could use, what the image truly shows.

Every aggregate is a direction, given back at the length of the CLS token. The student is trained on un-normalised
tokens by a mean squared error: a target of unit length (CLIP's tokens have about 10) would shrink the loss a
hundredfold and leave Adam, whose steps do not shrink with it, with another problem; and losses could not be compared
between targets. The answer depends on the direction only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from apm.errors import UsageError, unknown
from apm.test_time.mean_shift import mean_shift_mode
from apm.test_time.views import MIN_AREA, check

if TYPE_CHECKING:
    from apm.text.zeroshot import ZeroShotHead

KINDS = ("cls", "mean", "confident", "mta")
"""Ways to aggregate views: the CLS token of the image itself; the mean of the normalised view features; the mean of
those with the lowest entropy (as TPT and ZERO filter views); the mode that MTA finds."""


@dataclass(frozen=True, kw_only=True)
class TargetPolicy:
    """A target in full: which views are made and how they become one vector."""

    kind: str
    """One of `KINDS`."""
    views: int = 64
    """Number of views, the image itself included; 1 for ``cls``."""
    min_area: float = MIN_AREA
    """Smallest share of the image's area in a crop, in (0, 1]."""
    keep: float = 0.3
    """For ``confident``: the share of the views kept, in (0, 1]."""
    cls_weight: float = 0.0
    """Share of the image's own direction blended into the aggregate's, in [0, 1]."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("way to aggregate views", self.kind, KINDS)
        check(self.views, self.min_area)
        if not 0 < self.keep <= 1:
            raise UsageError(f"keep is {self.keep}; it must be above 0 and at most 1.")
        if not 0 <= self.cls_weight <= 1:
            raise UsageError(f"cls_weight is {self.cls_weight}; it must lie between 0 and 1.")


VIEWS, LARGE_CROPS = 16, 0.5
"""Of the named targets: crops of half the image or more, as in the best target that was found (benchmarks/README.md),
and few of them, since the teacher encodes each."""

TARGETS: dict[str, TargetPolicy] = {
    "cls": TargetPolicy(kind="cls", views=1),
    "mean": TargetPolicy(kind="mean", views=VIEWS, min_area=LARGE_CROPS),
    "confident": TargetPolicy(kind="confident", views=VIEWS, min_area=LARGE_CROPS),
    "mta": TargetPolicy(kind="mta", views=VIEWS, min_area=LARGE_CROPS),
}
"""The targets that have a name. ``cls`` is the paper's (Modi & Rawat 2024) and the default everywhere."""

TARGETS["best"] = replace(TARGETS["mta"], views=64)
"""What `python -m apm.benchmarks.studies.choose_target` chose: the best of those that are behind ``cls`` neither on
clean images nor on corrupted ones (benchmarks/README.md)."""


def policy(target: str) -> TargetPolicy:
    """The policy of a named target; an unknown name is a `UsageError` that suggests the nearest."""
    if target not in TARGETS:
        raise unknown("target", target, TARGETS)
    return TARGETS[target]


def check_distilled(target: str, distil: str) -> None:
    """Refuse a target of its own where only the teacher's grid is distilled: nothing would be overfit to it.

    Raises:
        UsageError: unknown target, or one that has no loss.
    """
    if distil == "grid" and policy(target).kind != "cls":
        raise UsageError(f"target={target} but distil=grid, which uses no token; write distil=both.")


def kept_count(views: int, share: float) -> int:
    """How many of `views` a share keeps: rounded down as the published filters do, at least one."""
    return max(1, int(views * share))


def entropies(probabilities: Tensor) -> Tensor:
    """Entropy in nats of each row: (…, C) probabilities → (…)."""
    return torch.special.entr(probabilities).sum(dim=-1)


@torch.no_grad()
def aggregate(target: str | TargetPolicy, view_features: Tensor, head: ZeroShotHead) -> Tensor:
    """Make one target from the teacher's features of one image's views.

    Args:
        target: a name in `TARGETS` or a policy; its kind, share kept and blend are used.
        view_features: (V, D) as the teacher gives them, NOT normalised; view 0 is the image itself.
        head: gives the predictions by which ``confident`` and ``mta`` weigh views.

    Returns:
        (D,) float32 on the features' device, as long as view 0's feature; for ``cls`` that feature, bit for bit.

    Raises:
        UsageError: unknown target.
    """
    chosen = policy(target) if isinstance(target, str) else target
    features = view_features.float()
    token = features[0]  # (D,)
    if chosen.kind == "cls":
        return token
    directions = normalize(features, dim=1)  # (V, D)
    if chosen.kind == "mean":
        combined = directions.mean(dim=0)
    elif chosen.kind == "confident":
        kept = entropies(head.probabilities(features)).argsort(stable=True)[: kept_count(len(features), chosen.keep)]
        combined = directions[kept].mean(dim=0)
    else:
        combined = mean_shift_mode(directions, head.probabilities(features)).vector
    blend = torch.lerp(normalize(combined, dim=0), directions[0], chosen.cls_weight)  # (D,)
    return normalize(blend, dim=0) * torch.linalg.vector_norm(token)
