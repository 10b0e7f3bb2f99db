"""From the field of features to one token: a learned object query that attends over it, or its plain mean."""

import torch
from torch import Tensor, nn


class ObjectQuery(nn.Module):
    """One learned query attends over features plus their position codes; what it gathers is the token.

    Keys are values; biases and output projection as in multi-head attention (Vaswani et al. 2017, section 3.2.2).
    """

    def __init__(self, dim: int, heads: int) -> None:
        """Make the query vector (dim,) and the attention with ``heads`` heads."""
        super().__init__()
        self.query = nn.Parameter(torch.empty(dim))
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, features: Tensor, positions: Tensor) -> Tensor:
        """Features (B, Q, D) at locations with codes (Q, D) -> tokens (B, D)."""
        keys = features + positions  # (B, Q, D)
        query = self.query.expand(len(features), 1, -1)  # (B, 1, D)
        token, _ = self.attention(query, keys, keys, need_weights=False)
        return token[:, 0]


class MeanReadout(nn.Module):
    """The mean of the features, as Modi & Rawat 2024 draw it in Figure 1."""

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, Q, D) -> tokens (B, D); where they stand does not matter."""
        return features.mean(dim=1)
