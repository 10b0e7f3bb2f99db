"""TENT (Wang et al., ICLR 2021) on CLIP: normalisation layers are tuned until a batch's predictions are surer.

As its successors for CLIP run it: the weights and biases of the image tower's LayerNorm, ten steps of Adam on the mean
entropy of a batch of 128, everything reset before the next batch. See `norm_tuned` for which towers it works with.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from apm.test_time.targets import entropies

from .base import Batch
from .norm_tuned import NormTuned, logits_of
from .towers import TunableTower, set_gradients


class Tent(NormTuned):
    """Lower the mean entropy of a batch's predictions, then classify the batch.

    The extras ``entropy_first`` and ``entropy_last`` are each image's entropy in nats, before the first step and after
    the last.
    """

    registered = "tent"

    def adapt(
        self, tower: TunableTower, leaves: Mapping[str, Tensor], pixels: Tensor, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `NormTuned.adapt`."""
        head = batch.head
        optimiser = self.optimiser(leaves)
        figures: dict[str, Tensor] = {}

        def loss(features: Tensor, at: slice) -> Tensor:
            log = (head.logit_scale * features @ head.features.T).log_softmax(dim=1)
            return -(log.exp() * log).sum() / len(pixels)

        for _ in range(self._chosen.steps):
            features, gradients = tower.gradients(pixels, list(leaves.values()), lambda: leaves, loss)
            figures.setdefault("entropy_first", entropies(head.probabilities(features)))
            set_gradients(leaves.values(), gradients)
            optimiser.step()
        logits = logits_of(tower, leaves, pixels, head)
        return logits, {**figures, "entropy_last": entropies(logits.softmax(dim=1))}
