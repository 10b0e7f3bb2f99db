"""Pictures of what a fixed model's layers hold at each place of an image: colours, parts, and both beside controls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from apm.figures.base import bare, component_colours, new_figure, save, save_arrays
from apm.figures.islands import outlined
from apm.images.files import write_atomically
from apm.student import islands
from apm.test_time.layer_fields import pooled

if TYPE_CHECKING:
    from apm.test_time.layer_fields import LayerSeen

TSNE_SIDE = 32
"""Places a side at most for t-SNE, whose time grows with their square."""
PARTS: dict[str, Any] = {"cmap": "tab20", "interpolation": "nearest", "vmin": 0, "vmax": 19}


def write_layers(
    found: Sequence[LayerSeen], square: Image.Image, stem: Path, *, settings: Mapping[str, Any], kind: str = "png"
) -> list[Path]:
    """Write pictures, arrays (npz) and measures (json) of one image.

    Args:
        found: of the image, by layer.
        square: what the model sees.
        stem: path of all the files, without endings.
        settings: for the small print and the record; plain JSON values, ``seed`` among them.
        kind: ``png`` or ``svg``, of the pictures.

    Returns:
        The files.
    """
    words = " · ".join(f"{name} {value}" for name, value in settings.items())

    def path(ending: str) -> Path:
        return stem.with_name(f"{stem.name}-layers{ending}")

    coloured = {one.layer: tsne_colours(one.field, seed=settings["seed"]) for one in found}
    record = {
        "settings": settings,
        "layers": {
            one.layer: {"module": one.module, "places": one.places, "width": one.field.shape[-1]} for one in found
        },
        "measures": {one.layer: one.measured for one in found},
    }
    controls = [parts(path(f"-parts.{kind}"), square, found, settings=words)] if len(found[0].fields) > 1 else []
    return [
        colours(path(f".{kind}"), square, found, coloured, settings=words),
        *controls,
        save_arrays(
            path(".npz"),
            settings=json.dumps(settings),
            **{f"fields/{one.layer}": one.field for one in found},
            **{f"tsne/{one.layer}": coloured[one.layer] for one in found},
            **{f"superpixels/{one.layer}": one.superpixels for one in found},
            **{f"clusters/{one.layer}/{name}": labels for one in found for name, labels in one.clusters.items()},
        ),
        write_atomically(path(".json"), (json.dumps(record, indent=1) + "\n").encode()),
    ]


def tsne_colours(field: NDArray[np.floating], *, seed: int) -> NDArray[np.float64]:
    """Colour each place of a field (h, h, D) by three numbers of t-SNE: (h', h', 3) in [0, 1].

    Of a field finer than `TSNE_SIDE` blocks of places are taken together.
    """
    coarse = pooled(field, TSNE_SIDE)
    laid = islands.embed(coarse, seed=seed, numbers=3).reshape(*coarse.shape[:2], 3)
    return component_colours([laid])[0]


def colours(
    path: Path,
    square: Image.Image,
    found: Sequence[LayerSeen],
    coloured: Mapping[str, NDArray[np.float64]],
    *,
    settings: str,
) -> Path:
    """Draw each layer's field as colours, by principal components and by t-SNE, and its parts beside superpixels.

    Args:
        path: .png or .svg.
        square: what the model sees.
        found: by layer.
        coloured: of `tsne_colours`, by layer.
        settings: small print.
    """
    figure = new_figure(9.5, 2.15 * len(found))
    axes = figure.subplots(len(found), 5, squeeze=False)
    titles = ("image", "three principal components", "three numbers of t-SNE", "k-means", "superpixels")
    for row, one in zip(axes, found, strict=True):
        row[0].imshow(square)
        row[0].set_ylabel(one.title, fontsize=7)
        row[1].imshow(component_colours([one.field])[0], interpolation="nearest")
        row[2].imshow(coloured[one.layer], interpolation="nearest")
        row[3].imshow(one.clusters["image"], **PARTS)
        row[4].imshow(outlined(square, one.superpixels))
    for one_axes, title in zip(axes[0], titles, strict=True):
        one_axes.set_title(title, fontsize=8)
    bare(axes.flat)
    return save(figure, path, settings=settings)


def parts(path: Path, square: Image.Image, found: Sequence[LayerSeen], *, settings: str) -> Path:
    """Draw the clusters of each layer's field and of the controls' beside the image's superpixels.

    Args:
        path: .png or .svg.
        square: what the model sees.
        found: by layer.
        settings: small print.
    """
    columns = 1 + len(found[0].clusters)
    figure = new_figure(1.6 * columns, 2.2 * len(found))
    axes = figure.subplots(len(found), columns, squeeze=False)
    for row, one in zip(axes, found, strict=True):
        row[0].imshow(outlined(square, one.superpixels))
        row[0].set_ylabel(one.title, fontsize=7)
        row[0].set_title("superpixels", fontsize=7)
        for drawn, (condition, labels) in zip(row[1:], one.clusters.items(), strict=True):
            drawn.imshow(labels, **PARTS)
            values = one.measured[condition]
            told = f"AMI {values['AMI image']:.2f}, contrast {values['contrast image']:.2f}"
            drawn.set_title(f"{condition}\n{told}", fontsize=7)
    bare(axes.flat)
    return save(figure, path, settings=settings)
