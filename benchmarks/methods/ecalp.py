"""ECALP, efficient and context-aware label propagation (Li et al., ICLR 2025): labels flow over a graph of the stream.

Texts and all images so far are nodes. Every image is tied to its nearest images and texts, each text holds its class,
and the classes flow along the ties, starting from where the last answer left them. The image that is asked about has a
twin in the graph, whose row is the answer. An answer depends on the images before: the run seeds and records their
order.

An image and its twin are equally like every other image, and which of them is cut from a full list decides the answer.
As published, lists of neighbours are carried from image to image, the old twin is struck from them, and `torch.topk`
decides among equals, over the same columns in the same order as there.

Time and memory grow with the stream: for n images n·D numbers and n sparse rows, each of as many classes as its
neighbours of the third degree have; all of them are gone through for each image, so that a stream takes time
proportional to n².
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn.functional import normalize

from apm.errors import UsageError

from .base import Batch, Json, MethodOptions, Prediction, display_name, make_settings, settings_record
from .features import answer_each
from .published import Published

STARTING_SHARE = 0.2
"""Of an image's highest score, with which it enters the next propagation."""


@dataclass(frozen=True, kw_only=True)
class ECALPSettings:
    """The published settings."""

    texts: int = 3
    """Texts that an image is tied to."""
    images: int = 8
    """Images that an image is tied to, itself among them."""
    gamma: int = 10
    """Power of the likeness that makes the weight of a tie."""
    iterations: int = 3
    scale: float = 1e4
    """Of the scores, for the probabilities."""

    def __post_init__(self) -> None:
        if min(self.texts, self.images, self.gamma, self.iterations) < 1:
            raise UsageError("ECALP's texts, images, gamma and iterations must be 1 or more.")


class PropagationGraph:
    """The state of a stream.

    Args:
        text: (C, D) of unit length.
        settings: of the method.
    """

    def __init__(self, text: Tensor, settings: ECALPSettings) -> None:
        self.text, self.settings = text, settings
        # What tells the classes apart weighs more; a single class tells nothing.
        self.importance = normalize(text.var(dim=0), dim=0) if len(text) > 1 else torch.ones_like(text[0])
        self.count = 0  # images, without the twin
        self._weighted = text.new_empty(0, text.shape[1])  # (≥ n, D) images by importance, of unit length
        self._neighbours = torch.empty(0, 0, dtype=torch.long)  # (n + 1, w), the twin's list last, most alike first
        self._likeness = torch.empty(0, 0)  # (n + 1, w)
        self._texts = torch.empty(0, 0, dtype=torch.long)  # (n + 1, 3)
        self._text_likeness = torch.empty(0, 0)
        self._start = np.empty(0, dtype=np.int64), np.empty(0)  # (n,) class and score of the next propagation's start

    def step(self, feature: Tensor) -> Tensor:
        """Add an image (D,) to the graph and answer it: scores (C,), at least 0."""
        self._link(feature)
        scores = self._propagate()
        highest = scores.max(axis=1).toarray().ravel()
        owners = np.repeat(np.arange(len(highest)), np.diff(scores.indptr))
        top = np.flatnonzero(scores.data == highest[owners])[::-1]  # backwards: the first of equals is written last
        best = np.zeros(len(highest), dtype=np.int64)
        best[owners[top]] = scores.indices[top]
        self._start = best[:-1], STARTING_SHARE * highest[:-1]
        return torch.from_numpy(scores[[-1]].toarray()[0]).to(feature)

    def _link(self, feature: Tensor) -> None:
        """Bring every image's lists up to date with a new image (D,) and its twin."""
        new, count = self.count, self.count + 1
        weighted = normalize(self.importance * feature, dim=0)
        if new == len(self._weighted):
            self._weighted = torch.cat([self._weighted, self._weighted.new_empty(max(64, new), len(feature))])
        self._weighted[new] = weighted
        likeness = (self._weighted[:count] @ feature).cpu()  # (n,) the older image is the weighted one
        both = torch.cat([likeness, likeness[-1:]])  # (n + 1,) the twin's is the image's own
        k = min(self.settings.images, count + 1)
        width = k + min(max(new - k, 0), 2)
        first = both.topk(k)  # not of the whole width, which would decide otherwise among equals
        others = both.scatter(0, first.indices, -2.0).topk(width - k)
        values = torch.cat([first.values, others.values]).expand(2, -1)
        ids = torch.cat([first.indices, others.indices]).expand(2, -1)
        if new:
            kept = self._neighbours[:-1]  # without the old twin's list; the old twin's id was `new`
            old = self._likeness[:-1].masked_fill(kept == new, -1.0)
            added = likeness[:-1].unsqueeze(1).expand(-1, 2)
            ranked = torch.cat([old, added], dim=1).topk(width, dim=1)
            columns = torch.cat([kept, torch.tensor([[new, count]]).expand(new, -1)], dim=1)
            values = torch.cat([ranked.values, values])
            ids = torch.cat([columns.gather(1, ranked.indices), ids])
        self._likeness, self._neighbours, self.count = values, ids, count
        nearest = (self.text @ feature).cpu().topk(min(self.settings.texts, len(self.text)))
        texts, text_likeness = nearest.indices.expand(2, -1), nearest.values.expand(2, -1)
        self._texts = torch.cat([self._texts[:-1], texts]) if new else texts
        self._text_likeness = torch.cat([self._text_likeness[:-1], text_likeness]) if new else text_likeness

    def _propagate(self) -> sparse.csr_array:
        """Let the classes flow: scores of the images and the twin, (n + 1, C)."""
        size, classes, gamma = self.count + 1, len(self.text), self.settings.gamma
        k = min(self.settings.images, size)
        among = _ties(self._neighbours[:, :k], self._likeness[:, :k] ** gamma, size)
        to_texts = _ties(self._texts, self._text_likeness**gamma, classes)
        among = among + among.T
        scale = _scale(among.sum(axis=1) + to_texts.sum(axis=1))
        among = sparse.diags_array(scale) @ among @ sparse.diags_array(scale)
        held = (sparse.diags_array(scale) @ to_texts @ sparse.diags_array(_scale(to_texts.sum(axis=0)))).tocsr()
        owners, values = self._start
        start = (values, (np.arange(len(owners)), owners))
        scores = sparse.csr_array(start, shape=(size, classes), dtype=np.float32)
        for _ in range(self.settings.iterations):
            scores = among @ scores + held
        scores.sort_indices()
        return scores


def _ties(ids: Tensor, weights: Tensor, columns: int) -> sparse.csr_array:
    """A sparse matrix with a row's weights (n, k) at its ids (n, k)."""
    starts = np.arange(0, ids.numel() + 1, ids.shape[1])
    return sparse.csr_array(
        (weights.numpy().ravel(), ids.numpy().ravel(), starts), shape=(len(ids), columns), dtype=np.float32
    )


def _scale(degrees: np.ndarray) -> np.ndarray:
    return (1 / (np.sqrt(degrees) + 1e-6)).astype(np.float32)


PUBLISHED = Published(source="ECALP: one setting")


class ECALP:
    """A stream method: the graph grows with every image until `reset`."""

    published = PUBLISHED
    stream = True
    gradients = False

    def __init__(self, options: MethodOptions) -> None:
        self.name = display_name("ecalp", options)
        self._chosen = make_settings(ECALPSettings, "ecalp", options)
        self.settings: Mapping[str, Json] = settings_record(self._chosen)
        self.reset()

    def reset(self) -> None:
        """Forget every image."""
        self._graph: PropagationGraph | None = None

    def predict(self, batch: Batch) -> Prediction:
        """Classify the images in their order, each after it has been put into the graph."""
        text = batch.head.features
        graph = self._graph = self._graph or PropagationGraph(text, self._chosen)

        def step(views: Tensor) -> Tensor:
            return self._chosen.scale * graph.step(views[0])

        return Prediction(logits=answer_each(batch.tokens().unsqueeze(1), len(text), step))
