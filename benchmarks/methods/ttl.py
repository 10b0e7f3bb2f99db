"""TTL, test-time low-rank adaptation (Imam et al., 2024): LoRA in the image tower, tuned anew for each image.

Low-rank matrices beside the query and value projections of the last blocks are tuned so that the image's views are
predicted with more confidence, each view by itself, and the sure views with more weight. The texts stay as they are.

The first matrix of each pair is drawn from the run's seed, the same for every image, and the second is zero: before the
first step the tower is the teacher's own, bit for bit. Works with every tower whose blocks have self-attention with
query and value projections: open_clip's and timm's transformers, CoCa, EVA, SigLIP, Swin; not with a ResNet or a
ConvNeXt, the embedded teacher among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from apm.errors import UsageError
from apm.test_time.targets import entropies
from apm.test_time.views import MIN_AREA

from .base import Batch, Json, MethodOptions, Prediction, display_name, make_settings, settings_record
from .features import usable
from .prompted import gather
from .published import OTHERS, Published
from .towers import Projection, TunableTower, set_gradients


@dataclass(frozen=True, kw_only=True)
class TTLSettings:
    """The published settings."""

    views: int = 64
    min_area: float = MIN_AREA
    blocks: int = 3
    """How many of the last attention layers are adapted."""
    rank: int = 16
    scale: float = 2.0
    """Weight of the low-rank product."""
    margin: float = 0.4
    """A view of entropy H, in nats, counts exp(margin − H)."""
    steps: int = 1
    lr: float = 5e-3
    """Of AdamW with torch's default weight decay, 0.01."""

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UsageError(f"TTL's steps must be 0 or more, not {self.steps}.")
        if self.blocks < 1 or self.rank < 1:
            raise UsageError(f"TTL's blocks and rank must be 1 or more, not {self.blocks} and {self.rank}.")
        if not self.lr > 0:
            raise UsageError(f"TTL's lr must be above 0, not {self.lr}.")


class LowRank:
    """What is added to the query and value projections of some attention layers: scale · B·A for each.

    Args:
        tower: whose last layers they are.
        settings: blocks, rank and scale.
        seed: the first matrices, A, are drawn from it (Xavier's uniform); the second, B, are zero.
    """

    def __init__(self, tower: TunableTower, settings: TTLSettings, seed: int) -> None:
        self.scale = settings.scale
        self._sites: list[Projection] = [site for pair in tower.attention()[-settings.blocks :] for site in pair]
        self._own = {site.name: tower.parameter(site.name) for site in self._sites}  # (rows, width) each
        generator = torch.Generator().manual_seed(seed)
        self.leaves: list[Tensor] = []
        for site in self._sites:
            first = torch.empty(settings.rank, self._own[site.name].shape[1])
            torch.nn.init.xavier_uniform_(first, generator=generator)
            second = torch.zeros(site.stop - site.start, settings.rank)
            self.leaves += [matrix.to(tower.device).requires_grad_() for matrix in (first, second)]

    def weights(self) -> dict[str, Tensor]:
        """The adapted parameters by name."""
        found = dict(self._own)
        for site, first, second in zip(self._sites, self.leaves[::2], self.leaves[1::2], strict=True):
            rows = found[site.name]
            adapted = rows[site.start : site.stop] + self.scale * second @ first
            found[site.name] = torch.cat([rows[: site.start], adapted, rows[site.stop :]])
        return found


PUBLISHED = Published(source="TTL: one setting; prompt and views as TPT", prompts="single", augmix=(OTHERS,))


class TTL:
    """Tune LoRA for each image and classify the image itself with the adapted tower.

    The extras ``entropy_first`` and ``entropy_last`` are the views' mean entropy in nats, before the first step and
    before the last. (The loss itself need not fall: its weights rise as the entropies fall.)
    """

    published = PUBLISHED
    stream = False
    gradients = True
    encodes_views = True
    """Known features of views are of no use to it."""

    def __init__(self, options: MethodOptions) -> None:
        self.name = display_name("ttl", options)
        self._chosen = make_settings(TTLSettings, "ttl", options, views=options.views)
        self.settings: Mapping[str, Json] = settings_record(self._chosen)
        self._seed = options.seed

    def predict(self, batch: Batch) -> Prediction:
        """Adapt to each image by itself; one whose token is zero or not finite has no answer."""
        tower, head = TunableTower(batch.teacher, "ttl"), batch.head
        tower.attention()  # a tower that cannot be adapted fails even if no image is usable
        good = usable(batch.tokens().unsqueeze(1))
        rows = []
        for index, sound in enumerate(good):
            if sound:
                pixels = batch.view_pixels(index, self._chosen.views, min_area=self._chosen.min_area)
                rows.append(self._adapt(tower, pixels, head.features, head.logit_scale))
        return gather(good, len(head.features), rows)

    def _adapt(
        self, tower: TunableTower, pixels: Tensor, text: Tensor, scale: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The logits (C,) of view 0 of (V, 3, H, W), and figures."""
        chosen = self._chosen
        lora = LowRank(tower, chosen, self._seed)
        optimiser = torch.optim.AdamW(lora.leaves, lr=chosen.lr)
        means: list[Tensor] = []

        def loss(features: Tensor, at: slice) -> Tensor:
            return weighted_entropy(scale * features @ text.T, chosen.margin).sum() / len(pixels)

        for _ in range(chosen.steps):
            features, gradients = tower.gradients(pixels, lora.leaves, lora.weights, loss)
            means.append(entropies((scale * features @ text.T).softmax(dim=1)).mean())
            set_gradients(lora.leaves, gradients)
            optimiser.step()
        with torch.no_grad():
            feature = tower.features(pixels[:1], lora.weights())[0]
        figures = {"entropy_first": means[0], "entropy_last": means[-1]} if means else {}
        return scale * text @ feature, figures


def weighted_entropy(logits: Tensor, margin: float) -> Tensor:
    """Entropy H in nats of each view (V, C), times exp(margin − H), a weight that is held constant: (V,)."""
    log = logits.log_softmax(dim=1)
    entropy = -(log.exp() * log).sum(dim=1)
    return entropy * (margin - entropy.detach()).exp()
