"""WATT, weight average test-time adaptation (Osowiechi et al., NeurIPS 2024): CLIPArTT's loss under eight prompts.

For each of eight prompts the image tower's normalisation layers are tuned for two steps, an image's text being its best
class in that prompt; the eight results are averaged, and that five times. The batch is then classified with the mean of
the eight prompts' text features. Everything is reset before the next batch. See `norm_tuned` for which towers it works
with.

Two forms: in ``sequence`` (WATT-S) each prompt goes on from where the one before came to, in ``parallel`` (WATT-P) each
starts from the last average. Adam is made anew for every visit of a prompt: a choice of ours, which the description
leaves open. The prompts are the method's own, whatever the run's: CLIP's seven and "a photo of a {}.".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apm.errors import unknown
from apm.labels import prompt_templates
from apm.text.zeroshot import ZeroShotHead

from .base import Batch, MethodOptions
from .clipartt import likeness_step, loss_figures
from .norm_tuned import NormSettings, NormTuned, logits_of
from .towers import TunableTower

MODES = ("sequence", "parallel")


@dataclass(frozen=True, kw_only=True)
class WATTSettings(NormSettings):
    """The published settings."""

    steps: int = 2
    """For each prompt in each round."""
    rounds: int = 5
    mode: str = "sequence"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in MODES:
            raise unknown("mode", self.mode, MODES)


class WATT(NormTuned):
    """Tune under each prompt, average the weights, and classify with the mean of the prompts.

    The extras ``loss_first`` and ``loss_last`` are the losses before the first step and before the last, the same for
    all images of a batch.
    """

    registered = "watt"
    settings_type = WATTSettings
    _chosen: WATTSettings

    def __init__(self, options: MethodOptions) -> None:
        super().__init__(options)
        self.templates = (*prompt_templates("single"), *prompt_templates("simple"))
        self._heads: tuple[ZeroShotHead, list[Tensor]] | None = None
        self._run_head: ZeroShotHead | None = None

    def own_prompt(self, templates: Sequence[str]) -> str:
        """What it uses in place of the run's prompts."""
        return f"[the {len(self.templates)} prompts of WATT] {{}}"

    def adapt(
        self, tower: TunableTower, leaves: Mapping[str, Tensor], pixels: Tensor, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `NormTuned.adapt`."""
        mean, texts = self._prepare(batch)
        scale, losses = mean.logit_scale, []
        average = {name: leaf.detach().clone() for name, leaf in leaves.items()}
        for _ in range(self._chosen.rounds):
            total = {name: torch.zeros_like(value) for name, value in average.items()}
            _put(leaves, average)
            for text in texts:
                if self._chosen.mode == "parallel":
                    _put(leaves, average)
                optimiser = self.optimiser(leaves)
                for _ in range(self._chosen.steps):
                    features = tower.features(pixels, leaves)
                    best = text[(features @ text.T).argmax(dim=1)]  # (B, D)
                    losses.append(likeness_step(tower, leaves, pixels, features, best, scale))
                    optimiser.step()
                for name, leaf in leaves.items():
                    total[name] += leaf.detach()
            average = {name: value / len(texts) for name, value in total.items()}
        return logits_of(tower, average, pixels, mean), loss_figures(losses, len(pixels))

    def _prepare(self, batch: Batch) -> tuple[ZeroShotHead, list[Tensor]]:
        """The head of all prompts, and each prompt's text features (C, D), made once for a teacher and its names."""
        if self._heads is None or self._run_head is not batch.head:
            teacher, names = batch.teacher, batch.head.labels
            each = [ZeroShotHead.build(teacher, names, (template,)).features for template in self.templates]
            self._heads = ZeroShotHead.build(teacher, names, self.templates), each
            self._run_head = batch.head
        return self._heads


def _put(leaves: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into the leaves."""
    with torch.no_grad():
        for name, leaf in leaves.items():
            leaf.copy_(values[name])
