"""The gradient of text features in a prompt's context vectors, for teachers that open their text tower.

The context, such as "a photo of a", is a run of word vectors shared by the prompts of all classes. Tuning it (Zhou et
al. 2022, CoOp; Shu et al. 2022, TPT) needs the text tower's gradient for every class. Here it is computed for a group
of classes at a time, each run forward again in its turn, so that memory does not grow with the number of classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from apm.errors import UsageError


@runtime_checkable
class PromptTunable(Protocol):
    """What a teacher offers beside the `Teacher` protocol for its prompt to be tuned."""

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
        group: classes encoded at a time; bounds the memory.

    Raises:
        UsageError: the teacher's text tower cannot be reached, or its tokenizer does not keep the context in one piece.
    """

    def __init__(
        self, teacher: Any, class_names: Sequence[str], *, template: str = "a photo of a {}.", group: int = 32
    ) -> None:
        embedding = _word_embedding(teacher)
        if embedding is None:
            raise UsageError(
                f"Teacher {teacher.name} cannot tune its prompt: its text tower has no token embedding to reach. "
                "Leave the method out, or take a CLIP of open_clip."
            )
        self._model, self._embedding, self._group = teacher.model, embedding, group
        device = embedding.weight.device
        prompts = [template.replace("{}", name) for name in class_names]
        self._tokens: Tensor = teacher.tokenizer(prompts).to(device)  # (C, L)
        self._slots = _context_slots(teacher, template.partition("{}")[0].strip(), self._tokens)
        rows = self._tokens[0, self._slots]
        self.initial = embedding.weight.detach()[rows].float().clone()
        """(M, W) float32: the word vectors of the context as the teacher has them."""

    @torch.no_grad()
    def features(self, context: Tensor) -> Tensor:
        """Text features under a context (M, W): (C, D) float32 of unit length."""
        return torch.cat([self._encode(tokens, context) for tokens in self._tokens.split(self._group)])

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
            groups = zip(self._tokens.split(self._group), feature_gradient.split(self._group), strict=True)
            for tokens, upstream in groups:
                (part,) = torch.autograd.grad(self._encode(tokens, leaf), leaf, upstream)
                total += part
        return total

    def _encode(self, tokens: Tensor, context: Tensor) -> Tensor:
        with _replaced(self._embedding, self._slots, context):
            return normalize(self._model.encode_text(tokens).float(), dim=1)


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
    """Where the context stands in every prompt: what the prompts share with the context alone, but for the start."""
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
        words = context.to(output.dtype).expand(len(output), -1, -1)  # (C, M, W)
        return torch.cat([output[:, : slots.start], words, output[:, slots.stop :]], dim=1)

    handle = embedding.register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()
