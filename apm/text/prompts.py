"""The gradient of text features with respect to a prompt's context vectors, for teachers with an open text tower.

The context, such as "a photo of a", is a run of word vectors shared by the prompts of all classes. Tuning it (Zhou et
al. 2022, CoOp; Shu et al. 2022, TPT) needs the text tower's gradient for every class. Here it is computed for a group
of classes at a time, each run forward again in its turn, so that memory does not grow with the number of classes. No
group is longer than its longest prompt, where the tower allows it: see `apm.teachers.text_tower`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from apm.errors import UsageError
from apm.teachers.text_tower import TextTower


@runtime_checkable
class PromptTunable(Protocol):
    """What a teacher needs, besides the `Teacher` protocol, for its prompt to be tuned."""

    model: Any
    """With ``encode_text(tokens)``, and an `nn.Embedding` ``token_embedding`` of its own or in ``model.text``."""
    tokenizer: Any
    """Maps a list of texts to tokens (T, L)."""


class TunablePrompt:
    """The prompts of C classes as a function of the M word vectors of their context, the words before the name.

    Args:
        teacher: with an open text tower, see `PromptTunable`.
        class_names: C names.
        template: the prompt, with words before its ``{}``.
        group: classes encoded at a time where each is as long as the context allows, and more of shorter ones in the
            same memory; changes answers by rounding only.
        cut: False encodes every prompt at its full length, which takes longer and gives the same.

    Raises:
        UsageError: the teacher's text tower cannot be reached, or its tokenizer does not keep the context in one piece.
    """

    def __init__(
        self,
        teacher: Any,
        class_names: Sequence[str],
        *,
        template: str = "a photo of a {}.",
        group: int = 32,
        cut: bool = True,
    ) -> None:
        embedding = _word_embedding(teacher)
        if embedding is None:
            raise UsageError(
                f"Teacher {teacher.name} cannot tune its prompt: its text tower has no accessible token embedding. "
                "Leave the method out, or use a CLIP model of open_clip."
            )
        self._embedding = embedding
        device = embedding.weight.device
        prompts = [template.replace("{}", name) for name in class_names]
        ids: Tensor = teacher.tokenizer(prompts).to(device)  # (C, L)
        self._slots = _context_slots(teacher, template.partition("{}")[0].strip(), ids)
        self._tower = TextTower(teacher.model, cut=cut)
        self._batches = [(rows, ids[rows]) for rows in self._tower.batches(ids, tokens=group * ids.shape[1])]
        rows = ids[0, self._slots]
        self.initial = embedding.weight.detach()[rows].float().clone()
        """(M, W) float32: the word vectors of the context as the teacher has them."""

    @torch.no_grad()
    def features(self, context: Tensor) -> Tensor:
        """Text features under a context (M, W): (C, D) float32 of unit length."""
        parts = [self._encode(ids, context) for _, ids in self._batches]
        features = parts[0].new_empty(sum(map(len, parts)), parts[0].shape[1])
        for (rows, _), part in zip(self._batches, parts, strict=True):
            features[rows] = part
        return features

    def gradient(self, context: Tensor, feature_gradient: Tensor) -> Tensor:
        """Pull a gradient in the features back to the context.

        Args:
            context: (M, W).
            feature_gradient: (C, D) ∂L/∂features at this context.

        Returns:
            (M, W) float32 ∂L/∂context. No parameter of the teacher receives a gradient.
        """
        leaf = context.detach().requires_grad_()
        total = torch.zeros_like(leaf)
        with torch.enable_grad():
            for rows, ids in self._batches:
                (part,) = torch.autograd.grad(self._encode(ids, leaf), leaf, feature_gradient[rows])
                total += part
        return total

    def _encode(self, ids: Tensor, context: Tensor) -> Tensor:
        with _replaced(self._embedding, self._slots, context):
            return normalize(self._tower.encode(ids).float(), dim=1)


def _word_embedding(teacher: Any) -> nn.Embedding | None:
    """The text tower's word vectors, of a CLIP with its tower unpacked or in ``text``; None if there are none."""
    if not isinstance(teacher, PromptTunable):
        return None
    for owner in (teacher.model, getattr(teacher.model, "text", None)):
        embedding = getattr(owner, "token_embedding", None)
        if isinstance(embedding, nn.Embedding):
            return embedding
    return None


def _context_slots(teacher: Any, context: str, tokens: Tensor) -> slice:
    """Positions of the context in every prompt: all that the prompts share with the context, except for the start."""
    alone: Tensor = teacher.tokenizer([context]).to(tokens.device)  # (1, L)
    shared = int((tokens == alone).all(dim=0).int().cumprod(dim=0).sum())
    start = int(alone[0, 0] == getattr(teacher.tokenizer, "sot_token_id", None))
    if shared <= start:
        raise UsageError(f'Teacher {teacher.name} cannot tune its prompt: its tokenizer does not keep "{context}".')
    return slice(start, shared)


@contextmanager
def _replaced(embedding: nn.Embedding, slots: slice, context: Tensor) -> Iterator[None]:
    """Let the embedding answer with `context` in the `slots` of every text, for as long as the block lasts."""

    def put(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        words = context[: output.shape[1] - slots.start].to(output.dtype).expand(len(output), -1, -1)  # (C, M, W)
        return torch.cat([output[:, : slots.start], words, output[:, slots.stop :]], dim=1)

    handle = embedding.register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()
