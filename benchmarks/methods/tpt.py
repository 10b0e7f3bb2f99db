"""TPT, test-time prompt tuning (Shu et al., NeurIPS 2022): the prompt is tuned until the confident views agree.

Which prompt is tuned: see `prompted`. TPT with zero steps is zero-shot with that prompt, bit for bit.
"""

from __future__ import annotations

from torch import Tensor

from .base import Batch, Prediction
from .features import marginal_entropy
from .prompted import PAPER_PROMPT, PromptSettings, PromptTuned
from .published import OTHERS, Published

__all__ = ["PAPER_PROMPT", "TPT", "TPTSettings", "marginal_entropy"]

TPTSettings = PromptSettings


PUBLISHED = Published(
    source="TPT: one prompt; AugMix views on the cross-dataset sets", prompts="single", augmix=(OTHERS,)
)


class TPT(PromptTuned):
    """Minimise the entropy of the confident views' mean prediction over the prompt's context, anew for each image.

    The extras ``entropy_first`` and ``entropy_last`` are that entropy, in nats, before the first step and after the
    last.
    """

    published = PUBLISHED
    registered = "tpt"
    starts_alike = True
    """Whether every image starts from the same prompt."""

    def predict(self, batch: Batch) -> Prediction:
        """Tune the prompt for each image and classify the image itself."""
        answer = super().predict(batch)
        if self._chosen.steps == 0 and self.starts_alike:
            answer.logits = answer.logits.where(answer.logits.isnan(), self._start.logits(batch.tokens()))
        return answer

    def loss(self, logits: Tensor, text: Tensor, beside: Tensor | None) -> Tensor:
        """The entropy of the mean prediction."""
        return marginal_entropy(logits)
