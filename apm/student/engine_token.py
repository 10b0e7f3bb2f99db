"""Losses of the token, of B samples at once, with their gradients by hand.

* ``mse``: the mean of squared differences from the target.
* ``cosine``: one minus the cosine with the target.
* ``soft``: what the token says of C labels against what the target says of them (Hinton et al. 2015, *Distilling the
  knowledge in a neural network*, section 2): ``T² · KL(p ‖ q)`` with p and q the softmax over the labels of the
  target's and the token's logits, divided by the temperature T. T² keeps the size of the gradient as T grows. A token's
  length is in no logit: this loss leaves it free, and all directions in which the labels' features do not differ.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apm.student.config import Loss
from apm.student.matmul import mean_of, product

EPS = torch.finfo(torch.float32).eps


class TokenLoss:
    """Forward and hand-written backward of one of the losses above.

    With ``soft``, C labels take 4 C (D + 3 B) bytes: 1,000 of them and tokens of 512 numbers 2 MB, and 12 kB a sample.

    Attributes:
        target: (B, D).
        cosine: (B,) of the latest tokens with it, whatever the loss.
    """

    def __init__(
        self,
        name: Loss,
        batch: int,
        dim: int,
        *,
        temperature: float = 1.0,
        texts: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Make all buffers; `temperature` and C, the number of `texts`, are of ``soft``."""

        def buffer(*shape: int) -> Tensor:
            return torch.zeros(*shape, device=device)

        self.name, self.temperature = name, temperature
        self.target, self.cosine = buffer(batch, dim), buffer(batch)
        if name == "soft":
            assert texts is not None
            self._text = buffer(texts, dim)  # times a token of unit length: its logits, divided by the temperature
            self._wanted, self._more = buffer(batch, texts), buffer(batch, texts)

    def load(self, targets: Tensor, text: Tensor | None) -> None:
        """Take the targets (B, D) and, with ``soft``, text features (C, D) as long as the logit scale."""
        self.target.copy_(targets)
        if self.name == "soft":
            assert text is not None
            self._text.copy_(text / self.temperature)
            self._wanted.copy_(self._log_probabilities(self.target))

    def forward(self, token: Tensor) -> Tensor:
        """Losses (B,) of tokens (B, D)."""
        self.cosine.copy_(F.cosine_similarity(token, self.target, dim=1))
        if self.name == "mse":
            return (token - self.target).square().mean(dim=1)
        if self.name == "cosine":
            return 1 - self.cosine
        said, wanted = self._log_probabilities(token), self._wanted.exp()
        apart = said - self._wanted
        # q - p, and where they are near each other without the rounding of a difference
        near = wanted * torch.expm1(apart.clamp(-1, 1))
        torch.where(apart.abs() < 1, near, said.exp() - wanted, out=self._more)
        # each term is 0 or more: that q - p adds up to 0 takes nothing from their sum, and rounding makes none negative
        return self.temperature**2 * said.shape[1] * mean_of(self._more - wanted * apart)

    def backward(self, token: Tensor) -> Tensor:
        """Gradient (B, D) of each sample's own loss with respect to its token, that of the latest `forward`."""
        if self.name == "mse":
            return (token - self.target) * (2 / token.shape[1])
        length = token.norm(dim=1, keepdim=True).clamp_min(EPS)
        if self.name == "cosine":
            towards = self.target / self.target.norm(dim=1, keepdim=True).clamp_min(EPS)
            return (self.cosine[:, None] * token / length - towards) / length
        unit = token / length
        of_unit = self.temperature**2 * product(self._for_each(token).mT, self._more[:, :, None])[..., 0]  # (B, D)
        return (of_unit - (of_unit * unit).sum(dim=1, keepdim=True) * unit) / length

    def _log_probabilities(self, token: Tensor) -> Tensor:
        """Of the labels, softened: (B, D) -> (B, C)."""
        unit = token / token.norm(dim=1, keepdim=True).clamp_min(EPS)
        return product(self._for_each(token), unit[:, :, None])[..., 0].log_softmax(dim=1)

    def _for_each(self, token: Tensor) -> Tensor:
        """The labels' features, which all samples share: (B, C, D)."""
        return self._text.expand(len(token), -1, -1)
