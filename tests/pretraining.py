"""What the tests of self-supervised training share: a tiny grid teacher, tiny students, tiny images."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from apm.images.load import central_square
from apm.pretrain.cache import GridCache, build_cache
from apm.pretrain.config import PretrainConfig
from apm.pretrain.images import open_images
from apm.pretrain.student import Student
from apm.student.config import APMConfig
from apm.student.model import APM

STUDENT = APMConfig(
    dim=4, image_size=16, patch_size=4, position_dim=8, hidden=(16, 12, 8), rgb_hidden=8, readout="mean", init_std=0.1
)
TRAINING = PretrainConfig(steps=6, batch_size=4, lr=1e-2, warmup=2, held_out=0.25, seed=3)
DATA = {"data": "fake", "teacher": "fake@0", "grid_size": 8}


def grey_student(seed: int = 5, *, grey_input: bool = True) -> Student:
    """A student that says colours, of grey input or not: drawn, with colours that no ReLU has shut."""
    model = APM(replace(STUDENT, init_std=0.5), seed=seed)
    with torch.no_grad():
        model.rgb_head.layer3.weight.mul_(0.05)
        model.rgb_head.layer3.bias.copy_(torch.tensor([0.6, 0.4, 0.3]))
    settings = {"batch_size": 4, "images": 12, "teacher": None, "seed": 3, "grey_input": grey_input}
    return Student(model, {"settings": settings, "step": 6})


class GridTeacher:
    """Features of a 2×2 grid: a fixed projection of each part's mean colour. Counts what it was asked for."""

    name, identity, dim, notes, grid_size = "fake", "fake@0", 4, ("A teacher for tests.",), 8

    def __init__(self, scale: float = 1.0) -> None:
        self.device = torch.device("cpu")
        self.calls = 0
        self.scale = scale

    def encode_grid(self, image: Image.Image, *, size: int | None = None) -> Tensor:
        self.calls += 1
        square = np.asarray(central_square(image, size or self.grid_size), dtype=np.float32) / 255
        means = torch.from_numpy(square).unflatten(0, (2, -1)).unflatten(2, (2, -1)).mean((1, 3))  # (2, 2, 3)
        return self.scale * torch.cat((means, means.mean(-1, keepdim=True)), dim=-1)


def picture(number: int, side: int = 20) -> Image.Image:
    """A picture of its own for each number: two colours, one in a corner."""
    rng = np.random.default_rng(number)
    pixels = np.empty((side, side + 4, 3), np.uint8)
    pixels[:] = rng.integers(0, 256, 3)
    pixels[: side // 2, : side // 2] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels)


def make_folder(folder: Path, count: int = 12) -> Path:
    """Write pictures into two sub-folders."""
    for number in range(count):
        path = folder / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    return folder


def make_parquet(
    path: Path, count: int = 12, *, plain: bool = False, broken: tuple[int, ...] = (), classes: int | None = None
) -> Path:
    """Write the same pictures as rows, a few to a row group; each is a class of its own, or they take turns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for number in range(count):
        buffer = io.BytesIO()
        picture(number).save(buffer, "PNG")
        data = buffer.getvalue()[: 60 if number in broken else None]
        rows.append(data if plain else {"bytes": data, "path": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table({"image": rows, "label": [number % (classes or count) for number in range(count)]}),
        path,
        row_group_size=5,
    )
    return path


def make_cache(folder: Path, count: int = 12) -> GridCache:
    """The cache of `count` pictures for `STUDENT`."""
    return build_cache(open_images(make_folder(folder / "images", count)), GridTeacher(), folder / "cache", size=16)
