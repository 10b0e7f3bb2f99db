"""What a training may begin with: a checkpoint of ours, MAE's published files, a vision transformer of timm.

MAE's full checkpoint is a torch file with the entry ``model``: the encoder's weights by timm's names, ``mask_token``,
``decoder_embed.*``, ``decoder_blocks.*``, ``decoder_norm.*``, ``decoder_pred.*`` and both tables of positions. It is
read as tensors alone: a file that could run code is refused.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from apm.errors import UsageError
from apm.images.paths import printable
from apm.mae.config import MAEConfig
from apm.mae.model import MaskedAutoencoder, positions
from apm.pretrain.checkpoint import Network, read_network
from apm.teachers.checkpoint import not_finite, read_torch

TIMM = "timm:"
_HEADS = {768: 12, 1024: 16, 1280: 16}  # of the published encoders, by width; elsewhere 64 numbers a head
_DECODER_HEADS = {512: 16}
_RENAMED = {
    "decoder_embed.": "decoder.embed.",
    "decoder_blocks.": "decoder.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "decoder.pixels.",
}


def shapes(config: MAEConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by name, without making any."""
    with torch.device("meta"):
        model = MaskedAutoencoder(config, seed=None)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


NETWORK = Network("mae", "apm mae", MAEConfig, shapes, lambda sizes, seed: MaskedAutoencoder(sizes, seed=seed))


@dataclass(frozen=True)
class Start:
    """Weights to begin with.

    Attributes:
        sizes: of the network; those of parts that are not there are as they were asked for.
        weights: parameters by name: the encoder's always; the decoder's and the head's where they are known.
        digest: 16 hex digits of a sha256 over them.
    """

    sizes: MAEConfig
    weights: dict[str, Tensor]
    digest: str

    @property
    def has_decoder(self) -> bool:
        """Whether the decoder is known."""
        return "mask_token" in self.weights


def read_start(spec: str | Path, sizes: MAEConfig) -> Start:
    """Read ``timm:NAME``, ``timm:NAME@FILE``, a checkpoint of ``apm mae``, or a published file.

    Args:
        spec: as given by the user.
        sizes: of the decoder, where there is none in it.

    Raises:
        UsageError: no such file; damaged, unsafe, or not a masked autoencoder's or a plain vision transformer's.
        TeacherError: timm's weights cannot be had.
    """
    if str(spec).startswith(TIMM):
        return _of_timm(str(spec), sizes)
    path = Path(spec).expanduser()
    if path.suffix == ".safetensors" and path.is_file() and _is_ours(path):
        found = read_network(path, NETWORK)
        return _start(found.student, found.weights)
    return _of_state(printable(path), _read_tensors(path), sizes)


def mapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published names → ours, positions of the decoder left out: they are fixed. Timm's names: the encoder's."""
    found = {}
    for name, tensor in state.items():
        part = next((old for old in _RENAMED if name.startswith(old)), None)
        if part is not None:
            found[_RENAMED[part] + name.removeprefix(part)] = tensor
        elif name == "mask_token":
            found[name] = tensor
        elif name != "decoder_pos_embed":
            found[f"encoder.{name}"] = tensor
    return found


def sizes_of(shown: str, weights: Mapping[str, Tensor], sizes: MAEConfig) -> MAEConfig:
    """Read the sizes off the weights; the decoder's are `sizes`' where it is not among them.

    Raises:
        UsageError: it is no masked autoencoder and no plain vision transformer.
    """
    try:
        width, channels, side, _ = weights["encoder.patch_embed.proj.weight"].shape
        places = weights["encoder.pos_embed"].shape[1] - 1
    except (KeyError, ValueError, IndexError):
        raise UsageError(
            f"{shown} holds no vision transformer with patches and positions: give MAE's published checkpoint, one of "
            "`apm mae`, or timm:NAME."
        ) from None
    grid = math.isqrt(max(places, 0))
    if channels != 3 or grid**2 != places:
        raise UsageError(f"{shown} has {channels} channels and {places} positions: RGB and a square grid are needed.")
    values: dict[str, Any] = {
        "image_size": grid * side,
        "patch_size": side,
        "width": width,
        "depth": _count(weights, "encoder.blocks."),
        "heads": _HEADS.get(width, max(1, width // 64)),
    }
    if "mask_token" in weights:
        decoder = weights["mask_token"].numel()
        values |= {
            "decoder_width": decoder,
            "decoder_depth": _count(weights, "decoder.blocks."),
            "decoder_heads": _DECODER_HEADS.get(decoder, max(1, decoder // 32)),
        }
    return replace(sizes, **values)


def _count(weights: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).partition(".")[0] for name in weights if name.startswith(prefix)})


def _of_state(shown: str, state: Mapping[str, Tensor], sizes: MAEConfig, heads: int | None = None) -> Start:
    weights = mapped(state)
    weights = {name: one for name, one in weights.items() if not name.startswith(("encoder.head.", "encoder.fc_norm."))}
    found = sizes_of(shown, weights, sizes)
    found = found if heads is None else replace(found, heads=heads)
    parts = ("encoder.", "decoder.", "mask_token") if "mask_token" in weights else ("encoder.",)
    expected = {name: shape for name, shape in shapes(found).items() if name.startswith(parts)}
    there = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if wrong := sorted(name for name in expected.keys() | there.keys() if expected.get(name) != there.get(name)):
        name = wrong[0]
        raise UsageError(
            f"{shown} is not a plain vision transformer or masked autoencoder: {printable(name)[:80]} is "
            f"{there.get(name)} and should be {expected.get(name)}."
        )
    known = positions(found.decoder_width, found.grid)
    fixed = state.get("decoder_pos_embed", known)
    if strange := {n: one.dtype for n, one in {**weights, "decoder_pos_embed": fixed}.items() if not _is_plain(one)}:
        name, kind = next(iter(strange.items()))
        raise UsageError(f"{shown} holds something else than plain weights: {name} is {kind}. Save it as float32.")
    if fixed.shape != known.shape or not torch.allclose(fixed.float(), known, atol=_rounding(fixed)):
        raise UsageError(f"{shown}: the decoder's positions are not MAE's fixed sines and cosines.")
    weights = {name: tensor.float() for name, tensor in weights.items()}
    if broken := not_finite(weights):
        raise UsageError(
            f"{shown} holds values that are not finite, first in {broken[0]}: download it or make it again."
        )
    return _start(found, weights)


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is dense, of floating-point numbers, and they are there."""
    return tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta


def _rounding(fixed: Tensor) -> float:
    """How far sines and cosines may be off that were saved in this format."""
    return max(1e-4, torch.finfo(fixed.dtype).eps)


def _start(sizes: MAEConfig, weights: dict[str, Tensor]) -> Start:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].float().contiguous().numpy().tobytes())
    return Start(sizes, weights, digest.hexdigest()[:16])


def _of_timm(spec: str, sizes: MAEConfig) -> Start:
    from apm.teachers.timm import load_timm

    model: Any = load_timm(spec).model
    heads = int(model.blocks[0].attn.num_heads) if hasattr(model, "blocks") else None
    return _of_state(f'"{spec}"', model.state_dict(), sizes, heads)


def _is_ours(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return "apm" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return True  # its reader says what is wrong with it


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch file, alone or under ``model`` or ``state_dict``, or of a safetensors file."""
    shown = printable(path)
    if not path.is_file():
        raise UsageError(f"{shown}: no such file; name a checkpoint, or timm:NAME.")
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    state = read_torch(path)
    if isinstance(state, dict):
        state = next((state[key] for key in ("model", "state_dict") if key in state), state)
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(name, str) and isinstance(one, Tensor) for name, one in state.items())
    ):
        raise UsageError(f'{shown} holds no weights: names with tensors, alone or under "model" or "state_dict".')
    return state
