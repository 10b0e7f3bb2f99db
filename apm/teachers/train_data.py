"""Training images of the embedded teacher: decoded once into memory, augmented a batch at a time.

Three Parquet files (`image` {bytes}, `label`, `class_name`, `soft_index`, `soft_prob`) and the training half of
scikit-learn's digits become one `Source` each. A *concept* is what an image can be labelled with: the 1000 ImageNet
classes first (0–999), then CIFAR-10's ten words, then ten digits.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from apm.labels import label_set
from apm.teachers.digits import digit_image, digits_split

CIFAR_WORDS = label_set("cifar10")
DIGIT_NAMES = label_set("digits")
IMAGENET = 1000
CIFAR_START = IMAGENET
DIGIT_START = CIFAR_START + len(CIFAR_WORDS)
CONCEPTS = DIGIT_START + len(DIGIT_NAMES)

HOLDOUT = 64
"""Every 64th image of a source is never trained on: it watches progress and calibrates."""
LARGEST = 64
"""Side to which larger images are brought. Were one set sharper than the others, sharpness alone would tell its classes
apart, and every sharp photograph would be taken for one of them."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Source:
    """One labelled set: `images` (n, side, side, 3) uint8, `labels` (n,) concept indices.

    `soft` (n, 10) holds probabilities of the concepts `soft_index` (n, 10) from a public classifier, zeros where it has
    none. `share` is the part of every batch that is drawn from this source. `flip`: a mirrored image keeps its meaning.
    """

    name: str
    images: Tensor
    labels: Tensor
    soft_index: Tensor
    soft: Tensor
    share: float
    flip: bool = True


def _parquet(path: Path, *, name: str, offset: int, share: float) -> Source:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    images = np.stack([_small(row["bytes"]) for row in table["image"].to_pylist()])
    labels = torch.tensor(table["label"].to_pylist()) + offset
    soft_index = torch.zeros(len(labels), 10, dtype=torch.long)
    soft = torch.zeros(len(labels), 10)
    for row, (index, probability) in enumerate(
        zip(table["soft_index"].to_pylist(), table["soft_prob"].to_pylist(), strict=True)
    ):
        if index:
            soft_index[row, : len(index)] = torch.tensor(index)
            soft[row, : len(index)] = torch.tensor(probability)
    return Source(name, torch.from_numpy(images), labels, soft_index, soft, share)


def _small(data: bytes) -> np.ndarray:
    """Decode to at most `LARGEST` pixels a side, (side, side, 3) uint8."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if max(image.size) > LARGEST:
        image = image.resize((LARGEST, LARGEST), Image.Resampling.BICUBIC)
    return np.asarray(image)


def load_sources(folder: Path) -> list[Source]:
    """Every training image, from `folder` (the three Parquet files) and scikit-learn's digits.

    Raises FileNotFoundError when a Parquet file is absent.
    """
    digits = digits_split()
    pictures = np.stack([np.asarray(digit_image(digit, 64)) for digit in digits.train_images])
    count = len(pictures)
    return [
        _parquet(folder / "tiny-imagenet-train.parquet", name="tiny-imagenet", offset=0, share=0.80),
        _parquet(folder / "imagenette-train.parquet", name="imagenette", offset=0, share=0.10),
        _parquet(folder / "cifar10-train.parquet", name="cifar10", offset=CIFAR_START, share=0.08),
        Source(
            "digits",
            torch.from_numpy(pictures),
            torch.from_numpy(digits.train_labels) + DIGIT_START,
            torch.zeros(count, 10, dtype=torch.long),
            torch.zeros(count, 10),
            share=0.02,
            flip=False,
        ),
    ]


def normalise(images: Tensor) -> Tensor:
    """(B, side, side, 3) uint8 → (B, 3, side, side) float32 with ImageNet's mean and deviation."""
    x = images.permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def augment(images: Tensor, size: int, generator: torch.Generator, *, flip: bool, scale: float = 0.35) -> Tensor:
    """Random resized crop, flip, colour, and now and then grey, noise or blur: (B, s, s, 3) uint8 → (B, 3, size, size).

    `scale` is the least area of a crop. Everything is drawn from `generator`, per image.
    """
    x = normalise(images)
    b = len(x)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(b, generator=generator) * (high - low) + low

    side, aspect = uniform(scale, 1).sqrt(), uniform(-0.29, 0.29).exp().sqrt()
    width, height = (side * aspect).clamp(max=1), (side / aspect).clamp(max=1)
    mirror = (torch.rand(b, generator=generator) < 0.5).float() * 2 - 1 if flip else torch.ones(b)
    theta = torch.zeros(b, 2, 3)
    theta[:, 0, 0], theta[:, 0, 2] = width * mirror, uniform(-1, 1) * (1 - width)
    theta[:, 1, 1], theta[:, 1, 2] = height, uniform(-1, 1) * (1 - height)
    grid = F.affine_grid(theta, [b, 3, size, size], align_corners=False)
    x = F.grid_sample(x, grid, align_corners=False, padding_mode="reflection")

    def gate(probability: float) -> Tensor:
        return (torch.rand(b, generator=generator) < probability).float().view(b, 1, 1, 1)

    jitter = gate(0.5)
    brightness = uniform(-0.8, 0.8).view(b, 1, 1, 1) * jitter
    contrast = 1 + uniform(-0.4, 0.4).view(b, 1, 1, 1) * jitter
    saturation = 1 + uniform(-0.4, 0.4).view(b, 1, 1, 1) * jitter
    saturation = saturation * (1 - gate(0.05))  # 0: a grey image
    grey = x.mean(1, keepdim=True)
    x = (grey + (x - grey) * saturation) * contrast + brightness
    noisy = gate(0.1) * uniform(0, 0.8).view(b, 1, 1, 1)
    x = x + noisy * torch.randn(x.shape, generator=generator)
    blurred = F.interpolate(F.avg_pool2d(x, 4), size=(size, size), mode="bilinear", align_corners=False)
    blur = gate(0.1) * uniform(0.3, 1).view(b, 1, 1, 1)
    return (x + blur * (blurred - x)).contiguous(memory_format=torch.channels_last)
