"""MTA, ZERO and TDA against recorded outputs of the published methods.

The file is taken from the environment variable APM_PEERS_GOLDEN, so that others of the same form can be run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from apm.benchmarks.methods import Batch, create_method
from apm.benchmarks.methods.zero import zero_votes
from apm.text.zeroshot import ZeroShotHead
from tests.places import GOLDEN

DEFAULT = GOLDEN / "peers_seed0.npz"


@pytest.fixture(scope="module")
def golden() -> Mapping[str, Tensor]:
    with np.load(os.environ.get("APM_PEERS_GOLDEN") or DEFAULT) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def head_of(golden: Mapping[str, Tensor], scale: str) -> ZeroShotHead:
    names = tuple(f"class {index}" for index in range(len(golden["text_features"])))
    return ZeroShotHead(labels=names, features=golden["text_features"], logit_scale=float(golden[scale]))


def batch_of(features: Tensor, head: ZeroShotHead) -> Any:
    """What methods read of a `Batch`, with features given instead of computed: (B, V, D)."""
    stand_in = SimpleNamespace(
        head=head, tokens=lambda: features[:, 0], views=lambda count, min_area: features[:, :count]
    )
    assert all(hasattr(Batch, name) for name in ("tokens", "views"))
    return stand_in


def close(ours: Tensor, published: Tensor) -> None:
    torch.testing.assert_close(ours, published, rtol=1e-4, atol=1e-4 * float(published.abs().mean()))


def test_mta(golden: Mapping[str, Tensor]) -> None:
    method = create_method(f"mta:views={golden['views'].shape[1]}")
    answer = method.predict(batch_of(golden["views"], head_of(golden, "view_logit_scale")))
    close(answer.logits, golden["mta_logits"])


def test_zero(golden: Mapping[str, Tensor]) -> None:
    head = head_of(golden, "view_logit_scale")
    votes = torch.stack([zero_votes(head.probabilities(features), 0.3) for features in golden["views"]])
    assert torch.equal(votes, golden["zero_votes"])
    answer = create_method(f"zero:views={golden['views'].shape[1]}").predict(batch_of(golden["views"], head))
    assert torch.equal(answer.logits.argmax(1), golden["zero_votes"].argmax(1))


@pytest.mark.parametrize("at_a_time", [1, 7, 60])
def test_tda(golden: Mapping[str, Tensor], at_a_time: int) -> None:
    head = head_of(golden, "tda_logit_scale")
    method = create_method("tda")
    parts = golden["stream"].unsqueeze(1).split(at_a_time)
    close(torch.cat([method.predict(batch_of(part, head)).logits for part in parts]), golden["tda_logits"])
