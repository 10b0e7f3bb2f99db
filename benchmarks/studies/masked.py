"""Photographs with masks of categories, objects cut out of them along their outlines, and scores of label maps."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from apm.errors import UsageError
from apm.images.load import load_image
from apm.images.paths import printable

from .scenes import masked_files, read_mask

UNLABELLED = 0
THINGS = 90
"""COCO's categories up to this one are things, which can be counted; the others are stuff."""
LEAST_OBJECT, MOST_OBJECT = 0.04, 0.6
"""Shares of a photograph's area that an object to be cut out of it has."""
OBJECT_SIDES = (0.4, 0.7)
"""Longer side of a pasted object, as a share of the shorter side of the photograph below."""
RESAMPLES = 2000

Counts = dict[str, list[int]]
"""Category → pixels where the map says it rightly, where it says it, where it is; unlabelled pixels left out."""


@dataclass(frozen=True)
class Masked:
    """A photograph and what is where on it."""

    name: str
    image: Image.Image
    truth: NDArray[np.int32]
    """(H, W) category ids, 0 unlabelled."""
    pasted: int = 0
    """Category of the object that was pasted on it, 0 for none."""

    @property
    def categories(self) -> list[int]:
        """Those that are there, ascending."""
        return [int(one) for one in np.unique(self.truth) if one != UNLABELLED]


def read_categories(root: Path) -> dict[int, str]:
    """Ids and names of ``categories.tsv``, without the unlabelled; names as words, without COCO's suffixes.

    Raises:
        UsageError: there is no such file.
    """
    path = root / "categories.tsv"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, delimiter="\t"))
    except OSError as error:
        raise UsageError(
            f"{printable(path)} cannot be read ({error.strerror}): --root is a folder with images/, "
            "masks/ and categories.tsv."
        ) from None
    return {int(number): words(name) for number, name, *_ in rows if int(number) != UNLABELLED}


def words(name: str) -> str:
    """What a person would call a COCO category: "sky-other-merged" → "sky", "wall-brick" → "brick wall"."""
    for suffix in ("-merged", "-other", "-stuff"):
        name = name.removesuffix(suffix)
    kind, _, of = name.partition("-")
    return f"{of} {kind}" if of and kind in ("wall", "floor") else name.replace("-", " ")


def read_masked(root: Path, limit: int, part: str = "all") -> list[Masked]:
    """Photographs of ``images/`` that have a mask in ``masks/``, in the order of their names.

    Args:
        root: of the data.
        limit: how many of the part, at most.
        part: all, or every other one: tuning (the first, third, …) or report (the rest).

    Raises:
        UsageError: there is none.
    """
    start, step = {"all": (0, 1), "tuning": (0, 2), "report": (1, 2)}[part]
    chosen = masked_files(root)[start::step][:limit]
    if not chosen:
        raise UsageError(f"{printable(root)} holds one photograph with a mask, which is for tuning: none to report.")
    return [_read(image, mask) for image, mask in chosen]


def _read(image: Path, mask: Path) -> Masked:
    photograph, truth = load_image(image).image, read_mask(mask)
    if truth.shape != photograph.size[::-1]:
        raise UsageError(f"{printable(mask)} is {truth.shape[::-1]}, its photograph {photograph.size}.")
    return Masked(image.stem, photograph, truth)


def composites(photographs: Sequence[Masked], count: int, *, seed: int) -> list[Masked]:
    """Paste objects, cut out along their own outlines, on other photographs, which do not show their category.

    Args:
        photographs: to take objects from, and to paste them on.
        count: how many, at most; no object comes twice.
        seed: of order, choice, size and place.
    """
    rng = np.random.default_rng(seed)
    objects = [(number, *one) for number, photograph in enumerate(photographs) for one in objects_of(photograph)]
    made: list[Masked] = []
    for chosen in rng.permutation(len(objects)).tolist():
        if len(made) == count:
            break
        number, category, outline = objects[chosen]
        grounds = [one for one in photographs if category not in one.categories]
        if not grounds:
            continue
        ground = grounds[int(rng.integers(len(grounds)))]
        made.append(paste(photographs[number], category, outline, ground, rng=rng))
    return made


def objects_of(photograph: Masked) -> list[tuple[int, NDArray[np.bool_]]]:
    """Things that are neither small nor nearly all of a photograph: category, and (H, W) the connected piece."""
    from skimage.measure import label

    found = []
    for category in photograph.categories:
        if category > THINGS:
            continue
        pieces = label(photograph.truth == category, connectivity=1)
        sizes = np.bincount(pieces.ravel())[1:] / pieces.size
        fitting = np.flatnonzero((sizes >= LEAST_OBJECT) & (sizes <= MOST_OBJECT))
        found += [(category, pieces == piece + 1) for piece in fitting]
    return found


def paste(
    photograph: Masked, category: int, outline: NDArray[np.bool_], ground: Masked, *, rng: np.random.Generator
) -> Masked:
    """Paste the pixels inside an outline on another photograph, at a size and a place that are drawn."""
    rows, cols = np.flatnonzero(outline.any(axis=1)), np.flatnonzero(outline.any(axis=0))
    box = (int(cols[0]), int(rows[0]), int(cols[-1]) + 1, int(rows[-1]) + 1)
    width, height = box[2] - box[0], box[3] - box[1]
    scale = rng.uniform(*OBJECT_SIDES) * min(ground.image.size) / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    shape = (
        Image.fromarray(outline[box[1] : box[3], box[0] : box[2]]).convert("L").resize(size, Image.Resampling.NEAREST)
    )
    picture = photograph.image.crop(box).resize(size, Image.Resampling.BICUBIC)
    left, top = (int(rng.integers(0, whole - side + 1)) for whole, side in zip(ground.image.size, size, strict=True))
    image, truth = ground.image.copy(), ground.truth.copy()
    image.paste(picture, (left, top), shape)
    truth[top : top + size[1], left : left + size[0]][np.array(shape) > 0] = category
    return Masked(f"{photograph.name}-{category}-on-{ground.name}", image, truth, pasted=category)


def counts(found: NDArray[np.int32], truth: NDArray[np.int32]) -> Counts:
    """Compare a map of category ids with the truth."""
    known = truth != UNLABELLED
    said, is_ = found[known], truth[known]
    return {
        str(category): [
            int(((said == category) & (is_ == category)).sum()),
            int((said == category).sum()),
            int((is_ == category).sum()),
        ]
        for category in np.union1d(said, is_).tolist()
    }


def tallied(each: Sequence[Counts]) -> NDArray[np.float64]:
    """Counts of n images as (n, K, 3), K the categories that are anywhere among them."""
    names = sorted({name for one in each for name in one}, key=int)
    return np.array([[one.get(name, (0, 0, 0)) for name in names] for one in each], dtype=float).reshape(
        len(each), len(names), 3
    )


def mean_iou(tally: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the categories that are in the truth, (..., K, 3) → (...), of intersection over union."""
    correct, said, there = np.moveaxis(tally, -1, 0)
    iou = correct / np.maximum(said + there - correct, 1)
    present = there > 0
    scored: NDArray[np.float64] = (iou * present).sum(axis=-1) / present.sum(axis=-1)
    return scored


def pixel_accuracy(tally: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of the labelled pixels whose category is said, (..., K, 3) → (...)."""
    share: NDArray[np.float64] = tally[..., 0].sum(axis=-1) / tally[..., 2].sum(axis=-1)
    return share


def resampled(n: int, seed: int = 0) -> NDArray[np.float64]:
    """How often each of n images is in each of `RESAMPLES` samples with replacement, (R, n); the first is all once."""
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return np.concatenate([np.ones((1, n)), drawn])


def with_interval(samples: NDArray[np.float64]) -> dict[str, float]:
    """The value of all images, and 95 % of what the resamples give (percentiles)."""
    low, high = np.percentile(samples[1:], [2.5, 97.5])
    return {"value": float(samples[0]), "low": float(low), "high": float(high)}


def by_category(each: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, dict[str, float]]:
    """Of every category of the truth: its IoU over all images, and on how many it is."""
    found: dict[str, dict[str, float]] = {}
    for name in sorted({name for one in each for name in one}, key=int):
        correct, said, there = np.array([one.get(name, (0, 0, 0)) for one in each]).sum(axis=0)
        if there:
            images = sum(name in one and one[name][2] > 0 for one in each)
            found[name] = {"iou": float(correct / (said + there - correct)), "images": images}
    return found
