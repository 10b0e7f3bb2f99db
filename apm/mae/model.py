"""The masked autoencoder on one page (He et al. 2022), with a head that names classes (Gandelsman et al. 2022).

An image is cut into N patches. The *encoder*, timm's vision transformer, sees a class token and the few patches that
are left of it; the *decoder* is given their codes, and a mask token at every other place, and says the pixels there,
each patch in units of its own mean and deviation. The *head* reads the class from the codes of the whole image.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from einops import rearrange
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from apm.errors import UsageError
from apm.mae.config import MAEConfig

_Norm: Any = partial(nn.LayerNorm, eps=1e-6)


def positions(width: int, grid: int) -> Tensor:
    """Fixed codes of the class token (zeros) and of grid × grid places in reading order: (1, 1 + N, width) float32.

    The first half of the numbers is about the column, the second about the row; of each, first the sines, then the
    cosines, of frequencies from 1 down to 1 / 10000.
    """
    frequencies = 1 / 10000 ** (np.arange(width // 4) / (width / 4))  # (width / 4,)
    angles = np.arange(grid)[:, None] * frequencies  # (grid, width / 4)
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (grid, width / 2)
    rows, columns = np.divmod(np.arange(grid**2), grid)
    places = np.concatenate([line[columns], line[rows]], axis=1)  # (N, width)
    return torch.from_numpy(np.concatenate([np.zeros((1, width)), places])).float()[None]


def _blocks(width: int, heads: int, depth: int) -> nn.Sequential:
    return nn.Sequential(*(Block(width, heads, qkv_bias=True, norm_layer=_Norm) for _ in range(depth)))


class Decoder(nn.Module):
    """Codes of all places → their pixels."""

    positions: Tensor

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        width = config.decoder_width
        self.embed = nn.Linear(config.width, width)
        self.blocks = _blocks(width, config.decoder_heads, config.decoder_depth)
        self.norm = _Norm(width)
        self.pixels = nn.Linear(width, 3 * config.patch_size**2)
        self.register_buffer("positions", positions(width, config.grid), persistent=False)


class Head(nn.Module):
    """Codes of the whole image → a logit for each class; with no blocks a linear layer on the class token."""

    positions: Tensor

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        width = config.head_width if config.head_depth else config.width
        if config.head_depth:
            self.embed = nn.Linear(config.width, width)
            self.blocks = _blocks(width, config.head_heads, config.head_depth)
            self.norm = _Norm(width)
        self.deep = config.head_depth > 0
        self.classes = nn.Linear(width, config.classes)
        self.register_buffer("positions", positions(width, config.grid), persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        """(B, 1 + N, W) → (B, C)."""
        if self.deep:
            codes = self.norm(self.blocks(self.embed(codes) + self.positions))  # (B, 1 + N, head's W)
        return self.classes(codes[:, 0])


class MaskedAutoencoder(nn.Module):
    """Encoder, decoder, mask token, and a head where the sizes have classes."""

    encoder: Any  # to mypy, parameters of timm's may be None

    def __init__(self, config: MAEConfig, *, seed: int | None = 0) -> None:
        """Build it and draw all weights from `seed`; None: they are filled from elsewhere."""
        super().__init__()
        self.config = config
        self.encoder = VisionTransformer(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.heads,
            num_classes=0,
            global_pool="",
            norm_layer=_Norm,
            weight_init="skip",
        )
        self.encoder.pos_embed.requires_grad_(False)  # fixed
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.decoder_width))
        self.decoder = Decoder(config)
        self.head = Head(config) if config.classes else None
        self.fuse(False)
        if seed is not None:
            self.draw(seed)

    def fuse(self, fused: bool) -> None:
        """Compute attention in one kernel or, as at first, in steps: on a CPU that is faster where gradients are."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.fused_attn = fused  # type: ignore[misc]

    def forward(self, images: Tensor, order: Tensor, kept: int) -> Tensor:
        """Mean squared error (B,) of the masked patches of images (B, 3, S, S): what it is trained by.

        Args:
            images: normalised as `apm.images.load.student_input` does.
            order: of the patches of each image (B, N); or (M, N) for one image, which is then masked in M ways.
            kept: the first so many of each order are seen, the others masked.
        """
        said = self.decode(self.encode(self.tokens(images).expand(len(order), -1, -1), order[:, :kept]), order)
        errors = (said - self.targets(images)).square().mean(-1)  # (B, N)
        return errors.gather(1, order[:, kept:]).mean(1)

    def logits(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S), nothing masked → (B, C)."""
        if self.head is None:
            raise UsageError("This masked autoencoder has no head: `apm mae probe` trains one.")
        return self.head(self.encode(self.tokens(images)))

    def tokens(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) → patches as the encoder takes them, with their positions (B, N, W)."""
        size, side = self.config.image_size, self.config.patch_size
        if images.shape[1:] != (3, size, size):
            raise UsageError(f"The masked autoencoder sees images (B, 3, {size}, {size}), not {tuple(images.shape)}.")
        patches = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=side, q=side)
        projection = self.encoder.patch_embed.proj
        return F.linear(patches, projection.weight.flatten(1), projection.bias) + self.encoder.pos_embed[:, 1:]

    def encode(self, tokens: Tensor, seen: Tensor | None = None) -> Tensor:
        """Tokens (B, N, W), of which those numbered `seen` (B, K) are looked at, or all → codes (B, 1 + K, W)."""
        if seen is not None:
            tokens = tokens.gather(1, seen[..., None].expand(-1, -1, tokens.shape[-1]))  # (B, K, W)
        first = self.encoder.cls_token + self.encoder.pos_embed[:, :1]
        tokens = torch.cat([first.expand(len(tokens), -1, -1), tokens], dim=1)  # (B, 1 + K, W)
        return self.encoder.norm(self.encoder.blocks(tokens))

    def decode(self, codes: Tensor, order: Tensor) -> Tensor:
        """Codes (B, 1 + K, W) of the first K places of each order (B, N) → the pixels of all (B, N, P·P·3)."""
        known = self.decoder.embed(codes)  # (B, 1 + K, decoder's W)
        masked = self.mask_token.expand(len(order), order.shape[1] + 1 - known.shape[1], -1)
        places = torch.cat([known[:, 1:], masked.to(known.dtype)], dim=1)  # (B, N, decoder's W), in that order
        places = places.gather(1, order.argsort(1)[..., None].expand_as(places))
        x = torch.cat([known[:, :1], places], dim=1) + self.decoder.positions
        return self.decoder.pixels(self.decoder.norm(self.decoder.blocks(x)))[:, 1:]

    def targets(self, images: Tensor) -> Tensor:
        """Patches of images (B, 3, S, S), in the order row, column, channel, less their mean, by their deviation."""
        side = self.config.patch_size
        patches = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=side, q=side)
        return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()

    def draw(self, seed: int, *parts: str) -> None:
        """Draw the weights whose names begin so, or all, from `seed`: Xavier's uniform; tokens normal with 0.02."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parts and not name.startswith(parts):
                    continue
                if name == "encoder.pos_embed":
                    parameter.copy_(positions(self.config.width, self.config.grid))
                elif name in ("encoder.cls_token", "mask_token"):
                    nn.init.normal_(parameter, std=0.02, generator=generator)
                elif parameter.ndim > 1:
                    nn.init.xavier_uniform_(parameter.view(len(parameter), -1), generator=generator)
                else:
                    nn.init.constant_(parameter, float("norm" in name and name.endswith("weight")))
