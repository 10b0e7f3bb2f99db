"""Grid teachers of timm: small random transformers, with class and register tokens, from files and from the hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models import build_model_with_cfg, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from apm.errors import TeacherError
from apm.images.load import central_square, normalised
from apm.teachers import TeacherUnavailable, load_grid_teacher, load_teacher
from apm.teachers.base import GridTeacher

NAME = "apm_test_vit_reg4"


def apm_test_vit_reg4(pretrained: bool = False, **options: Any) -> nn.Module:
    """As DINOv2 with registers: class token, four registers, position codes for patches alone, layer scale."""
    sizes = {"img_size": 56, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 1e-1}
    return build_model_with_cfg(
        VisionTransformer, NAME, pretrained, **{**sizes, "reg_tokens": 4, "no_embed_class": True, **options}
    )


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    """Make timm know the model."""
    settings = {"input_size": (3, 56, 56), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "classifier": "head"}
    apm_test_vit_reg4.__module__ = __name__
    entry = timm.models.generate_default_cfgs({f"{NAME}.untrained": settings})
    globals()["default_cfgs"] = entry
    if not timm.is_model(NAME):
        register_model(apm_test_vit_reg4)


@pytest.fixture(scope="module")
def model(registered: None) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = timm.create_model(NAME, num_classes=0).eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.1)
    return made


@pytest.fixture
def file(model: nn.Module, tmp_path: Path) -> Path:
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


@pytest.fixture
def image(picture: Path) -> Image.Image:
    return Image.open(picture).convert("RGB")


def test_the_grid_is_the_patches_alone(model: nn.Module, file: Path, image: Image.Image) -> None:
    teacher = load_grid_teacher(f"timm:{NAME}@{file}")
    assert isinstance(teacher, GridTeacher)
    assert (teacher.dim, teacher.grid_size, teacher.notes) == (32, 56, ())
    pixels = normalised(central_square(image, 56), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))[None]
    tokens = model.forward_features(pixels)[0]  # (1 + 4 + 16, 32): class token, registers, patches
    assert tokens.shape == (21, 32)
    grid = teacher.encode_grid(image)
    assert grid.shape == (4, 4, 32) and grid.dtype == torch.float32
    torch.testing.assert_close(grid.flatten(0, 1), tokens[5:], rtol=1e-5, atol=1e-5)
    assert all((grid.flatten(0, 1) - special).norm(dim=1).min() > 0.1 for special in tokens[:5])


def test_another_size_gives_another_grid_and_leaves_the_first(file: Path, image: Image.Image) -> None:
    teacher = load_grid_teacher(f"timm:{NAME}@{file}")
    own = teacher.encode_grid(image)
    assert teacher.encode_grid(image, size=98).shape == (7, 7, 32)
    assert torch.equal(teacher.encode_grid(image, size=56), own)
    with pytest.raises(TeacherError, match="patches of 14 pixels, which do not tile 60 pixels"):
        teacher.encode_grid(image, size=60)


def test_a_torch_file_is_the_same_and_the_identity_is_the_contents(
    model: nn.Module, file: Path, image: Image.Image, tmp_path: Path
) -> None:
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    teacher, other = (load_grid_teacher(f"timm:{NAME}@{path}") for path in (file, tmp_path / "weights.pth"))
    assert torch.equal(teacher.encode_grid(image), other.encode_grid(image))
    digests = [one.identity.rpartition("@")[2] for one in (teacher, other)]
    assert digests[0] == digests[1] and len(digests[0]) == 16
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["reg_token"] += 1
    save_file(state, tmp_path / "changed.safetensors")
    assert load_grid_teacher(f"timm:{NAME}@{tmp_path}/changed.safetensors").identity.rpartition("@")[2] != digests[0]


def test_weights_come_from_the_hubs_cache(
    file: Path, image: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo, revision = "someone/vit", "0" * 40
    snapshot = tmp_path / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(revision)
    shutil.copy(file, snapshot / "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    settings = timm.get_pretrained_cfg(NAME)
    settings.hf_hub_id = repo
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: settings)
    teacher = load_grid_teacher(f"timm:{NAME}")
    assert teacher.name == f"timm:{NAME}"
    assert torch.equal(teacher.encode_grid(image), load_grid_teacher(f"timm:{NAME}@{file}").encode_grid(image))


def test_weights_that_are_not_here_are_an_error_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    name = "timm:vit_small_patch14_reg4_dinov2.lvd142m"
    with pytest.raises(TeacherUnavailable, match=f'"{name}".*HF_HUB_OFFLINE'):
        load_grid_teacher(name)
    with pytest.raises(TeacherUnavailable, match=f"write timm:{NAME}@FILE"):
        load_grid_teacher(f"timm:{NAME}")


def test_what_cannot_be_loaded_says_why(model: nn.Module, file: Path, tmp_path: Path) -> None:
    def refused(spec: str, why: str) -> None:
        with pytest.raises(TeacherError, match=why):
            load_grid_teacher(spec)

    refused("timm:", "is incomplete")
    refused(f"timm:{NAME}@", "is incomplete")
    refused(f"timm:{NAME}@{tmp_path}/none.safetensors", "there is no file")
    refused(f"timm:vit_tiny_patch16_244@{file}", 'Did you mean "vit_tiny_patch16_224"')
    refused(f"timm:test_resnet@{file}", "is not a vision transformer")
    refused(f"timm:test_vit@{file}", "does not fit the model test_vit")
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "resnet.safetensors")
    refused(f"timm:test_vit@{tmp_path}/resnet.safetensors", r"does not fit .*lacks \d+ of the model's weights")
    part = {name: value for name, value in model.state_dict().items() if not name.startswith("blocks.1.")}
    save_file(part, tmp_path / "part.safetensors")
    refused(
        f"timm:{NAME}@{tmp_path}/part.safetensors", "lacks 4 of the model's weights, first blocks.1.attn.qkv.weight"
    )
    (tmp_path / "text.safetensors").write_text("not weights")
    refused(f"timm:{NAME}@{tmp_path}/text.safetensors", "damaged or not a safetensors file")
    torch.save({"state": model}, tmp_path / "code.pth")
    refused(f"timm:{NAME}@{tmp_path}/code.pth", "could run code")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["reg_token"][0, 0, 0] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    refused(f"timm:{NAME}@{tmp_path}/nan.safetensors", "not finite, first in reg_token")


def test_other_names_are_those_of_teachers_with_texts() -> None:
    assert load_grid_teacher("embedded").identity == load_teacher("embedded").identity
    with pytest.raises(TeacherError, match="has a grid but no text tower"):
        load_teacher(f"timm:{NAME}")
