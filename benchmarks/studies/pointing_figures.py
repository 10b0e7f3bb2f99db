"""Sheets of maps: photographs with the maps of their label, and where each map points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from apm.errors import UsageError
from apm.figures.base import new_figure, save
from apm.images.load import load_image
from apm.test_time.label_maps import peak
from apm.text.zeroshot import ZeroShotHead

from ..datasets import open_dataset
from .composites import Composite, Mapper, paste
from .islands import square_of

COLUMNS = ("teacher's grid", "field, grid", "field, both", "field, token", "attention, both")
WHOLE = (0.0, 0.0, 1.0, 1.0)
PHOTOGRAPHS = {
    "chelsea.png": "cat",
    "coffee.png": "cup of coffee",
    "rocket.jpg": "rocket",
    "astronaut.png": "astronaut",
}
"""Of scikit-image, all in the public domain or CC0, and what is on them."""
LABELS = ("cat", "dog", "horse", "cup of coffee", "teapot", "banana", "astronaut", "rocket", "car", "ship")

MakeMapper = Callable[[ZeroShotHead], Mapper]


def sheet(path: Path, root: Path | None, make: MakeMapper, teacher: Any, *, seed: int = 0) -> Path:
    """Draw maps of ten photographs of a folder of images, as they are: one of each class as far as there are ten."""
    data = open_dataset("folder", root)
    head = ZeroShotHead.build(teacher, data.class_names, data.templates)
    order = np.random.default_rng(seed).permutation(len(data.samples)).tolist()
    first: dict[int, int] = {}
    for number in order:
        first.setdefault(data.samples[number].label, number)
    chosen = [*first.values(), *(number for number in order if number not in first.values())][:10]
    shown = [
        Composite(square_of(data.samples[n].load()).resize((224, 224)), WHOLE, data.samples[n].label, -1)
        for n in sorted(chosen, key=lambda n: data.samples[n].label)
    ]
    return draw(path, shown, make(head))


def demo(path: Path, make: MakeMapper, teacher: Any, *, seed: int = 0) -> Path:
    """Draw maps of scikit-image's photographs, each pasted on the next one."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    images = [load_image(folder / name).image for name in PHOTOGRAPHS]
    names = list(PHOTOGRAPHS.values())
    rng = np.random.default_rng(seed)
    shown = []
    for number, image in enumerate(images):
        under = (number + 1) % len(images)
        labels = {"label": LABELS.index(names[number]), "background_label": LABELS.index(names[under])}
        shown.append(paste(image, images[under], canvas=224, side=96, rng=rng, **labels))
    templates = teacher.default_templates or ("a photo of a {}.",)
    return draw(path, shown, make(ZeroShotHead.build(teacher, LABELS, templates)))


def draw(path: Path, shown: Sequence[Composite], mapper: Mapper) -> Path:
    """Draw one row an image: the image, then the maps of its label, a cross where each is largest."""
    if not shown:
        raise UsageError("There is no image to draw.")
    figure = new_figure(1.3 * (len(COLUMNS) + 1), 1.42 * len(shown) + 0.2)
    axes = figure.subplots(len(shown), len(COLUMNS) + 1, squeeze=False)
    for number, (row, one) in enumerate(zip(axes, shown, strict=True)):
        maps = mapper(one.image).of(one.label)
        row[0].imshow(one.image)
        row[0].set_ylabel(mapper.head.labels[one.label], fontsize=7)
        for cell, source in zip(row[1:], COLUMNS, strict=True):
            values = maps[source].numpy() if "attention" in source else maps[source].sigmoid().numpy()
            grey = np.asarray(one.image.convert("L").convert("RGB"), dtype=float) / 255
            cell.imshow(0.35 + 0.6 * grey)
            extent = (0, one.image.width, one.image.height, 0)
            cell.imshow(values, extent=extent, cmap="magma", alpha=0.65, interpolation="nearest")
            y, x = peak(maps[source])
            hit = one.holds((y, x))
            cell.plot(x * one.image.width, y * one.image.height, "+", color="cyan", markersize=9, markeredgewidth=1.8)
            told = "" if one.box == WHOLE else (" · inside" if hit else " · OUTSIDE")
            top = f"max {values.max():.2f}" if "attention" not in source else ""
            cell.set_xlabel(f"{top}{told}".strip(" ·"), fontsize=6, labelpad=1)
            if number == 0:
                cell.set_title(source, fontsize=8)
        for cell in row:
            cell.set_xticks([])
            cell.set_yticks([])
            if one.box != WHOLE:
                top_, left, bottom, right = (edge * one.image.width for edge in one.box)
                cell.plot([left, right, right, left, left], [top_, top_, bottom, bottom, top_], color="white", lw=1)
    config = mapper.trainers["field, both"]
    return save(
        figure,
        path,
        settings=f"teacher {mapper.teacher.identity} · {len(mapper.head.labels)} labels · student of {mapper.grid} × "
        f"{mapper.grid} locations, {config.config.steps} steps, lr {config.config.lr:g}, {config.precision}, seed "
        f"{config.config.seed} · probability of the row's label at {mapper.size} × {mapper.size} places (softmax over "
        "the labels of logit scale × cosine), attention: mean of the heads · each map from its least (dark) to its "
        "largest value (bright); + where it is largest",
        dpi=100,
    )
