"""Teachers of timm that have a grid and no text tower: any vision transformer, DINOv2's among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from torch import Tensor, nn

from apm.errors import TeacherError, did_you_mean
from apm.images.load import central_square, normalised
from apm.teachers import hub
from apm.teachers.base import TeacherUnavailable
from apm.teachers.checkpoint import model_from
from apm.teachers.grid_towers import last_map
from apm.teachers.openclip import quiet, weights_hash

PREFIX = "timm:"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names that timm gives to the weights in a repository, in the order of preference."""
_DRAW = 0x5EED_F11E
"""Seed of the drawn weights that a file's are compared with."""


class TimmGridTeacher:
    """A vision transformer of timm as a `apm.teachers.base.GridTeacher`: its normed patch tokens are the grid."""

    def __init__(self, model: nn.Module, *, name: str, device: torch.device) -> None:
        settings = model.pretrained_cfg
        self.model = model.eval().requires_grad_(False).to(device)
        self.name = name
        self.mean: tuple[float, ...] = tuple(settings["mean"])  # type: ignore[index]
        self.std: tuple[float, ...] = tuple(settings["std"])  # type: ignore[index]
        self.grid_size = int(settings["input_size"][-1])  # type: ignore[index]
        self.patch_size = int(model.patch_embed.patch_size[0])  # type: ignore[union-attr, index]
        also = repr((name.partition("@")[0], self.mean, self.std)).encode()
        self.identity = f"{name}@{weights_hash(model.state_dict(), also=also)[:16]}"
        self.dim = int(model.num_features)  # type: ignore[arg-type]
        self.notes: tuple[str, ...] = ()
        self.device = device

    @torch.no_grad()
    def encode_grid(self, image: Image.Image, *, size: int | None = None) -> Tensor:
        """Encode the parts of the central square, scaled to `size` pixels (a multiple of the patches'): (h', w', D).

        Class and register tokens are left out. Position codes are interpolated where the
        size is not the model's own.
        """
        size = self.grid_size if size is None else size
        if size < 1 or size % self.patch_size:
            raise TeacherError(
                f'The grid of "{self.name}" has patches of {self.patch_size} pixels, which do not tile {size} pixels.'
            )
        pixels = normalised(central_square(image, size), self.mean, self.std)[None]  # (1, 3, S, S)
        return last_map(self.model, pixels.to(self.device))[0].permute(1, 2, 0).float()


def load_timm(spec: str, *, device: str | torch.device = "cpu") -> TimmGridTeacher:
    """Load ``timm:NAME`` with the weights of the hub, or ``timm:NAME@FILE`` with those of a file.

    Raises:
        TeacherUnavailable: the weights are neither on this machine nor reachable; found out within seconds.
        TeacherError: the name is not known or no vision transformer's; the file is damaged, unsafe or another model's.
    """
    name, at, file = spec.removeprefix(PREFIX).partition("@")
    if not name or (at and not file):
        raise TeacherError(f'The teacher "{spec}" is incomplete: write {PREFIX}NAME or {PREFIX}NAME@FILE.')
    if not timm.is_model(name):
        known = timm.list_models("*vit*") + timm.list_models("*eva*")
        raise TeacherError(
            f'The teacher "{spec}" cannot be loaded: timm has no model {name}.{did_you_mean(name, known)}'
        )
    other = TeacherError(f'The teacher "{spec}" cannot be loaded: {name} is not a vision transformer.')

    def make(path: Path) -> nn.Module:
        try:
            return with_weights(name, path, dynamic_img_size=True)
        except TypeError as error:
            raise (other if "dynamic_img_size" in str(error) else error) from None

    path = Path(file).expanduser() if at else published_file(spec, name)
    model = model_from(path, make, wanted_by=f'The teacher "{spec}"', name=f"the model {name}")
    if not (hasattr(model, "forward_intermediates") and hasattr(model, "num_prefix_tokens")):
        raise other
    return TimmGridTeacher(model, name=spec, device=torch.device(device))


def with_weights(name: str, path: Path, **options: Any) -> nn.Module:
    """Build a model of timm without its classes, with the weights of a file that `read_checkpoint` accepts.

    timm leaves what a file lacks as it was drawn, and says so only in its log. So a second model is drawn, with the
    same seed: what is the same in both is not from the file.

    Raises:
        ValueError: the file lacks weights of the model.
        Exception: whatever timm and torch raise where names or shapes do not fit.
    """

    def build(**weights: Any) -> nn.Module:
        torch.manual_seed(_DRAW)
        return timm.create_model(name, num_classes=0, **weights, **options)

    with quiet(), hub.no_network(), torch.random.fork_rng(devices=[]):
        model = build(pretrained=True, pretrained_cfg_overlay={"file": str(path), "custom_load": False})
        drawn = dict(build(pretrained=False).named_parameters())
    missing = [key for key, value in model.named_parameters() if _random(value) and torch.equal(value, drawn[key])]
    if missing:
        raise ValueError(f"it lacks {len(missing)} of the model's weights, first {missing[0]}")
    return model


def _random(values: Tensor) -> bool:
    """Whether the values differ, as those of drawn weights do."""
    return bool((values != values.flatten()[0]).any())


def published_file(spec: str, name: str) -> Path:
    """Find the weights that timm publishes for a model, downloading them where they are not here.

    Raises:
        TeacherUnavailable: they are neither on this machine nor reachable.
    """
    settings = timm.get_pretrained_cfg(name)
    if settings is None or not settings.hf_hub_id:
        where = f" from {settings.url}" if settings is not None and settings.url else ""
        raise TeacherUnavailable(
            f'The weights of the teacher "{spec}" are not on the Hugging Face hub: get them{where} yourself, and write'
            f" {PREFIX}{name}@FILE."
        )
    files = (settings.hf_hub_filename,) if settings.hf_hub_filename else WEIGHTS
    return hub.fetch(settings.hf_hub_id, files, wanted_by=spec, library="timm")
