"""Layers of fixed models as fields: which numbers they are, where their weights come from, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.video.mvit import MSBlockConfig, MViT

from apm.errors import TeacherError, UsageError
from apm.images.load import central_square, normalised
from apm.teachers import TeacherUnavailable, load_layers, load_teacher
from apm.teachers.layer_sources import parse_source
from apm.teachers.layers import LayerSource, as_grid, outputs_of

KINETICS = ((0.45,) * 3, (0.225,) * 3)


@pytest.fixture
def image(picture: Path) -> Image.Image:
    return Image.open(picture).convert("RGB")


def tiny_video_model() -> MViT:
    """MViTv2 with three small blocks, of which the second halves the sides."""
    same = {"num_heads": 1, "kernel_q": [3, 3, 3], "kernel_kv": [3, 3, 3], "stride_kv": [1, 2, 2]}
    blocks = [
        MSBlockConfig(input_channels=8, output_channels=8, stride_q=[1, 1, 1], **same),
        MSBlockConfig(input_channels=8, output_channels=16, stride_q=[1, 2, 2], **same),
        MSBlockConfig(input_channels=16, output_channels=16, stride_q=[1, 1, 1], **same),
    ]
    return MViT(
        (224, 224), 16, blocks, residual_pool=True, residual_with_cls_embed=False, rel_pos_embed=True,
        proj_after_attn=True, num_classes=5,
    )  # fmt: skip


@pytest.fixture
def video(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: tiny_video_model())


def load(text: str, **options: Any) -> LayerSource:
    return load_layers(text, **options)


@torch.no_grad()
def by_hand(model: MViT, pixels: Tensor, frames: int, depth: int) -> Tensor:
    """All tokens (T, h, w, D) after the first blocks, where the image is repeated in time."""
    x = model.conv_proj(torch.stack([pixels] * frames, dim=1)[None])
    place = tuple(x.shape[2:])
    x = model.pos_encoding(x.flatten(2).mT)
    for block in model.blocks[:depth]:
        x, place = block(x, place)
    return x[0, 1:].reshape(*place, -1)


@pytest.mark.parametrize(("frames", "size"), [(16, 64), (8, 64), (8, 96)])
def test_a_still_video_gives_one_frame_of_its_blocks(video: None, image: Image.Image, frames: int, size: int) -> None:
    source = load("mvit:1,3@random:7", frames=frames, size=size)
    torch.manual_seed(7)
    model = tiny_video_model().eval()
    pixels = normalised(central_square(image, size), *KINETICS)
    found = source.encode(image)
    assert (
        source.modules == {"1": "blocks.0", "3": "blocks.2"} and source.shown == f"{frames // 4 + 1} of {frames // 2}"
    )
    for layer, cell in (("1", 4), ("3", 8)):
        wanted = by_hand(model, pixels, frames, int(layer))
        assert found[layer].shape == (size // cell, size // cell, 8 if layer == "1" else 16)
        torch.testing.assert_close(found[layer], wanted[frames // 4], rtol=1e-5, atol=1e-6)
    assert (wanted[0] - wanted[frames // 4]).abs().max() > 1e-4  # the ends of the video differ from its middle


@pytest.mark.slow
def test_the_real_video_transformer_has_the_layers_of_the_talk(image: Image.Image) -> None:
    source = load("mvit:3,4@random")
    assert source.weights.words == "at random (seed 0), not trained" and source.weights.size == 224
    shapes = {layer: tuple(values.shape) for layer, values in source.encode(image).items()}
    assert shapes == {"3": (28, 28, 192), "4": (14, 14, 384)}


def test_class_and_register_tokens_are_no_places(image: Image.Image) -> None:
    source = load("vit:test_vit:1,2@random")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = timm.create_model("test_vit", num_classes=0).eval()
    settings = model.pretrained_cfg
    pixels = normalised(central_square(image, settings["input_size"][-1]), settings["mean"], settings["std"])[None]
    with torch.no_grad():
        wanted = model.forward_intermediates(pixels, indices=[0, 1], norm=False, intermediates_only=True)
    for layer, values in zip(("1", "2"), wanted, strict=True):
        torch.testing.assert_close(source.encode(image)[layer], values[0].permute(1, 2, 0), rtol=1e-5, atol=1e-6)


def test_a_transformer_of_torchvision(image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(name: str, weights: None) -> nn.Module:
        return torchvision.models.VisionTransformer(
            image_size=224, patch_size=56, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32
        )

    monkeypatch.setattr(torchvision.models, "get_model", small)
    source = load("vit:vit_b_16:1@random:4")
    torch.manual_seed(4)
    model: Any = small("", None).eval()
    mean, std = source.weights.mean, source.weights.std
    with torch.no_grad():
        patches = model._process_input(normalised(central_square(image, 224), mean, std)[None])
        tokens = torch.cat([model.class_token, patches], dim=1) + model.encoder.pos_embedding
        wanted = model.encoder.layers[0](tokens)[0, 1:].reshape(4, 4, 16)
    assert source.modules == {"1": "encoder.layers.encoder_layer_0"}
    torch.testing.assert_close(source.encode(image)["1"], wanted, rtol=1e-5, atol=1e-6)


def test_the_teachers_last_map_is_what_its_token_is_made_of(image: Image.Image) -> None:
    teacher = load_teacher("embedded")
    source = load("teacher:layer2,4", teacher=teacher, size=96)
    assert source.modules == {"layer2": "trunk.layer2", "4": "trunk.layer4"}
    assert teacher.identity in source.weights.words
    found = source.encode(image)
    assert found["layer2"].shape == (12, 12, 128) and found["4"].shape == (3, 3, 512)
    pixels = normalised(central_square(image, 96), teacher.mean, teacher.std)[None]
    token = source.model.head(found["4"].mean(dim=(0, 1))[None])
    torch.testing.assert_close(token, teacher.encode_image(pixels), rtol=1e-4, atol=1e-5)
    drawn = source.at_random(0)
    assert drawn.encode(image)["4"].shape == (3, 3, 512) and "not trained" in drawn.weights.words
    assert drawn.identity != source.identity and drawn.identity == source.at_random(0).identity
    assert drawn.identity != source.at_random(1).identity
    assert torch.equal(source.encode(image)["4"], found["4"])  # which drawing others has not changed


def test_another_size_gives_another_grid(image: Image.Image) -> None:
    assert load("vit:test_resnet:layer2@random", size=128).encode(image)["layer2"].shape[:2] == (16, 16)
    own = load("vit:test_vit:1@random").encode(image)["1"].shape[0]
    assert load("vit:test_vit:1@random", size=320).encode(image)["1"].shape[0] == own * 2
    with pytest.raises(TeacherError, match="multiple of 32 pixels, not 100"):
        load("mvit:1@random", size=100)


class Behind(nn.Module):
    """Fails when run."""

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("this lies behind the last layer that was wanted")


def test_layers_are_copied_and_nothing_behind_them_runs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), Behind())
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = outputs_of(model, ("0", "2"), pixels)
        torch.testing.assert_close(found["0"], model[0](pixels))
    assert found["0"].min() < 0  # as it was before the activation that is computed in its place
    with pytest.raises(AssertionError, match="lies behind"):
        outputs_of(model, ("0", "3"), pixels)
    assert not any(module._forward_hooks for module in model.modules())


def test_grids_are_told_from_what_is_none() -> None:
    maps = torch.randn(1, 5, 4, 4)
    grid = maps[0].permute(1, 2, 0)
    tokens = torch.cat([torch.randn(1, 5), grid.reshape(16, 5)])
    assert all(torch.equal(found, grid) for found in (  # type: ignore[arg-type]
        as_grid(maps, 0), as_grid(maps.permute(0, 2, 3, 1), 0), as_grid(tokens[None], 1), as_grid(tokens[:, None], 1),
        as_grid(tokens[None, 1:], 1), as_grid((tokens[None], (1, 4, 4)), 0),
    ))  # fmt: skip
    none = (torch.randn(1, 4, 4, 4), torch.randn(2, 5, 4, 4), torch.randn(1, 7, 5), torch.randn(5, 16, 3), [maps])
    assert all(as_grid(one, 1) is None for one in none)


def saved(model: nn.Module, path: Path, **changed: Tensor) -> Path:
    state = {**model.state_dict(), **changed}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    return path


def test_weights_of_a_file(video: None, image: Image.Image, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = tiny_video_model()
    other_classes = {"head.1.weight": torch.zeros(9, 16), "head.1.bias": torch.zeros(9)}
    files = (
        saved(model, tmp_path / "plain.safetensors"),
        saved(model, tmp_path / "nested.pth"),
        saved(model, tmp_path / "classes.safetensors", **other_classes),
    )
    wanted = load("mvit:2@random:3", size=64).encode(image)["2"]
    for file in files:
        source = load(f"mvit:2@{file}", size=64)
        assert torch.equal(source.encode(image)["2"], wanted)
        assert source.weights.words == f"of the file {file.name}" and str(tmp_path) not in source.identity
    timm_model = timm.create_model("test_resnet", num_classes=0)
    file = saved(timm_model, tmp_path / "timm.safetensors")
    found = load(f"vit:test_resnet:1@{file}").model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in timm_model.state_dict().items())


def test_what_cannot_be_loaded_says_why(video: None, tmp_path: Path) -> None:
    model = tiny_video_model()

    def refused(text: str, why: str) -> None:
        with pytest.raises(TeacherError, match=why):
            load(text)

    refused(f"mvit:2@{tmp_path}/none.pth", "there is no file")
    (tmp_path / "text.safetensors").write_text("no weights")
    refused(f"mvit:2@{tmp_path}/text.safetensors", "damaged or not a safetensors file")
    (tmp_path / "text.png").write_text("hello")
    refused(f"mvit:2@{tmp_path}/text.png", "holds no weights: it is neither a safetensors nor a torch file")
    torch.save({"model": model}, tmp_path / "code.pth")
    refused(f"mvit:2@{tmp_path}/code.pth", "could run code")
    file = saved(timm.create_model("test_resnet"), tmp_path / "other.safetensors")
    refused(f"mvit:2@{file}", r"does not fit the model \(ValueError: lacks \d+, first .*unknown \d+, first")
    refused(f"vit:test_vit:1@{file}", "does not fit the model .*lacks")
    broken = saved(model, tmp_path / "nan.safetensors", **{"conv_proj.bias": torch.full((8,), torch.nan)})
    refused(f"mvit:2@{broken}", "not finite, first in conv_proj.bias. Download the file again")
    refused("mvit:4@random", r'no layer "4": they are called from 1 to 3 \(blocks.0 … blocks.2\)')
    refused("mvit:blocks.1.atn@random", 'Did you mean "blocks.1.attn')
    refused("vit:test_vitt:1", 'neither timm nor torchvision has a model test_vitt.*"test_vit"')
    refused("teacher:1", "needs a teacher of open_clip")


def test_what_gives_no_grid_says_so(image: Image.Image) -> None:
    with pytest.raises(TeacherError, match=r"global_pool gives 1 × .* is not a grid"):
        load("vit:test_resnet:global_pool@random").encode(image)


def test_published_weights_come_from_torchs_cache_or_are_told_to_be_missing(
    video: None, image: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("apm.teachers.layer_weights._unreachable", lambda url: "no network in tests")
    with pytest.raises(TeacherUnavailable) as error:
        load("mvit:3")
    message = str(error.value)
    assert "\n" not in message and "no network in tests" in message
    assert all(word in message for word in ("mvit_v2_s-ae3be167.pth", "download.pytorch.org", "mvit:3@FILE"))
    (tmp_path / "checkpoints").mkdir()
    torch.manual_seed(5)
    torch.save(tiny_video_model().state_dict(), tmp_path / "checkpoints" / "mvit_v2_s-ae3be167.pth")
    source = load("mvit:3", size=64)
    assert "MViT_V2_S_Weights.KINETICS400_V1" in source.weights.words
    assert torch.equal(source.encode(image)["3"], load("mvit:3@random:5", size=64).encode(image)["3"])


def test_hub_weights_that_are_not_here_are_told(hub_cache: Path) -> None:
    with pytest.raises(TeacherUnavailable, match=r"HF_HUB_OFFLINE.*vit:vit_tiny_patch16_224:3@random takes them"):
        load("vit:vit_tiny_patch16_224:3")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("movie:3", 'Unknown source "movie"'),
        ("mvit:", "write mvit:LAYER"),
        ("mvit:3,,4", "write mvit:LAYER"),
        ("mvit:3@", "write mvit:LAYER"),
        ("vit:resnet18", "write vit:NAME:LAYER"),
        ("vit::3", "write vit:NAME:LAYER"),
    ],
)
def test_names_that_say_too_little(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        parse_source(text)


def test_names_are_taken_apart() -> None:
    source = parse_source("vit:vit_small_patch14_dinov2.lvd142m:3,blocks.5,3@dir:a/b@c.pth")
    assert (source.kind, source.model) == ("vit", "vit_small_patch14_dinov2.lvd142m")
    assert (source.layers, source.weights, source.seed) == (("3", "blocks.5"), "dir:a/b@c.pth", None)
    assert (parse_source("mvit:3@random").seed, parse_source("mvit:3@random:12").seed) == (0, 12)
    assert parse_source("mvit:3@random:x").weights == "random:x"  # a file of that name
