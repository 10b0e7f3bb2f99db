"""Texts cut behind their end token against the same texts at full length, for every kind of text tower of open_clip."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from open_clip.coca_model import CoCa
from open_clip.hf_model import _POOLERS, HFTextEncoder
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor, nn

from apm.teachers.text_tower import TextTower

WIDTH, VOCABULARY, EOS = 16, 60, 2
VISION = {"layers": 1, "width": 16, "head_width": 8, "patch_size": 16, "image_size": 32}
SHAPE = {"width", "heads", "layers", "vocab_size", "hf_model_name", "hf_tokenizer_name", "hf_proj_type"} | {
    "hf_pooler_type",
    "hf_model_pretrained",
    "tokenizer_kwargs",
    "mlp_ratio",
}
"""Settings of a text tower that its kind does not depend on."""


def registered_kinds() -> dict[str, dict[str, Any]]:
    """Each kind of text tower among open_clip's configurations, by the name of one that has it; those of transformers
    are built by `transformers_tower`.
    """
    kinds: dict[str, dict[str, Any]] = {}
    seen = set()
    for name in open_clip.list_models():
        config = copy.deepcopy(open_clip.get_model_config(name))
        if config["text_cfg"].get("hf_model_name"):
            continue
        text = {key: value for key, value in config["text_cfg"].items() if key not in SHAPE}
        kind = {"text": text, "custom": config.get("custom_text", False), "coca": "multimodal_cfg" in config}
        key = json.dumps(kind, sort_keys=True)
        if key not in seen:
            seen.add(key)
            kinds[name] = kind
    return kinds


MADE_UP = {
    f"{'custom' if custom else 'plain'}, {pool}{', no mask' if free else ''}{', class token' if cls else ''}": {
        "text": {"pool_type": pool, "no_causal_mask": free, "context_length": 20, "embed_cls": cls, **extra},
        "custom": custom,
        "coca": False,
    }
    for pool in ("first", "last", "argmax", "eos")
    for free in (False, True)
    for custom in (False, True)
    for cls in ((False, True) if custom else (False,))  # the plain class knows no class token
    for extra in ({"proj_bias": True, "block_type": "custom", "scale_attn": True, "qk_norm": True},)
}
KINDS = {**registered_kinds(), **MADE_UP}


def build(kind: dict[str, Any]) -> nn.Module:
    """A tiny random model with a text tower of this kind."""
    text = {**kind["text"], "width": WIDTH, "heads": 2, "layers": 2, "vocab_size": VOCABULARY}
    torch.manual_seed(0)
    model: nn.Module
    if kind["coca"]:
        decoder = {"context_length": 76, "width": WIDTH, "heads": 2, "layers": 1}
        pooled = {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
        model = CoCa(WIDTH, decoder, text, pooled)  # type: ignore[arg-type]
    else:
        model = (CustomTextCLIP if kind["custom"] else CLIP)(WIDTH, VISION, text)  # type: ignore[arg-type]
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


class Bidirectional(nn.Module):
    """Stands in for a model of transformers: every token sees every other that is no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(20, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        x = self.words(input_ids) + self.places.weight[: input_ids.shape[1]]
        return SimpleNamespace(last_hidden_state=self.layer(x, src_key_padding_mask=attention_mask == 0))


def transformers_tower(pooler: str) -> nn.Module:
    """A model with open_clip's adapter for transformers, around a stand-in."""
    text = HFTextEncoder.__new__(HFTextEncoder)
    nn.Module.__init__(text)
    text.config = SimpleNamespace(pad_token_id=0)  # type: ignore[assignment]
    options = {"use_pooler_output": False} if pooler == "cls_pooler" else {}  # the other needs transformers itself
    text.transformer, text.pooler, text.proj = Bidirectional(), _POOLERS[pooler](**options), nn.Linear(WIDTH, WIDTH)
    text.output_tokens = False
    model = build({"text": {"context_length": 20}, "custom": True, "coca": False})
    model.text = text
    return model.eval().requires_grad_(False)


def texts(length: int) -> Tensor:
    """Texts of 1 to `length` − 2 words between a start and an end token, one that fills the context, and one without
    an end: their largest id is `VOCABULARY` − 1, and `EOS` follows it or is their end, as tokenizers differ.
    """
    generator = torch.Generator().manual_seed(1)
    rows = torch.zeros(10, length, dtype=torch.long)
    for row, count in enumerate((1, 2, 3, 3, 5, 8, 4, length - 2, length - 3, 2)):
        rows[row, 0] = 1
        rows[row, 1 : 1 + count] = torch.randint(3, VOCABULARY - 2, (count,), generator=generator)
        rows[row, 1 + count] = VOCABULARY - 1
        if row % 2 and count + 2 < length:
            rows[row, 2 + count] = EOS
    rows[-1, 3] = 5  # no end
    return rows


def length_of(model: Any) -> int:
    text = getattr(model, "text", model)
    if isinstance(text, HFTextEncoder):
        return 20
    return int(text.context_length)


@torch.no_grad()
def check(model: Any) -> bool:
    """Compare both ways of encoding, and return whether the tower cuts."""
    tower, ids = TextTower(model), texts(length_of(model))
    whole = model.encode_text(ids)
    torch.testing.assert_close(tower.encode(ids), whole, rtol=1e-5, atol=2e-6)
    for batch in tower.batches(ids, tokens=30):
        torch.testing.assert_close(tower.encode(ids[batch]), whole[batch], rtol=1e-5, atol=2e-6)
    lengths = tower.lengths(ids)
    if tower.cuts:  # what stands behind is really of no account
        behind = torch.arange(ids.shape[1]) >= lengths[:, None]
        torch.testing.assert_close(model.encode_text(ids.masked_fill(behind, 7)), whole, rtol=1e-5, atol=2e-6)
        assert lengths[:3].tolist() <= [5, 6, 7]
    else:
        assert lengths.tolist() == [ids.shape[1]] * len(ids)
    return tower.cuts


@pytest.mark.parametrize("name", KINDS)
def test_texts_cut_short_give_the_same_features(name: str) -> None:
    kind = KINDS[name]
    text = kind["text"]
    causal = not text.get("no_causal_mask", False) and not (text.get("embed_cls") and (kind["custom"] or kind["coca"]))
    assert check(build(kind)) == (causal and text.get("pool_type", "argmax") in ("argmax", "eos"))


def test_the_kinds_that_open_clip_has_are_all_there() -> None:
    kinds = [kind["text"] for kind in registered_kinds().values()]
    assert {kind.get("pool_type", "argmax") for kind in kinds} == {"argmax", "eos", "last"}
    assert {bool(kind.get("no_causal_mask")) for kind in kinds} == {True, False}
    assert {bool(kind.get("embed_cls")) for kind in kinds} == {True, False}
    assert {kind["coca"] for kind in registered_kinds().values()} == {True, False}


@pytest.mark.parametrize("pooler", sorted(_POOLERS.keys() - {"max_pooler"}))  # fails in open_clip itself
def test_towers_of_transformers_keep_their_full_length(pooler: str) -> None:
    assert not check(transformers_tower(pooler))


def test_a_class_of_its_own_keeps_its_full_length() -> None:
    class Reading(CLIP):
        def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
            return super().encode_text(text, normalize) + text.float().mean(1, keepdim=True)

    model = build({"text": {"context_length": 20}, "custom": False, "coca": False})
    model.__class__ = Reading
    assert not check(model)


def test_a_mask_that_is_not_causal_keeps_its_full_length() -> None:
    model = build({"text": {"context_length": 20}, "custom": False, "coca": False})
    mask = model.attn_mask
    assert isinstance(mask, Tensor)
    mask[0, 15] = 0
    assert not check(model)


def test_only_what_is_needed_is_computed(tmp_path: Path) -> None:
    model: Any = build({"text": {"context_length": 20}, "custom": False, "coca": False})
    tower, ids, seen = TextTower(model), texts(20), []
    model.transformer.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[:2])))
    for batch in tower.batches(ids, tokens=24):
        tower.encode(ids[batch])
    assert sum(count for count, _ in seen) == len(ids)
    assert max(count * length for count, length in seen if count > 1) <= 24
    assert [length for _, length in seen] == sorted(length for _, length in seen)
    assert seen[0][1] < 8 < seen[-1][1] <= 20
    assert model.positional_embedding.shape == (20, WIDTH)  # as it was
    assert model.attn_mask.shape == (20, 20)
    assert list(tower.batches(ids[:0], tokens=9)) == []
