"""Stand-ins used by many tests: small, deterministic, without weights to load."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from apm.images.load import central_square, normalised


def png_of_size(width: int, height: int) -> bytes:
    """Return a PNG that says it has so many black and white pixels, and holds none of them: soon made at any size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


class FakeTeacher:
    """A tiny teacher: images and texts go to fixed vectors that depend on nothing but their content.

    An image's vector is a fixed random projection of its 8×8 average-pooled pixels; a text's vector is drawn from a
    generator seeded by the text; a grid has a cell for every 8 pixels, the cell's mean colour through a part of the
    same projection. `text_calls`, `image_calls` and `grid_calls` count what was encoded, so that a test can see what
    was computed and what came from a cache.
    """

    def __init__(
        self,
        dim: int = 16,
        *,
        image_size: int = 32,
        name: str = "fake",
        seed: int = 0,
        logit_scale: float = 20.0,
        device: str | torch.device = "cpu",
        default_labels: tuple[str, ...] | None = None,
        default_templates: tuple[str, ...] | None = None,
    ) -> None:
        self.name = name
        self.dim = dim
        self.seed = seed
        self.logit_scale = logit_scale
        self.image_size = self.grid_size = image_size
        self.mean = (0.5, 0.5, 0.5)
        self.std = (0.5, 0.5, 0.5)
        self.notes: tuple[str, ...] = ()
        self.default_labels = default_labels
        self.default_templates = default_templates
        self.device = torch.device(device)
        self.text_calls = 0
        self.image_calls = 0
        self.grid_calls = 0
        weights = np.random.default_rng(seed).standard_normal((3 * 64, dim)) / 8
        self.weights = torch.from_numpy(weights.astype(np.float32)).to(self.device)
        self.identity = f"{name}@{hashlib.sha256(self.weights.cpu().numpy().tobytes()).hexdigest()[:16]}"

    def preprocess(self, image: Image.Image) -> Tensor:
        side = self.image_size
        pixels = np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
        return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1).contiguous()

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        self.image_calls += len(pixels)
        pooled = functional.adaptive_avg_pool2d(pixels.to(self.device, torch.float32), 8)  # (B, 3, 8, 8)
        # The product is summed row by row: a row's bits then do not depend on the batch it is in.
        return (pooled.flatten(1).unsqueeze(2) * self.weights).sum(1)  # (B, D)

    @torch.no_grad()
    def encode_grid(self, image: Image.Image, *, size: int | None = None) -> Tensor:
        self.grid_calls += 1
        side = size or self.grid_size
        square = normalised(central_square(image.convert("RGB"), side), self.mean, self.std)
        cells = functional.adaptive_avg_pool2d(square, side // 8).permute(1, 2, 0)  # (h', w', 3)
        return (cells.unsqueeze(3) * self.weights[:3].cpu()).sum(2).to(self.device)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        self.text_calls += len(texts)
        rows = np.empty((len(texts), self.dim), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            seed = int.from_bytes(hashlib.sha256(f"{self.seed}|{text}".encode()).digest()[:8], "little")
            row[:] = np.random.default_rng(seed).standard_normal(self.dim)
        return torch.from_numpy(rows).to(self.device)
