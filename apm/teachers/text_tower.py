"""The text tower of an open_clip model, run over no more tokens than its answer depends on.

Under a causal mask a token sees only itself and what stands before it. A tower that pools at each text's end token, as
CLIP's does, therefore answers the same when everything behind it is left out: of the 77 places of a prompt of ten words
some sixty are padding. Towers of another kind (no causal mask, a pooling at the first or the last place, a class token
behind the text, the towers of transformers) are run at their full length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_POOLED_AT_THE_END = ("argmax", "eos")
"""Poolings of open_clip's `text_global_pool` that take the token at the text's own end, which its ids give."""


class TextTower:
    """Encodes token ids with as few places as the tower allows.

    Args:
        model: with ``encode_text(ids)``; of one of open_clip's classes for its texts to be cut short.
        cut: False encodes every text at its full length.
    """

    def __init__(self, model: Any, *, cut: bool = True) -> None:
        self.model = model
        found = _causal_transformer(model) if cut else None
        self.cuts = found is not None
        """Whether texts are cut; False: each is encoded at its full length."""
        if found is not None:
            self._prefix, self._owner, self._pool, self._eos = found
            self._encoder = _Encoder(model)

    def lengths(self, ids: Tensor) -> Tensor:
        """How many leading places of each text (T, L) its feature depends on: (T,) integers from 1 to L."""
        if not self.cuts:
            return torch.full((len(ids),), ids.shape[1], device=ids.device)
        at = ids.argmax(dim=1) if self._pool == "argmax" else (ids == self._eos).int().argmax(dim=1)
        return at + 1

    def batches(self, ids: Tensor, *, tokens: int) -> Iterator[Tensor]:
        """Divide the texts (T, L) into batches of like length, the shortest first.

        Yields:
            The numbers (n,) of a batch's texts, on the device of `ids`. What is encoded of a batch is at most `tokens`
            places, or a single text.
        """
        lengths = self.lengths(ids)
        order = lengths.argsort(stable=True)
        start = 0
        for stop, length in enumerate(lengths[order].tolist()):
            if stop > start and (stop - start + 1) * length > tokens:
                yield order[start:stop]
                start = stop
        if len(ids):
            yield order[start:]

    def encode(self, ids: Tensor) -> Tensor:
        """Encode the texts (T, L) to (T, D), not normalised, at the length of the one that needs most places."""
        length = int(self.lengths(ids).max()) if len(ids) else ids.shape[1]
        if not self.cuts or length == ids.shape[1]:
            features: Tensor = self.model.encode_text(ids)
            return features
        shorter = {
            f"{self._prefix}positional_embedding": self._owner.positional_embedding[:length],
            f"{self._prefix}attn_mask": self._owner.attn_mask[:length, :length],
        }
        features = torch.func.functional_call(self._encoder, shorter, (ids[:, :length],), tie_weights=False)
        return features


class _Encoder(nn.Module):
    """A model whose forward pass is its text tower's, as `torch.func.functional_call` needs it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        features: Tensor = self.model.encode_text(ids)  # type: ignore[operator]
        return features


def _causal_transformer(model: Any) -> tuple[str, Any, str, int] | None:
    """Where a text tower that may be cut has its positions and mask: (prefix, owner, pooling, end token's id).

    None for others: all but open_clip's own classes, since the forward pass of a subclass might look elsewhere.
    """
    from open_clip.coca_model import CoCa
    from open_clip.model import CLIP, CustomTextCLIP
    from open_clip.transformer import TextTransformer

    if type(model) is CLIP:
        prefix, owner, pool, eos = "model.", model, model.text_pool_type, model.text_eos_id
    elif type(model) in (CustomTextCLIP, CoCa) and type(model.text) is TextTransformer:
        if model.text.cls_emb is not None:
            return None
        prefix, owner, pool, eos = "model.text.", model.text, model.text.pool_type, model.text.eos_id
    else:
        return None
    mask = owner.attn_mask
    if pool not in _POOLED_AT_THE_END or mask is None:
        return None
    above = torch.ones_like(mask, dtype=torch.bool).triu(1)
    return (prefix, owner, pool, eos) if bool(mask[above].isneginf().all()) else None
