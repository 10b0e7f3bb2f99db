"""CoCoOp, conditional context optimisation (Zhou et al., CVPR 2022): a learned prompt that bends with the image.

And TPT from there.

A small network makes of the image's feature, at unit length, one vector that is added to each of the learned word
vectors: all classes are encoded anew for each image. ``tpt+cocoop`` tunes the context that results, for each image with
an optimiser of its own. There the network gets the image's feature NOT at unit length: so TPT's published code does it,
and so it is done here, though CoCoOp was not trained so.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .base import Batch, Prediction
from .coop import CoOp, TPTCoOp
from .prompted import Tuned


class CoCoOp(CoOp):
    """Zero-shot with a prompt made for each image; no views and no steps."""

    registered = "cocoop"
    conditional = True

    def predict(self, batch: Batch) -> Prediction:
        """Classify each image with its own prompt."""
        self.prepare(batch)
        rows = []
        for token in batch.tokens().float():
            text = self._prompt.features(self.learned.prompt.conditioned(token))
            rows.append(self._start.logit_scale * text @ normalize(token, dim=0))
        return Prediction(logits=torch.stack(rows))


class TPTCoCoOp(TPTCoOp):
    """TPT from the context that CoCoOp makes of the image. Its extras are TPT's."""

    registered = "tpt+cocoop"
    conditional = True
    starts_alike = False

    def beside(self, batch: Batch) -> Iterable[Tensor]:
        """The features of the images themselves, (D,), at the teacher's length."""
        return batch.tokens().float()

    def tune(self, views: Tensor, beside: Tensor | None = None) -> Tuned:
        """Tune the prompt that the meta-net makes of the image's feature, for one image's unit views (V, D)."""
        assert beside is not None
        initial = self.learned.prompt.for_image(beside)
        return self._steps(views, initial, self._prompt.features(initial), None)
