"""Training images of the embedded teacher: decoded once into memory, augmented a batch at a time.

Three Parquet files (`image` {bytes}, `label`, `class_name`, `soft_index`, `soft_prob`) and the training half of
scikit-learn's digits become one `Source` each. A *concept* is what an image can be labelled with: the 1000 ImageNet
classes first (0–999), then CIFAR-10's ten words, then ten digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from apm.images.load import IMAGENET_MEAN, IMAGENET_STD, decode_image, load_image
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
STORED_SIDE, STORED_QUALITY = 64, 75
"""Tiny ImageNet's images are JPEGs of 64 pixels and quality 75. Every other image is brought to the same form before it
is augmented: were one set sharper or cleaner than the others, that alone would tell its classes apart, and every clean
photograph would be taken for one of them."""
MEAN, STD = IMAGENET_MEAN, IMAGENET_STD


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


@dataclass(frozen=True)
class Sharp:
    """Sharp photographs, never trained on, that a checkpoint is chosen by.

    `images` (n, 128, 128, 3) uint8 with `labels` (n,): imagenette's held-out images. `others` (m, 128, 128, 3):
    photographs of none of its ten classes.
    """

    images: Tensor
    labels: Tensor
    others: Tensor


def load_sharp(folder: Path, photographs: Path) -> Sharp:
    """Imagenette's held-out images of the Parquet file in `folder`, and all JPEGs below `photographs`.

    Raises FileNotFoundError when there are none.
    """
    paths = sorted(photographs.rglob("*.jpg"))
    if not paths:
        raise FileNotFoundError(f"no .jpg below {photographs}")
    others = torch.from_numpy(np.stack([_square(load_image(path).image) for path in paths]))
    return Sharp(*load_sharp_classes(folder, held_out=True), others)


def load_sharp_classes(folder: Path, *, held_out: bool = False) -> tuple[Tensor, Tensor]:
    """Imagenette's images of the Parquet file in `folder`, sharp: (n, 128, 128, 3) uint8, and labels (n,).

    Those that are trained on, or those that are `held_out`.
    """
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "imagenette-train.parquet", columns=["image", "label"]).to_pylist()
    rows = [row for number, row in enumerate(table) if (number % HOLDOUT == 0) is held_out]
    images = np.stack([_square(decode_image(row["image"]["bytes"], "an image of imagenette").image) for row in rows])
    return torch.from_numpy(images), torch.tensor([row["label"] for row in rows])


def _square(image: Image.Image) -> np.ndarray:
    """The central square of a photograph at 128 pixels, (128, 128, 3) uint8."""
    return np.asarray(ImageOps.fit(image, (128, 128), Image.Resampling.BICUBIC))


def _parquet(path: Path, *, name: str, offset: int, share: float) -> Source:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    images = np.stack([_as_stored(row["bytes"], name) for row in table["image"].to_pylist()])
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


def _as_stored(data: bytes, name: str) -> np.ndarray:
    """Decode to at most `STORED_SIDE` pixels a side, with the traces of a JPEG of `STORED_QUALITY`: uint8 (s, s, 3)."""
    image = decode_image(data, f"an image of {name}").image
    if max(image.size) > STORED_SIDE:
        image = image.resize((STORED_SIDE, STORED_SIDE), Image.Resampling.BICUBIC)
        return _saved_as_jpeg(np.asarray(image), STORED_QUALITY)
    return np.asarray(image)


def _saved_as_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """What is left of an image (h, w, 3) uint8 once it was saved as JPEG of `quality` with halved colours (4:2:0)."""
    _, data = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
    assert decoded is not None  # it was encoded just now
    return decoded[:, :, ::-1]


def load_sources(folder: Path) -> list[Source]:
    """Every training image, from `folder` (the three Parquet files) and scikit-learn's digits.

    Raises FileNotFoundError when a Parquet file is absent.
    """
    digits = digits_split()
    pictures = np.stack(
        [_saved_as_jpeg(np.asarray(digit_image(digit, STORED_SIDE)), STORED_QUALITY) for digit in digits.train_images]
    )
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


def at_size(images: Tensor, size: int) -> Tensor:
    """(B, side, side, 3) uint8 → (B, 3, size, size), normalised: what the finished teacher sees."""
    return F.interpolate(normalise(images), (size, size), mode="bicubic", antialias=True)


def augment(images: Tensor, size: int, generator: torch.Generator, *, flip: bool, scale: float = 0.35) -> Tensor:
    """Random crop, flip, colour, noise, blur, resolution and JPEG: (B, s, s, 3) uint8 → (B, 3, size, size), normalised.

    `scale` is the minimum area of a crop. Everything is drawn from `generator`, per image.
    """
    x = _cropped(normalise(images), size, generator, flip=flip, scale=scale)
    b = len(x)

    def uniform(low: float, high: float) -> Tensor:
        return (torch.rand(b, generator=generator) * (high - low) + low).view(b, 1, 1, 1)

    def gate(probability: float) -> Tensor:
        return (torch.rand(b, generator=generator) < probability).float().view(b, 1, 1, 1)

    jitter = gate(0.5)
    brightness = uniform(-0.8, 0.8) * jitter
    contrast = 1 + uniform(-0.4, 0.4) * jitter
    saturation = 1 + uniform(-0.4, 0.4) * jitter
    saturation = saturation * (1 - gate(0.05))  # 0: a grey image
    grey = x.mean(1, keepdim=True)
    x = (grey + (x - grey) * saturation) * contrast + brightness
    noisy = gate(0.1) * uniform(0, 0.8)
    x = x + noisy * torch.randn(x.shape, generator=generator)
    blurred = F.interpolate(F.avg_pool2d(x, 4), size=(size, size), mode="bilinear", align_corners=False)
    x = x + gate(0.1) * uniform(0.3, 1) * (blurred - x)
    return resave(_at_random_resolution(x, generator), generator).contiguous(memory_format=torch.channels_last)


def _cropped(x: Tensor, size: int, generator: torch.Generator, *, flip: bool, scale: float) -> Tensor:
    """A random crop of at least `scale` of each image's area, in half of the cases mirrored: (B, 3, size, size)."""
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
    return F.grid_sample(x, grid, align_corners=False, padding_mode="reflection")


def _at_random_resolution(x: Tensor, generator: torch.Generator) -> Tensor:
    """A quarter of the images (B, 3, s, s) lose detail: scaled down to 0.4 to 0.9 of their side, and up again."""
    factors = (0.4, 0.55, 0.7, 0.9)
    choice = torch.randint(4 * len(factors), (len(x),), generator=generator)
    size = x.shape[-1]
    for number, factor in enumerate(factors):
        chosen = choice == number
        small = F.interpolate(x[chosen], size=(round(size * factor),) * 2, mode="bilinear", antialias=True)
        x[chosen] = F.interpolate(small, size=(size, size), mode="bicubic", antialias=True)
    return x


def resave(x: Tensor, generator: torch.Generator, *, share: float = 0.35) -> Tensor:
    """Save `share` of the images as JPEG of quality 20…100 and read them again, at the size that the network sees.

    Args:
        x: (B, 3, s, s), normalised.
        generator: which images, and their qualities, are drawn from it.
        share: in [0, 1].

    Returns:
        (B, 3, s, s), normalised. Images that are saved are rounded to 8 bits and cut to [0, 255] before.
    """
    chosen = (torch.rand(len(x), generator=generator) < share).nonzero().squeeze(1)
    qualities = torch.randint(20, 101, (len(chosen),), generator=generator)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    pixels = ((x[chosen] * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    saved = [_saved_as_jpeg(image, quality) for image, quality in zip(pixels.numpy(), qualities.tolist(), strict=True)]
    if saved:
        x[chosen] = normalise(torch.from_numpy(np.stack(saved)))
    return x
