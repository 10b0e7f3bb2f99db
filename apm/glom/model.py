"""GLOM on one page: columns of levels that agree, step by step, on islands of locations (Hinton 2021).

An image is divided into N locations. Each has a *column* of L *levels*, each an embedding of width D, from the finest
part to the whole scene. At every step the embedding of each level becomes the mean of four contributions: its own
value, a *bottom-up* prediction from the level below, a *top-down* prediction from the level above, and the *consensus*
of the same level at other locations. Locations that agree form *islands*; the islands of all levels are the parse tree
(`apm.glom.islands`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, einsum, nn
from torch.nn import functional as F

from apm.errors import UsageError
from apm.glom.config import GLOMConfig

OWN_PLACE = -0.0005  # likeness of a place with itself where consensus is of "others"


class Opinions(NamedTuple):
    """The contributions to each embedding in one step, all (B, N, L, D)."""

    bottom_up: Tensor
    top_down: Tensor  # 0 at the highest level, which has none above it, and everywhere where it is switched off
    consensus: Tensor  # 0 where it is switched off


class LevelNets(nn.Module):
    """One net D → H → D per level (Hinton's bottom-up or top-down nets), shared by all locations."""

    def __init__(self, *, levels: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.weight1, self.bias1 = (
            nn.Parameter(torch.empty(levels, hidden, dim)),
            nn.Parameter(torch.empty(levels, hidden)),
        )
        self.weight2, self.bias2 = (
            nn.Parameter(torch.empty(levels, dim, hidden)),
            nn.Parameter(torch.empty(levels, dim)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, levels, D) → (B, N, levels, D)."""
        x = F.gelu(einsum("bnld,lhd->bnlh", x, self.weight1) + self.bias1)  # (B, N, levels, H)
        return einsum("bnlh,ldh->bnld", x, self.weight2) + self.bias2  # (B, N, levels, D)


class GLOM(nn.Module):
    """Images → the embeddings of all levels at all locations, after every step."""

    votes: Tensor  # (L, 1): how many opinions the mean of a level is of
    too_far: Tensor | None  # (N, N)

    def __init__(self, config: GLOMConfig, *, seed: int | None = 0) -> None:
        """Build the columns and draw all weights from `seed`; None: they are filled from elsewhere."""
        super().__init__()
        self.config = config
        levels, dim, pixels = config.levels, config.dim, 3 * config.patch_size**2
        hidden = config.expansion * dim
        self.tokens = nn.Linear(pixels, dim)
        self.positions = nn.Parameter(torch.empty(config.places, dim))
        self.initial_levels = nn.Parameter(torch.empty(levels, dim))
        self.bottom_up = LevelNets(levels=levels, dim=dim, hidden=hidden)
        self.top_down = LevelNets(levels=levels - 1, dim=dim, hidden=hidden) if config.top_down else None
        self.pixels = nn.Linear(dim, pixels)  # back to the image; training alone needs it
        votes = torch.full((levels, 1), 2.0 + (config.consensus != "none"))
        votes[:-1] += config.top_down
        self.register_buffer("votes", votes, persistent=False)
        self.register_buffer("too_far", _too_far(config), persistent=False)
        if seed is not None:
            self._draw(np.random.Generator(np.random.PCG64(seed)))

    def forward(self, images: Tensor, *, steps: int | None = None) -> Tensor:
        """Images (B, 3, S, S) → embeddings (B, N, L, D) after the last of `steps` (2 L where None)."""
        for levels in self.states(images, steps=steps):  # noqa: B007
            pass
        return levels

    def states(self, images: Tensor, *, steps: int | None = None) -> Iterator[Tensor]:
        """Yield the embeddings (B, N, L, D) before the first step and after each."""
        tokens = self.tokens(self.patches(images))  # (B, N, D)
        levels = self.initial_levels.expand(*tokens.shape[:2], -1, -1)  # (B, N, L, D)
        yield levels
        for _ in range(self.config.steps if steps is None else steps):
            levels = self.step(levels, self.opinions(levels, tokens))
            yield levels

    def step(self, levels: Tensor, opinions: Opinions) -> Tensor:
        """Update all embeddings at once to the mean of their own value and their contributions: (B, N, L, D)."""
        return (levels + sum(opinions)) / self.votes

    def opinions(self, levels: Tensor, tokens: Tensor) -> Opinions:
        """Embeddings (B, N, L, D) and the lowest level's input (B, N, D) → the contributions to each embedding."""
        below = torch.cat([tokens[:, :, None], levels[:, :, :-1]], dim=2)  # (B, N, L, D)
        top_down = torch.zeros_like(levels)
        if self.top_down is not None:
            # a neural field: the same whole gives another part at another place
            above = levels[:, :, 1:] + self.positions[:, None]  # (B, N, L-1, D)
            top_down = F.pad(self.top_down(above), (0, 0, 0, 1))  # (B, N, L, D)
        consensus = self.consensus(levels) if self.config.consensus != "none" else torch.zeros_like(levels)
        return Opinions(self.bottom_up(below), top_down, consensus)

    def consensus(self, levels: Tensor) -> Tensor:
        """Mean of a level's embeddings at all locations, weighted by similarity: (B, N, L, D) → (B, N, L, D)."""
        directions = F.normalize(levels, dim=-1)  # (B, N, L, D)
        likeness = einsum("bild,bjld->blij", levels, directions) / math.sqrt(self.config.dim)  # (B, L, N, N)
        if self.config.consensus == "others":
            own = torch.eye(self.config.places, dtype=torch.bool, device=levels.device)  # (N, N)
            likeness = likeness.masked_fill(own, OWN_PLACE)
        if self.too_far is not None:
            likeness = likeness.masked_fill(self.too_far, -torch.inf)
        return einsum("blij,bjld->bild", likeness.softmax(-1), levels)  # (B, N, L, D)

    def patches(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) → the pixels of each location (B, N, P·P·3), in the order row, column, channel."""
        size = self.config.image_size
        if images.shape[1:] != (3, size, size):
            raise UsageError(f"GLOM sees images (B, 3, {size}, {size}), not {tuple(images.shape)}.")
        side = self.config.patch_size
        return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=side, q=side)  # (B, N, P·P·3)

    def images(self, patches: Tensor) -> Tensor:
        """Put patches (B, N, P·P·3) together again: (B, 3, S, S)."""
        side, grid = self.config.patch_size, self.config.grid
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=grid, p=side, q=side)

    @torch.no_grad()
    def _draw(self, generator: np.random.Generator) -> None:
        """Uniform in ±1/√inputs for the nets, normal for first levels: embeddings of length √D, and small positions.

        Positions as large as embeddings would keep any two locations from agreeing before training.
        """
        for name, parameter in self.named_parameters():
            if name in ("positions", "initial_levels"):
                drawn = generator.standard_normal(parameter.shape) * (0.1 if name == "positions" else 1.0)
            elif "bias" in name:
                drawn = np.zeros(parameter.shape)
            else:
                drawn = generator.uniform(-1, 1, parameter.shape) / math.sqrt(parameter.shape[-1])
            parameter.copy_(torch.from_numpy(drawn))


def _too_far(config: GLOMConfig) -> Tensor | None:
    """Pairs of locations (N, N) farther apart than the radius; None if all attend to each other."""
    if config.radius is None:
        return None
    axis = torch.arange(config.grid, dtype=torch.float64, device="cpu")
    where = torch.cartesian_prod(axis, axis)  # (N, 2), in reading order
    return torch.cdist(where, where) > config.radius
