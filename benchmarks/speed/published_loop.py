"""The steps as the published experiments make them: a baseline for the clock, and for nothing else.

Same result as one step of `apm.student.model.APM` (a test says so), by a longer way. The image stands in the batch
eight times. The queries of all copies are laid out as rows; 16 rows at a time go through coordinate MLP and RGB head,
though colours have a loss of weight zero; what comes out is joined, after every chunk, to all that came before it.
Keys and values of all locations are projected. The teacher's two towers run again at every step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from apm.student.config import APMConfig
from apm.student.model import APM, unfold
from apm.student.position import grid_locations, position_code

COPIES = 8
"""Identical copies of the image in a batch."""
ROWS = 16
"""Queries that go through the network together."""
RGB_WEIGHT = 0.0
"""Of the RGB loss, in test-time training."""
TOWERS = "ViT-B-16"
"""The teacher whose towers run at every step, with random weights: time does not depend on them. Its D is 512."""
TEXTS = 10
"""Labels that its text tower reads at every step; the published runs read those of the whole data set."""


class PublishedLoop:
    """A student, its Adam, and one image with its target, ready to `step`."""

    def __init__(
        self,
        config: APMConfig,
        image: Tensor,
        target: Tensor,
        *,
        lr: float = 1e-4,
        rows: int = ROWS,
        towers: Callable[[], object] | None = None,
    ) -> None:
        """Take one image (1, 3, S, S) and its target (1, D); ``towers`` runs at the beginning of each step."""
        self.model = APM(config).to(image.device)
        self.adam = torch.optim.Adam(self.model.parameters(), lr=lr)
        self.rows, self.towers, self.with_positions = rows, towers, config.readout == "query"
        self.images = image.repeat(COPIES, 1, 1, 1)
        self.targets = target.repeat(COPIES, 1)
        self.colours = F.adaptive_avg_pool2d(self.images, config.grid).flatten(2).mT  # (copies, N, 3)
        where = grid_locations(config.grid)
        self.codes = position_code(*where, config.position_dim).to(image)
        self.positions = position_code(*where, config.dim).to(image)

    def step(self) -> Tensor:
        """One step; returns the token's loss before it."""
        if self.towers is not None:
            self.towers()
        self.adam.zero_grad()
        queries = unfold(self.model.column(self.images), self.codes)  # (copies, N, N + P)
        features, colours = queries.new_empty(0, self.targets.shape[1]), queries.new_empty(0, 3)
        for some in queries.flatten(0, 1).split(self.rows):
            answer = self.model.mlp(some)
            features = torch.cat((features, answer))  # (rows so far, D)
            colours = torch.cat((colours, self.model.rgb_head(answer, some)))
        field = features.view(*queries.shape[:2], -1)  # (copies, N, D)
        token = self.model.readout(*((field, self.positions) if self.with_positions else (field,)))  # (copies, D)
        loss = F.mse_loss(token, self.targets)
        (loss + RGB_WEIGHT * F.mse_loss(colours.view_as(self.colours), self.colours)).backward()
        self.adam.step()
        return loss.detach()


def random_towers(device: torch.device) -> Callable[[], object]:
    """Image and text tower of `TOWERS`, which read one image and `TEXTS` labels whenever they are called."""
    import open_clip

    model = open_clip.create_model(TOWERS, device=device).eval()
    image = torch.zeros(1, 3, 224, 224, device=device)
    texts = open_clip.get_tokenizer(TOWERS)(["a photo of a cat."] * TEXTS).to(device)

    @torch.inference_mode()
    def run() -> None:
        model.encode_image(image)
        model.encode_text(texts)

    return run
