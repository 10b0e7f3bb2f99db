"""Which device a name means, and names that mean none."""

from __future__ import annotations

import pytest
import torch

from apm.devices import pick_device
from apm.errors import UsageError


@pytest.mark.parametrize(
    ("gpus", "name", "expected"),
    [(0, "auto", "cpu"), (0, "cpu", "cpu"), (2, "auto", "cuda"), (2, "cpu", "cpu"), (2, "cuda:1", "cuda:1")],
)
def test_auto_is_a_gpu_where_there_is_one(gpus: int, name: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert pick_device(name) == torch.device(expected)


@pytest.mark.parametrize(
    ("gpus", "name", "words"),
    [
        (0, "gpu", 'device "gpu"'),
        (0, "cuda:x", 'device "cuda:x"'),
        (0, "cuda", 'no CUDA device for "cuda" on this machine; use cpu or auto'),
        (2, "cuda:2", "has 2, counted from 0"),
    ],
)
def test_what_is_no_device_is_said(gpus: int, name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UsageError, match=words):
        pick_device(name)
