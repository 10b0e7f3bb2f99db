"""Small random models, written in open_clip's forms."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from apm.teachers import Teacher

NAME = "apm-test-tiny"
TEXTS = ["a photo of a cat.", "a handwritten seven", "naïve café"]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
TIMM_CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {
        "timm_model_name": "test_resnet",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 48,
    },
    "text_cfg": CONFIG["text_cfg"],
}


def random_model(name: str, seed: int = 0) -> nn.Module:
    """Build a model whose weights are all large enough to matter."""
    logging.getLogger().addHandler(logging.NullHandler())
    # Frozen as a teacher is: torch takes another kernel for attention where gradients are wanted.
    model: nn.Module = open_clip.create_model(name).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def pixels(count: int = 3, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def assert_same(teacher: Teacher, model: Any, size: int = 32) -> None:
    """Check that the teacher answers as the model it was saved from, to rounding.

    A teacher computes its convolutions with channels last, and its texts without their padding.
    """
    ids = open_clip.SimpleTokenizer(context_length=16)(TEXTS)
    torch.testing.assert_close(
        teacher.encode_image(pixels(size=size)), model.encode_image(pixels(size=size)), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(teacher.encode_text(TEXTS), model.encode_text(ids), rtol=1e-5, atol=1e-6)
    assert teacher.logit_scale == pytest.approx(float(model.logit_scale.exp()))
    assert (teacher.dim, teacher.image_size) == (24, size)


def write_folder(folder: Path, model: nn.Module, config: dict[str, Any] = CONFIG, **preprocess: Any) -> Path:
    """Write open_clip's local-dir form."""
    folder.mkdir(parents=True)
    content = {"model_cfg": config, "preprocess_cfg": {"mean": MEAN, "std": STD, **preprocess}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def write_hub_cache(cache: Path, repo: str, folder: Path) -> None:
    """Lay a folder out as the hub's cache does."""
    home, commit = cache / f"models--{repo.replace('/', '--')}", "0123456789abcdef0123456789abcdef01234567"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    shutil.copytree(folder, home / "snapshots" / commit)


def save_plain(model: nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path)


def save_training(model: nn.Module, path: Path) -> None:
    """Save as open_clip's training does, from several devices."""
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}, path)


def save_half(model: nn.Module, path: Path) -> None:
    save_file({name: tensor.half() for name, tensor in model.state_dict().items()}, path)


def save_safe(model: nn.Module, path: Path) -> None:
    save_file(model.state_dict(), path)
