"""What the layers of a fixed model hold at each place of one still image: as many fields as layers, nothing trained.

``mvit:LAYER``
    a video transformer, torchvision's MViTv2-S, shown the image as a video in which nothing moves (Modi & Rawat's talk
    at NeurIPS 2023): one frame of what its blocks give.
``vit:NAME:LAYER``
    a model of timm or, where timm has none of that name, of torchvision.
``teacher:LAYER``
    the image tower of a teacher.

LAYER is a number, counted from 1 among the blocks or stages that the model consists of, or the name of a module;
several are separated by commas. ``@FILE`` behind it names weights, ``@random`` or ``@random:SEED`` takes them at
random, and without either they are the published ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from apm.errors import TeacherError, did_you_mean
from apm.images.load import central_square, normalised
from apm.teachers.openclip import weights_hash

CONTAINERS = ("blocks", "transformer.resblocks", "encoder.layers", "layers", "stages", "features")
"""Where models keep what follows one another; ResNets have layer1 to layer4 instead."""
CELL = 32
"""Pixels that an input of a video transformer is a multiple of: its coarsest cells."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """An architecture with its weights, and how to draw others."""

    model: nn.Module
    untrained: Callable[[], nn.Module]
    """Makes the architecture anew, with the weights that its library draws."""
    words: str
    """Which weights they are, for people."""
    size: int
    """Side of its input, in pixels."""
    own_size: int
    """The side that the model is made for."""
    mean: Sequence[float]
    std: Sequence[float]


class LayerSource:
    """Some layers of a frozen model, as fields of an image."""

    def __init__(
        self, weights: Weights, layers: Sequence[str], *, name: str, device: torch.device, frames: int | None = None
    ) -> None:
        """Look the layers up; nothing is computed.

        Args:
            weights: the model and its input.
            layers: numbers from 1, or names of modules.
            name: the source, for errors and records.
            device: where the model goes.
            frames: of a video transformer: how often the image is repeated, an even number; None: it takes images.

        Raises:
            TeacherError: it has no such layer, or takes no input of this size.
        """
        self.weights, self.name, self.frames, self.device = weights, name, frames, device
        self.model = weights.model.eval().requires_grad_(False).to(device)
        self.modules = {layer: module_name(self.model, layer, name) for layer in layers}
        """By layer as it was asked for: the module's name."""
        self.identity = f"{name.partition('@')[0]}@{weights_hash(self.model.state_dict())[:16]}"
        trunk: Any = getattr(self.model, "trunk", self.model)
        if frames is not None:
            if weights.size % CELL:
                raise TeacherError(f'The source "{name}" takes a multiple of {CELL} pixels, not {weights.size}.')
            codes: Any = self.model.pos_encoding
            codes.temporal_size, codes.spatial_size = frames // 2, (weights.size // 4,) * 2
        elif weights.size != weights.own_size and hasattr(trunk, "set_input_size"):
            trunk.set_input_size(img_size=(weights.size, weights.size))

    @property
    def shown(self) -> str | None:
        """Which of a video transformer's frames is taken, in words: the middle one; it pairs neighbouring images."""
        return None if self.frames is None else f"{self.frames // 4 + 1} of {self.frames // 2}"

    def at_random(self, seed: int) -> LayerSource:
        """The same layers of the same architecture, with weights at random."""
        model = drawn(self.weights.untrained, seed)
        weights = replace(self.weights, model=model, words=random_words(seed))
        return LayerSource(weights, tuple(self.modules), name=self.name, device=self.device, frames=self.frames)

    @torch.no_grad()
    def encode(self, image: Image.Image) -> dict[str, Tensor]:
        """Return the features of an image's central square: by layer (h, h, D), float32 on the CPU, not normalised.

        Raises:
            TeacherError: the model takes no input of this size, or a layer gives no grid.
        """
        size = self.weights.size
        pixels = normalised(central_square(image, size), self.weights.mean, self.weights.std)[None].to(self.device)
        if self.frames is not None:
            pixels = pixels[:, :, None].expand(-1, -1, self.frames, -1, -1)  # (1, 3, T, S, S)
        try:
            outputs = outputs_of(self.model, tuple(self.modules.values()), pixels)
        except (RuntimeError, AssertionError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise TeacherError(
                f'The source "{self.name}" takes no {size}×{size} pixels ({type(error).__name__}:'
                f" {' '.join(str(error).split())[:200]}); its own input is {self.weights.own_size}×"
                f"{self.weights.own_size}."
            ) from error
        prefix = prefix_tokens(self.model)
        found = {}
        for layer, module in self.modules.items():
            if module not in outputs:
                raise TeacherError(f'The source "{self.name}" does not use its module {module} for an image.')
            grid = as_grid(outputs[module], prefix)
            if grid is None:
                raise TeacherError(
                    f'The source "{self.name}": {module} gives {_shape(outputs[module])} for {size}×{size} pixels,'
                    " which is not a grid. Choose another layer or another --grid-size."
                )
            found[layer] = grid.float().cpu()
        return found


def drawn(untrained: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A model with the weights that its library draws, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return untrained()


def random_words(seed: int) -> str:
    """How random weights are described."""
    return f"at random (seed {seed}), not trained"


def numbered(model: nn.Module) -> list[str]:
    """Names of the modules that a layer's number counts: blocks of a transformer, stages of a convolutional network."""
    trunk: nn.Module = getattr(model, "trunk", model)
    modules = dict(trunk.named_modules())
    held = next((name for name in CONTAINERS if name in modules), None)
    if held is not None:
        names = [f"{held}.{child}" for child, _ in modules[held].named_children()]
    else:
        names = [name for name, _ in trunk.named_children() if re.fullmatch(r"layer\d+", name)]
    return names if trunk is model else [f"trunk.{name}" for name in names]


def module_name(model: nn.Module, layer: str, source: str) -> str:
    """From a layer as it was asked for to the module's name.

    Raises:
        TeacherError: there is none.
    """
    names = numbered(model)
    modules = [name for name, _ in model.named_modules() if name]
    if layer.isdecimal() and 1 <= int(layer) <= len(names):
        return names[int(layer) - 1]
    for name in (layer, f"trunk.{layer}"):
        if name in modules:
            return name
    counted = f"from 1 to {len(names)} ({names[0]} … {names[-1]}), or by name" if names else "by name"
    hint = did_you_mean(layer, modules)
    raise TeacherError(f'The source "{source}" has no layer "{layer}": they are called {counted}.{hint}')


class _Enough(Exception):
    """All that was wanted is there: the rest of the model need not run."""


def outputs_of(model: nn.Module, names: Sequence[str], pixels: Tensor) -> dict[str, Any]:
    """Run a model up to the last of some modules, and return what each of them gave; tensors are copies."""
    found: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            # copied, as an activation that follows may be computed in place
            found[name] = output.clone() if isinstance(output, Tensor) else output
            if len(found) == len(set(names)):
                raise _Enough

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in set(names)]
    try:
        model(pixels)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


def prefix_tokens(model: nn.Module) -> int:
    """How many tokens stand before the places': class token and registers."""
    trunk = getattr(model, "trunk", model)
    known = getattr(trunk, "num_prefix_tokens", None)
    if known is not None:
        return int(known)
    return int(hasattr(trunk, "class_token") or hasattr(trunk, "class_embedding"))


def as_grid(output: Any, prefix: int) -> Tensor | None:
    """Make a grid (h, h, D) of what a module gave for one square image; None where it is none.

    Args:
        output: a map (1, D, h, h) or (1, h, h, D); tokens (1, N, D) or (N, 1, D); or a video's, with the class token
            first, and how many places there are in time, height and width, of which the middle time is taken.
        prefix: tokens before the places'.
    """
    if isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], tuple):
        tokens, (times, height, width) = output
        return tokens[0, 1:].unflatten(0, (times, height, width))[times // 2] if height == width else None
    if not isinstance(output, Tensor):
        return None
    if output.ndim == 4 and len(output) == 1:
        first, second, third = output.shape[1:]
        if second == third != first:
            return output[0].permute(1, 2, 0)
        return output[0] if first == second != third else None  # a cube may be either
    if output.ndim != 3 or 1 not in output.shape[:2]:
        return None
    tokens = output[0] if len(output) == 1 else output[:, 0]  # (N, D)
    for before in (prefix, 0):  # some models put the class token in only later
        side = isqrt(max(0, len(tokens) - before))
        if side and side * side == len(tokens) - before:
            return tokens[before:].unflatten(0, (side, side))
    return None


def _shape(output: Any) -> str:
    return " × ".join(map(str, output.shape)) if isinstance(output, Tensor) else f"a {type(output).__name__}"
