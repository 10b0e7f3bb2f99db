"""A teacher's image tower cut between its layers: its activations after each, and the rest of the way from there.

Layer n is the n-th block of a transformer, open_clip's or timm's, or the n-th stage of a ResNet of timm, as the
embedded teacher's is: numbers as in `apm.teachers.layers`. Layer 0 is the image. Activations are given as tokens: class
and register tokens first, if the tower has any, then the places in reading order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from apm.errors import TeacherError, UsageError
from apm.images.load import central_square, normalised
from apm.teachers.layers import numbered

if TYPE_CHECKING:
    from apm.teachers.base import GridTeacher


@dataclass(frozen=True)
class Shape:
    """Shape of a tower's activations after one layer."""

    prefix: int
    """Tokens that belong to no place: class and registers."""
    side: int
    """Places along each side."""
    width: int
    """Numbers in a token."""

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.prefix + self.side**2


@dataclass(frozen=True)
class _Cut:
    stem: Callable[[Tensor], Tensor]
    tower: nn.Module
    head: Callable[[Tensor], Tensor]
    prefix: int | None  # None: it holds maps (B, C, h, w), and no tokens (B, T, C)

    @cached_property
    def blocks(self) -> Sequence[nn.Module]:
        """What is between stem and head."""
        return [self.tower.get_submodule(name) for name in numbered(self.tower)]


class Layers:
    """The layers of one teacher, at the input size of its own.

    Attributes:
        teacher: whose they are.
        count: how many there are.
        shapes: of the activations after layers 1, 2, …; at index 0, of the image.
    """

    def __init__(self, teacher: GridTeacher) -> None:
        """Cut the tower, and try it.

        Raises:
            TeacherError: its layers cannot be counted, or the way through them is not the tower's own.
        """
        self.teacher = teacher
        self._cut = _cut(teacher)
        if len({*getattr(teacher, "input_shape", (1, 1))}) > 1:
            raise _uncountable(teacher, "its input is not square")
        self.count = len(self._cut.blocks)
        side = self.image_size = int(getattr(teacher, "image_size", teacher.grid_size))
        pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(teacher.device)
        shapes, x = [Shape(0, side, 3)], self._start(pixels)
        for block in self._cut.blocks:
            x = block(x)
            shapes.append(self._shape(x))
        self.shapes = tuple(shapes)
        whole = teacher.encode_image(pixels) if hasattr(teacher, "encode_image") else teacher.model(pixels)  # type: ignore[attr-defined]
        found = self._cut.head(x)
        if found.shape != whole.shape or not torch.allclose(found, whole, rtol=1e-3, atol=1e-4 * float(whole.std())):
            raise _uncountable(teacher, "what its blocks make of an image is not what the whole tower does")

    def check(self, first: int, last: int) -> None:
        """Refuse a pair of layers with nothing to replace between them.

        Raises:
            UsageError: there are no such layers, or the last does not come after the first.
        """
        for layer, least in ((first, 0), (last, 1)):
            if not least <= layer <= self.count:
                raise UsageError(
                    f'The teacher "{self.teacher.name}" has layers 1 to {self.count}; there is no {layer}.'
                )
        if last <= first:
            raise UsageError(f"Layer {last} does not come after layer {first}.")

    def pixels(self, image: Image.Image) -> Tensor:
        """What the tower is given of an RGB image: (3, S, S)."""
        if hasattr(self.teacher, "preprocess"):
            made: Tensor = self.teacher.preprocess(image)
            return made
        mean, std = self.teacher.mean, self.teacher.std  # type: ignore[attr-defined]
        return normalised(central_square(image, self.image_size), mean, std)

    @torch.no_grad()
    def until(self, pixels: Tensor, layer: int) -> Tensor:
        """Tokens (B, T, C) after a layer from 1 on, of `pixels` (B, 3, S, S)."""
        x = self._start(pixels.to(self.teacher.device))
        for block in self._cut.blocks[:layer]:
            x = block(x)
        return self._tokens(x)

    @torch.no_grad()
    def between(self, tokens: Tensor, first: int, last: int) -> Tensor:
        """Tokens after layer `last`, of those (B, T, C) after layer `first`, from 1 on."""
        x = self._state(tokens, first)
        for block in self._cut.blocks[first:last]:
            x = block(x)
        return self._tokens(x)

    @torch.no_grad()
    def finish(self, tokens: Tensor, layer: int) -> Tensor:
        """The tower's answer (B, D), from the tokens (B, T, C) after a layer from 1 on."""
        x = self._state(tokens, layer)
        for block in self._cut.blocks[layer:]:
            x = block(x)
        return self._cut.head(x).float()

    def _start(self, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return self._cut.stem(pixels)

    def _shape(self, x: Tensor) -> Shape:
        if self._cut.prefix is None:
            if x.shape[2] != x.shape[3]:
                raise _uncountable(self.teacher, f"its map is {x.shape[2]} × {x.shape[3]}, and no square")
            return Shape(0, x.shape[2], x.shape[1])
        side = math.isqrt(x.shape[1] - self._cut.prefix)
        if side**2 + self._cut.prefix != x.shape[1]:
            raise _uncountable(self.teacher, f"its {x.shape[1] - self._cut.prefix} places form no square")
        return Shape(self._cut.prefix, side, x.shape[2])

    def _tokens(self, x: Tensor) -> Tensor:
        return x if self._cut.prefix is not None else x.flatten(2).mT

    def _state(self, tokens: Tensor, layer: int) -> Tensor:
        tokens = tokens.to(self.teacher.device)
        if self._cut.prefix is not None:
            return tokens
        side = self.shapes[layer].side
        return tokens.mT.unflatten(2, (side, side)).contiguous(memory_format=torch.channels_last)


def _cut(teacher: GridTeacher) -> _Cut:
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer
    from timm.models.resnet import ResNet
    from timm.models.vision_transformer import VisionTransformer as TimmTransformer

    model: Any = getattr(teacher, "model", teacher)
    visual = getattr(model, "visual", model)
    if isinstance(visual, VisionTransformer):
        return _open_clip(visual)
    trunk: Any = visual.trunk if isinstance(visual, TimmModel) else visual
    head: Any = visual.head if isinstance(visual, TimmModel) else nn.Identity()
    if isinstance(trunk, TimmTransformer):
        return _transformer(trunk, head)
    if isinstance(trunk, ResNet):
        return _resnet(trunk, head)
    raise _uncountable(teacher, f"its image tower is a {type(trunk).__name__}")


def _transformer(trunk: Any, head: Any) -> _Cut:
    return _Cut(
        lambda pixels: trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(pixels)))),
        trunk,
        lambda x: head(trunk.forward_head(trunk.norm(x))),
        trunk.num_prefix_tokens,
    )


def _resnet(trunk: Any, head: Any) -> _Cut:
    return _Cut(
        lambda pixels: trunk.maxpool(trunk.act1(trunk.bn1(trunk.conv1(pixels)))),
        trunk,
        lambda x: head(trunk.forward_head(x)),
        None,
    )


def _open_clip(visual: Any) -> _Cut:
    if not visual.transformer.batch_first:
        raise TeacherError("This version of open_clip puts the batch after the tokens: a newer one is needed.")

    def head(x: Tensor) -> Tensor:
        pooled, _ = visual._pool(x)
        answer: Tensor = pooled if visual.proj is None else pooled @ visual.proj
        return answer

    return _Cut(visual._embeds, visual, head, 1)


def _uncountable(teacher: GridTeacher, reason: str) -> TeacherError:
    return TeacherError(
        f'The teacher "{teacher.name}" has no numbered layers: {reason}. Vision transformers of open_clip and timm, '
        "ResNets of timm and the embedded teacher have them."
    )
