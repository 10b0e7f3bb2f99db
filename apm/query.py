"""What a query is put through: the coordinate MLP that answers with a feature, and the RGB head beside it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class CoordinateMLP(nn.Module):
    """Query -> feature, the same network for every location: three layers with ReLU, then a linear feature head."""

    def __init__(self, query_dim: int, hidden: Sequence[int], dim: int) -> None:
        """Make the layers ``query_dim -> hidden[0] -> hidden[1] -> hidden[2] -> dim``."""
        super().__init__()
        self.layer1 = nn.Linear(query_dim, hidden[0])
        self.layer2 = nn.Linear(hidden[0], hidden[1])
        self.layer3 = nn.Linear(hidden[1], hidden[2])
        self.head = nn.Linear(hidden[2], dim)

    def forward(self, queries: Tensor) -> Tensor:
        """Queries (..., N + P) -> features (..., D)."""
        x = self.layer1(queries).relu()
        x = self.layer2(x).relu()
        x = self.layer3(x).relu()
        return self.head(x)


class RGBHead(nn.Module):
    """Feature and query -> colour. Has a loss in self-supervised training only, none in test-time training."""

    def __init__(self, dim: int, query_dim: int, hidden: int) -> None:
        """Make the layers ``dim + query_dim -> hidden -> hidden -> 3``."""
        super().__init__()
        self.layer1 = nn.Linear(dim + query_dim, hidden)
        self.layer2 = nn.Linear(hidden, hidden)
        self.layer3 = nn.Linear(hidden, 3)

    def forward(self, features: Tensor, queries: Tensor) -> Tensor:
        """Features (..., D) and their queries (..., N + P) -> colours (..., 3), never negative."""
        x = torch.cat((features, queries), dim=-1)  # [f ; T ; p]
        x = self.layer1(x).relu()
        x = self.layer2(x).relu()
        return self.layer3(x).relu()
