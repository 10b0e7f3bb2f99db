"""The teacher's image tower as a function of a few of its parameters: for the methods that tune it at test time.

The teacher is never changed: the tuned tensors stand in for its own while a batch is encoded, and are dropped
afterwards. So there is nothing to put back, and the next image finds the very bits that were loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from apm.errors import UsageError

Loss = Callable[[Tensor, slice], Tensor]
"""From the features (b, D) of some images, and which of all they are, to their part of the loss, a scalar."""

_NORMS = {"layer": (nn.LayerNorm, "LayerNorm"), "batch": (nn.modules.batchnorm._BatchNorm, "BatchNorm")}
NORM_NAMES = tuple(_NORMS)


class TunableTower:
    """An image tower whose parameters may be given with each call.

    Args:
        teacher: of open_clip: with a ``model`` that has ``visual`` and ``encode_image``.
        method: who asks, for the error.
        chunk: images encoded at a time, which bounds the memory.

    Raises:
        UsageError: the teacher's image tower cannot be reached.
    """

    def __init__(self, teacher: Any, method: str, *, chunk: int | None = None) -> None:
        model = getattr(teacher, "model", None)
        visual = getattr(model, "visual", None)
        if not isinstance(visual, nn.Module):
            raise UsageError(
                f"{method} tunes the image tower, and that of teacher {teacher.name} is not accessible. Leave the "
                "method out, or use a CLIP model of open_clip."
            )
        self.visual = visual
        self.name: str = teacher.name
        self.method = method
        self.device: torch.device = teacher.device
        self._encoder = _Encoder(model)
        self._chunk = chunk or (16 if self.device.type == "cpu" else 64)

    def parameter(self, name: str) -> Tensor:
        """One of the tower's own parameters, float32."""
        return self.visual.get_parameter(name).detach().float()

    @torch.no_grad()
    def features(self, pixels: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Features (B, D) of unit length of preprocessed images (B, 3, H, W), with these parameters by name."""
        return torch.cat([self._encode(part, weights) for part in pixels.split(self._chunk)])

    def gradients(
        self, pixels: Tensor, leaves: Sequence[Tensor], weights: Callable[[], Mapping[str, Tensor]], loss: Loss
    ) -> tuple[Tensor, list[Tensor]]:
        """Features, and the gradients of a loss that is a sum over images.

        Args:
            pixels: (B, 3, H, W).
            leaves: what the gradients are of, each with ``requires_grad``.
            weights: the tower's parameters as made of the leaves.
            loss: see `Loss`.

        Returns:
            (B, D) of unit length, and a gradient for each leaf.
        """
        features, totals = [], [torch.zeros_like(leaf) for leaf in leaves]
        start = 0
        for part in pixels.split(self._chunk):
            at = slice(start, start + len(part))
            with torch.enable_grad():
                rows = self._encode(part, weights())
                slopes = torch.autograd.grad(loss(rows, at), leaves)
            for total, slope in zip(totals, slopes, strict=True):
                total += slope
            features.append(rows.detach())
            start = at.stop
        return torch.cat(features), totals

    def norm_parameters(self, kind: str) -> dict[str, Tensor]:
        """Copies of the weights and biases of the tower's normalisation layers, by name.

        Args:
            kind: ``layer`` or ``batch``.

        Raises:
            UsageError: the tower has none of this kind.
        """
        found = self._norms(kind)
        if found:
            return {name: self.parameter(name).clone() for name in found}
        title = _NORMS[kind][1]
        others = [other for other in NORM_NAMES if other != kind and self._norms(other)]
        remedy = "Leave the method out for this teacher."
        if others:
            title_there = _NORMS[others[0]][1]
            remedy = (
                f"It has {title_there}: {self.method}:norms={others[0]} tunes these, with the statistics of training."
            )
        raise UsageError(
            f"{self.method} tunes the {title} of the image tower, but that of teacher {self.name} has none. {remedy}"
        )

    def _norms(self, kind: str) -> list[str]:
        layers = [name for name, module in self.visual.named_modules() if isinstance(module, _NORMS[kind][0])]
        own = dict(self.visual.named_parameters())
        return [f"{layer}.{part}" for layer in layers for part in ("weight", "bias") if f"{layer}.{part}" in own]

    def attention(self) -> list[tuple[Projection, Projection]]:
        """The projections to queries and to values of each self-attention layer, from the first block to the last.

        Raises:
            UsageError: the tower has none of a form that is known.
        """
        found = [pair for name, module in self.visual.named_modules() if (pair := _projections(name, module))]
        if not found:
            raise UsageError(
                f"{self.method} adapts the attention of the image tower's blocks, and that of teacher {self.name} "
                f"({type(self.visual).__name__}) is of an unknown kind. Leave the method out for this teacher."
            )
        return found

    def _encode(self, pixels: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        given = {f"model.visual.{name}": value for name, value in weights.items()}
        inputs = (pixels.to(self.device, torch.float32),)
        features: Tensor = torch.func.functional_call(self._encoder, given, inputs, tie_weights=False)
        return normalize(features.float(), dim=1)


def set_gradients(leaves: Iterable[Tensor], gradients: Iterable[Tensor]) -> None:
    """Give each leaf its gradient."""
    for leaf, gradient in zip(leaves, gradients, strict=True):
        leaf.grad = gradient


class _Encoder(nn.Module):
    """A model whose forward pass is its image tower's, as `torch.func.functional_call` needs it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model.encode_image(pixels)
        return features


@dataclass(frozen=True)
class Projection:
    """Rows of a weight matrix that make queries, or values."""

    name: str
    """Of the weight among the tower's parameters."""
    start: int
    stop: int


def _projections(name: str, module: nn.Module) -> tuple[Projection, Projection] | None:
    """Where a module, if it is a self-attention layer of a block, makes its queries and its values."""
    if "pool" in name:  # attention that pools: not of a block
        return None
    joint = getattr(module, "in_proj_weight", None)  # torch's and open_clip's own: rows of q, k, v
    path = f"{name}.in_proj_weight"
    fused = getattr(module, "qkv", None)  # timm's, in the same order but for the few that go head by head
    if joint is None and isinstance(fused, nn.Linear) and not getattr(module, "head_first", False):
        joint, path = fused.weight, f"{name}.qkv.weight"
    if isinstance(joint, Tensor) and joint.ndim == 2 and len(joint) % 3 == 0:
        width = len(joint) // 3
        return Projection(path, 0, width), Projection(path, 2 * width, 3 * width)
    query, value = getattr(module, "q_proj", None), getattr(module, "v_proj", None)
    if isinstance(query, nn.Linear) and isinstance(value, nn.Linear):
        return (
            Projection(f"{name}.q_proj.weight", 0, len(query.weight)),
            Projection(f"{name}.v_proj.weight", 0, len(value.weight)),
        )
    return None
