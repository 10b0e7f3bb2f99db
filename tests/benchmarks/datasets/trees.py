"""Small trees of pictures, laid out as data sets are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from apm.labels import imagenet_subset, imagenet_wnids

WNIDS = imagenet_wnids()


def write(path: Path, value: int = 0, size: tuple[int, int] = (40, 36)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def tree(folder: Path, classes: Sequence[str], images: int = 2) -> Path:
    for name in classes:
        for number in range(images):
            write(folder / name / f"{name}_{number}.png", number)
    return folder


def split_json(path: Path, test: list[list[object]], train: list[list[object]] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"train": train or [], "val": [], "test": test}))


def wnids_of(label_space: str, count: int = 4) -> list[str]:
    return [WNIDS[index] for index in imagenet_subset(label_space)[:count]]
