"""The masked autoencoder beside a plain one written from the papers, and the reading of published files."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from apm.errors import UsageError
from apm.mae.config import HeadConfig, HeadTraining, MAEConfig, MAETraining, kept_places
from apm.mae.model import MaskedAutoencoder, positions
from apm.mae.published import mapped, read_start, shapes

SIZES = MAEConfig(
    image_size=16,
    patch_size=4,
    width=8,
    depth=2,
    heads=2,
    decoder_width=12,
    decoder_depth=1,
    decoder_heads=3,
    head_width=4,
    head_depth=1,
    head_heads=1,
    classes=5,
)
KEPT = 4


def images(count: int = 2, size: int = 16) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def orders(count: int, places: int = 16) -> Tensor:
    return torch.from_numpy(np.random.default_rng(2).random((count, places)).argsort(1))


def model_of(sizes: MAEConfig = SIZES, seed: int = 3) -> MaskedAutoencoder:
    """All weights random: zero biases and equal norms would hide mistakes."""
    model = MaskedAutoencoder(sizes).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "encoder.pos_embed":
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


# --- a plain masked autoencoder: one image, one place at a time -----------------------------------------------------


def plain_positions(width: int, grid: int) -> np.ndarray:
    table = np.zeros((1 + grid * grid, width))
    for row in range(grid):
        for column in range(grid):
            for half, number in ((0, column), (1, row)):
                for k in range(width // 4):
                    angle = number / 10000 ** (4 * k / width)
                    table[1 + row * grid + column, half * width // 2 + k] = math.sin(angle)
                    table[1 + row * grid + column, half * width // 2 + width // 4 + k] = math.cos(angle)
    return table


def linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def block(w: dict[str, Tensor], name: str, x: Tensor, heads: int) -> Tensor:
    q, k, v = linear(w, f"{name}.attn.qkv", norm(w, f"{name}.norm1", x)).chunk(3, dim=-1)
    side = x.shape[-1] // heads
    seen = []
    for head in range(heads):
        at = slice(head * side, (head + 1) * side)
        seen.append((q[:, at] @ k[:, at].T / math.sqrt(side)).softmax(-1) @ v[:, at])
    x = x + linear(w, f"{name}.attn.proj", torch.cat(seen, -1))
    inner = linear(w, f"{name}.mlp.fc1", norm(w, f"{name}.norm2", x))
    gelu = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    return x + linear(w, f"{name}.mlp.fc2", gelu)


def plain_codes(w: dict[str, Tensor], sizes: MAEConfig, image: Tensor, seen: list[int]) -> Tensor:
    table = torch.from_numpy(plain_positions(sizes.width, sizes.grid))
    rows = [w["encoder.cls_token"][0, 0] + table[0]]
    side = sizes.patch_size
    for place in seen:
        r, c = divmod(place, sizes.grid)
        patch = image[:, r * side : (r + 1) * side, c * side : (c + 1) * side]
        kernel = w["encoder.patch_embed.proj.weight"]
        rows.append((kernel * patch).sum((1, 2, 3)) + w["encoder.patch_embed.proj.bias"] + table[1 + place])
    x = torch.stack(rows)
    for number in range(sizes.depth):
        x = block(w, f"encoder.blocks.{number}", x, sizes.heads)
    return norm(w, "encoder.norm", x)


def plain_error(w: dict[str, Tensor], sizes: MAEConfig, image: Tensor, order: list[int], kept: int) -> Tensor:
    codes = linear(w, "decoder.embed", plain_codes(w, sizes, image, order[:kept]))
    table = torch.from_numpy(plain_positions(sizes.decoder_width, sizes.grid))
    rows = [codes[0]]
    for place in range(sizes.places):
        at = order.index(place)
        rows.append((codes[1 + at] if at < kept else w["mask_token"][0, 0]) + table[1 + place])
    x = torch.stack(rows)
    for number in range(sizes.decoder_depth):
        x = block(w, f"decoder.blocks.{number}", x, sizes.decoder_heads)
    said = linear(w, "decoder.pixels", norm(w, "decoder.norm", x))[1:]
    errors, side = [], sizes.patch_size
    for place in order[kept:]:
        r, c = divmod(place, sizes.grid)
        patch = image[:, r * side : (r + 1) * side, c * side : (c + 1) * side].permute(1, 2, 0).flatten()
        spread = ((patch - patch.mean()).square().sum() / (len(patch) - 1) + 1e-6).sqrt()
        errors.append((said[place] - (patch - patch.mean()) / spread).square().mean())
    return torch.stack(errors).mean()


def plain_logits(w: dict[str, Tensor], sizes: MAEConfig, image: Tensor) -> Tensor:
    x = plain_codes(w, sizes, image, list(range(sizes.places)))
    if sizes.head_depth:
        x = linear(w, "head.embed", x) + torch.from_numpy(plain_positions(sizes.head_width, sizes.grid))
        for number in range(sizes.head_depth):
            x = block(w, f"head.blocks.{number}", x, sizes.head_heads)
        x = norm(w, "head.norm", x)
    return linear(w, "head.classes", x[0])


def weights_of(model: MaskedAutoencoder) -> dict[str, Tensor]:
    return {name: parameter.double().detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("change", [{}, {"head_depth": 0}, {"heads": 4, "decoder_depth": 2}], ids=str)
def test_errors_and_logits_are_those_of_the_plain_one(change: dict[str, Any]) -> None:
    sizes = replace(SIZES, **change)
    model = model_of(sizes)
    w, pictures, order = weights_of(model), images(), orders(2)
    with torch.no_grad():
        wanted = [plain_error(w, sizes, p.double(), o.tolist(), KEPT) for p, o in zip(pictures, order, strict=True)]
        torch.testing.assert_close(model(pictures, order, KEPT).double(), torch.stack(wanted), rtol=1e-5, atol=1e-6)
        wanted = [plain_logits(w, sizes, p.double()) for p in pictures]
        torch.testing.assert_close(model.logits(pictures).double(), torch.stack(wanted), rtol=1e-5, atol=1e-5)


def test_one_image_in_many_masks_is_that_many_copies() -> None:
    model, picture, order = model_of(), images(1), orders(5)
    with torch.no_grad():
        torch.testing.assert_close(model(picture, order, KEPT), model(picture.expand(5, -1, -1, -1), order, KEPT))


def test_what_is_masked_is_not_seen_and_what_is_seen_is_not_judged() -> None:
    model, picture, order = model_of(), images(1), orders(1)
    torch.manual_seed(0)
    seen, masked = (torch.zeros(16, dtype=torch.bool).scatter(0, o, True) for o in (order[0, :KEPT], order[0, KEPT:]))
    noise = torch.randn_like(picture)

    def at(places: Tensor) -> Tensor:
        return picture + noise * places.view(1, 1, 4, 1, 4, 1).expand(1, 3, 4, 4, 4, 4).reshape(1, 3, 16, 16)

    with torch.no_grad():
        said = [model.decode(model.encode(model.tokens(p), order[:, :KEPT]), order) for p in (picture, at(masked))]
        assert torch.equal(said[0], said[1])
        assert not torch.equal(model.logits(picture), model.logits(at(seen)))
        targets = model.targets(at(seen)) - model.targets(picture)
        assert (targets[0, order[0, KEPT:]] == 0).all() and targets[0, order[0, :KEPT]].abs().min() > 0


def test_a_patch_of_one_colour_is_no_division_by_zero() -> None:
    model, flat = model_of(), torch.full((1, 3, 16, 16), 0.3)
    assert (model.targets(flat).abs() < 1e-3).all()
    faint = flat.clone()
    faint[0, :, 0, 0] += 1e-3  # in the first patch of 48 numbers alone
    variance = 1e-6 * (3 / 48) * (1 - 3 / 48) * 48 / 47
    wanted = 1e-3 * (1 - 3 / 48) / math.sqrt(variance + 1e-6)
    assert model.targets(faint)[0, 0, :3].tolist() == pytest.approx([wanted] * 3, rel=1e-3)


def test_the_encoder_is_timms_own() -> None:
    model = model_of()
    with torch.no_grad():
        ours = model.encode(model.tokens(images()))
        torch.testing.assert_close(ours, model.encoder.forward_features(images()), rtol=1e-5, atol=1e-5)


def test_gradients_reach_all_but_the_positions_and_the_head() -> None:
    model = model_of()
    model(images(), orders(2), KEPT).mean().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {"encoder.pos_embed", *(n for n, _ in model.named_parameters() if n.startswith("head."))}


def test_weights_are_a_function_of_the_seed() -> None:
    one, same, other = (MaskedAutoencoder(SIZES, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["head.classes.weight"], other["head.classes.weight"])
    assert shapes(SIZES) == {name: tuple(tensor.shape) for name, tensor in one.items()}
    bound = math.sqrt(6 / (8 + 32))
    assert one["encoder.blocks.0.mlp.fc1.weight"].abs().max() == pytest.approx(bound, rel=0.05)
    assert (one["decoder.norm.weight"] == 1).all() and (one["decoder.embed.bias"] == 0).all()
    np.testing.assert_allclose(positions(12, 3)[0].numpy(), plain_positions(12, 3), atol=1e-6)


def test_how_many_patches_are_kept() -> None:
    assert kept_places(196, 0.75) == 49 and kept_places(64, 0.75) == 16
    assert kept_places(4, 0.99) == 1 and kept_places(4, 0.01) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MAEConfig(patch_size=7), "Patches of 7 pixels do not tile an image of 64"),
        (lambda: MAEConfig(patch_size=64), "with 4 or more"),
        (lambda: MAEConfig(width=194), "width must be a multiple of 4 and of its 3 attention heads, not 194"),
        (lambda: HeadConfig(head_width=10, head_heads=5), "head_width must be a multiple of 4"),
        (lambda: MAETraining(masked=1.0), "masked is a share of the patches"),
        (lambda: MAETraining(min_area=1.5), "min_area must be from 0 to 1, not 1.5"),
        (lambda: HeadTraining(seed=-1), "seed must be from 0 to 9223372036854775807, not -1"),
        (lambda: MAETraining(seed=2**63), "seed must be from 0 to"),
        (lambda: HeadTraining(smoothing=1.0), "smoothing must be 0 or more and below 1"),
        (lambda: HeadTraining(kind="prob"), 'Did you mean "probe"'),
    ],
)
def test_settings_that_cannot_work_are_refused(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


# --- published files ------------------------------------------------------------------------------------------------

PUBLISHED = MAEConfig(
    image_size=32, patch_size=16, width=64, depth=2, heads=1, decoder_width=32, decoder_depth=1, decoder_heads=1
)


def published_state() -> dict[str, Tensor]:
    """A random full checkpoint with MAE's own names, written out by hand."""
    g = torch.Generator().manual_seed(5)

    def layers(prefix: str, width: int, depth: int) -> dict[str, Tensor]:
        found = {}
        for n in range(depth):
            for name, shape in (
                ("norm1.weight", (width,)), ("norm1.bias", (width,)),
                ("attn.qkv.weight", (3 * width, width)), ("attn.qkv.bias", (3 * width,)),
                ("attn.proj.weight", (width, width)), ("attn.proj.bias", (width,)),
                ("norm2.weight", (width,)), ("norm2.bias", (width,)),
                ("mlp.fc1.weight", (4 * width, width)), ("mlp.fc1.bias", (4 * width,)),
                ("mlp.fc2.weight", (width, 4 * width)), ("mlp.fc2.bias", (width,)),
            ):  # fmt: skip
                found[f"{prefix}.{n}.{name}"] = torch.randn(shape, generator=g)
        return found

    return {
        "cls_token": torch.randn(1, 1, 64, generator=g),
        "pos_embed": torch.from_numpy(plain_positions(64, 2)).float()[None],
        "mask_token": torch.randn(1, 1, 32, generator=g),
        "decoder_pos_embed": torch.from_numpy(plain_positions(32, 2)).float()[None],
        "patch_embed.proj.weight": torch.randn(64, 3, 16, 16, generator=g),
        "patch_embed.proj.bias": torch.randn(64, generator=g),
        **layers("blocks", 64, 2),
        "norm.weight": torch.randn(64, generator=g),
        "norm.bias": torch.randn(64, generator=g),
        "decoder_embed.weight": torch.randn(32, 64, generator=g),
        "decoder_embed.bias": torch.randn(32, generator=g),
        **layers("decoder_blocks", 32, 1),
        "decoder_norm.weight": torch.randn(32, generator=g),
        "decoder_norm.bias": torch.randn(32, generator=g),
        "decoder_pred.weight": torch.randn(16 * 16 * 3, 32, generator=g),
        "decoder_pred.bias": torch.randn(16 * 16 * 3, generator=g),
    }


def test_maes_full_checkpoint_is_read_and_mapped(tmp_path: Path) -> None:
    state, path = published_state(), tmp_path / "mae_visualize_vit.pth"
    torch.save({"model": state}, path)
    start = read_start(path, MAEConfig())
    assert start.has_decoder and start.sizes == replace(MAEConfig(), **{
        name: getattr(PUBLISHED, name) for name in
        ("image_size", "patch_size", "width", "depth", "heads", "decoder_width", "decoder_depth", "decoder_heads")
    })  # fmt: skip
    model = MaskedAutoencoder(start.sizes)
    missing, unexpected = model.load_state_dict(start.weights, strict=False)
    assert not missing and not unexpected
    w = {name: tensor.double() for name, tensor in mapped(state).items()}
    picture, order = images(1, 32), orders(1, 4)
    wanted = plain_error(w, start.sizes, picture[0].double(), order[0].tolist(), 2)
    with torch.no_grad():
        torch.testing.assert_close(model(picture, order, 2)[0].double(), wanted, rtol=1e-4, atol=1e-4)


def test_the_published_sizes_are_known_by_their_names() -> None:
    """ViT-L's own shapes, on no device: heads of 64 numbers in the encoder, of 32 in the decoder."""
    large = MAEConfig(
        image_size=224, patch_size=16, width=1024, depth=24, heads=16,
        decoder_width=512, decoder_depth=8, decoder_heads=16,
    )  # fmt: skip
    found = shapes(large)
    assert found["mask_token"] == (1, 1, 512) and found["encoder.pos_embed"] == (1, 197, 1024)
    assert found["decoder.pixels.weight"] == (768, 512) and found["encoder.blocks.23.mlp.fc1.weight"] == (4096, 1024)
    from apm.mae.published import sizes_of

    with torch.device("meta"):
        weights = {name: torch.empty(shape) for name, shape in found.items()}
    assert sizes_of("it", weights, MAEConfig()) == large


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=str)
def test_a_checkpoint_of_half_precision_is_read(tmp_path: Path, kind: torch.dtype) -> None:
    state = {name: tensor.to(kind) for name, tensor in published_state().items()}
    torch.save({"model": state}, tmp_path / "half.pth")
    start = read_start(tmp_path / "half.pth", MAEConfig())
    assert start.has_decoder and torch.equal(start.weights["decoder.norm.bias"], state["decoder_norm.bias"].float())


def test_an_encoder_alone_gets_a_decoder_of_the_sizes_asked_for(tmp_path: Path) -> None:
    state = {n: t for n, t in published_state().items() if not n.startswith(("decoder", "mask"))}
    torch.save(state, tmp_path / "encoder.pth")
    save_file(state, tmp_path / "encoder.safetensors")
    sizes = MAEConfig(decoder_width=16, decoder_heads=2)
    one, other = (read_start(tmp_path / f"encoder.{kind}", sizes) for kind in ("pth", "safetensors"))
    assert not one.has_decoder and one.digest == other.digest
    assert (one.sizes.width, one.sizes.decoder_width, one.sizes.decoder_heads) == (64, 16, 2)


@pytest.mark.slow
def test_an_encoder_of_timm_by_name_and_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    save_file({name: tensor.contiguous() for name, tensor in made.state_dict().items()}, tmp_path / "w.safetensors")
    start = read_start(f"timm:vit_tiny_patch16_224@{tmp_path / 'w.safetensors'}", MAEConfig())
    assert (start.sizes.width, start.sizes.depth, start.sizes.heads, start.sizes.image_size) == (192, 12, 3, 224)
    assert torch.equal(start.weights["encoder.blocks.3.attn.qkv.weight"], made.blocks[3].attn.qkv.weight)  # type: ignore[union-attr,index]


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("run!",)


def test_files_that_are_none_or_could_run_code_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = published_state()

    def saved(name: str, content: Any) -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Harmful()))
    (tmp_path / "cut.pth").write_bytes(saved("whole.pth", {"model": state}).read_bytes()[:-300])
    for path, message in (
        (tmp_path / "none.pth", "no such file"),
        (saved("code.pth", {"model": state, "args": Harmful()}), "could run code; it is refused"),
        (tmp_path / "plain.pth", "could run code; it is refused"),
        (tmp_path / "cut.pth", "damaged"),
        (saved("words.pth", {"model": {"a": "b"}}), "holds no weights"),
        (saved("other.pth", {"weight": torch.ones(2)}), "holds no vision transformer"),
        (saved("less.pth", {n: t for n, t in state.items() if n != "norm.bias"}), r"encoder\.norm\.bias is None"),
        (saved("more.pth", {**state, "blocks.0.ls1": torch.ones(64)}), r"encoder\.blocks\.0\.ls1 is \(64,\)"),
        (saved("nan.pth", {**state, "norm.bias": torch.full((64,), torch.nan)}), "not finite"),
        (saved("int.pth", {**state, "norm.bias": torch.ones(64).int()}), r"norm\.bias is torch\.int32"),
        (saved("complex.pth", {**state, "norm.bias": torch.ones(64) * 1j}), r"norm\.bias is torch\.complex64"),
        (saved("sparse.pth", {**state, "norm.bias": torch.ones(64).to_sparse()}), "something else than plain weights"),
        (saved("number.pth", {**state, 7: torch.ones(1)}), "holds no weights"),
        (saved("flat.pth", {**state, "pos_embed": torch.zeros(5)}), "holds no vision transformer"),
        (saved("scalar.pth", {**state, "mask_token": torch.tensor(1.0)}), r"should be|must be"),
        (saved("positions.pth", {**state, "decoder_pos_embed": torch.zeros(1, 5, 32)}), "positions are not MAE's"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            read_start(path, MAEConfig())
    assert "run!" not in capsys.readouterr().out


def test_the_loss_is_torchs_mean_squared_error() -> None:
    model, pictures, order = model_of(), images(3), orders(3)
    with torch.no_grad():
        said = model.decode(model.encode(model.tokens(pictures), order[:, :KEPT]), order)
        hidden = torch.stack([torch.zeros(16).scatter(0, o[KEPT:], 1.0) for o in order]).bool()
        torch.testing.assert_close(
            model(pictures, order, KEPT).mean(), F.mse_loss(said[hidden], model.targets(pictures)[hidden])
        )
