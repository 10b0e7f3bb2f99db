"""C-TPT, calibrated test-time prompt tuning (Yoon et al., ICLR 2024): TPT that also keeps the classes' texts apart.

Prompts whose text features are dispersed make better calibrated predictions, so the loss is TPT's less λ times the
dispersion: the mean distance of the classes' text features, of unit length, from their mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apm.errors import UsageError

from .features import marginal_entropy
from .prompted import PromptSettings
from .published import IMAGENETS, OTHERS, Published
from .tpt import TPT


@dataclass(frozen=True, kw_only=True)
class CTPTSettings(PromptSettings):
    """The published settings for ImageNet and its relatives."""

    dispersion: float = 20.0
    """λ; the authors take 50 on the other data sets."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.dispersion >= 0:
            raise UsageError(f"C-TPT's dispersion must be 0 or more, not {self.dispersion}.")


PUBLISHED = Published(
    source="C-TPT: λ 50, and 20 on ImageNet and its variants; else as TPT",
    by_dataset={IMAGENETS: {"dispersion": 20.0}, OTHERS: {"dispersion": 50.0}},
    prompts="single",
    augmix=(OTHERS,),
)


class CTPT(TPT):
    """Minimise TPT's entropy and maximise the dispersion of the text features, anew for each image.

    The extras are TPT's, and ``dispersion_first`` and ``dispersion_last``.
    """

    published = PUBLISHED
    registered = "ctpt"
    settings_type = CTPTSettings
    _chosen: CTPTSettings

    def loss(self, logits: Tensor, text: Tensor, beside: Tensor | None) -> Tensor:
        """TPT's, less λ times the dispersion of the text that gave the logits."""
        return marginal_entropy(logits) - self._chosen.dispersion * dispersion(text)

    def figures(self, logits: Tensor, text: Tensor) -> dict[str, Tensor]:
        """TPT's entropy, and the dispersion."""
        return {"entropy": marginal_entropy(logits), "dispersion": dispersion(text)}


def dispersion(text: Tensor) -> Tensor:
    """Mean Euclidean distance of text features (C, D) from their mean: a scalar."""
    return torch.linalg.vector_norm(text - text.mean(dim=0), dim=1).mean()
