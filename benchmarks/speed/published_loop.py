"""The steps as the published experiments make them: a baseline for the clock, and for nothing else.

Same result as one step of `apm.model.APM` (a test says so), but the image stands in the batch eight times, locations
go through the network sixteen at a time, keys and values of all locations are projected, and the RGB head is run though
its loss has the weight zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apm.column import unfold
from apm.model import APM, APMConfig
from apm.position import grid_locations, position_code

from ..profile import COPIES

CHUNK = 16
"""Locations that go through the network together."""
RGB_WEIGHT = 0.0
"""Of the RGB loss, in test-time training."""


class PublishedLoop:
    """A student, its Adam, and one image with its target, ready to `step`."""

    def __init__(
        self,
        config: APMConfig,
        image: Tensor,
        target: Tensor,
        *,
        lr: float = 1e-4,
        copies: int = COPIES,
        chunk: int = CHUNK,
    ) -> None:
        """Take one image (1, 3, S, S) and its target (1, D)."""
        self.model = APM(config).to(image.device)
        self.adam = torch.optim.Adam(self.model.parameters(), lr=lr)
        self.images = image.repeat(copies, 1, 1, 1)
        self.targets = target.repeat(copies, 1)
        self.colours = F.adaptive_avg_pool2d(self.images, config.grid).flatten(2).mT  # (copies, N, 3)
        rows, cols = grid_locations(config.grid)
        self.chunks = position_code(rows, cols, config.position_dim).to(image.device).split(chunk)
        self.positions = position_code(rows, cols, config.dim).to(image.device)

    def step(self) -> float:
        """One step; returns the token's loss before it."""
        self.adam.zero_grad()
        column = self.model.column(self.images)  # (copies, N)
        features, colours = [], []
        for positions in self.chunks:
            queries = unfold(column, positions)  # (copies, chunk, N + P)
            answer = self.model.mlp(queries)
            features.append(answer)
            colours.append(self.model.rgb_head(answer, queries))
        token = self.model.readout(torch.cat(features, 1), self.positions)  # (copies, D)
        loss = F.mse_loss(token, self.targets)
        (loss + RGB_WEIGHT * F.mse_loss(torch.cat(colours, 1), self.colours)).backward()
        self.adam.step()
        return loss.item()
