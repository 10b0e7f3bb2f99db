"""A small random model, and a hub's cache of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub.constants
import open_clip
import pytest
from torch import nn

from tests.apm.teachers.tiny import CONFIG, NAME, random_model


@pytest.fixture(scope="session")
def registered(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Make open_clip know the tiny model, with and without QuickGELU."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / f"{NAME}.json").write_text(json.dumps(CONFIG))
    (folder / f"{NAME}-quickgelu.json").write_text(json.dumps({**CONFIG, "quick_gelu": True}))
    open_clip.add_model_config(folder)


@pytest.fixture(scope="session")
def tiny(registered: None) -> nn.Module:
    return random_model(NAME)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache
