"""The files of one segmented image: label map, the photograph with its labels laid over it, shares and boxes."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from apm.images.files import write_atomically
from apm.segmentation import BACKGROUND, Segmentation

MOST_COLOURS = 256
"""Of a palette; a map with more values is written as 16-bit grey."""
COVER = 0.5
"""How much of an overlay is the label's colour."""


def colour_of(value: int) -> tuple[int, int, int]:
    """The colour of a value of a map: black for the background, else hues ever far from those before."""
    if value == BACKGROUND:
        return (0, 0, 0)
    red, green, blue = colorsys.hsv_to_rgb((0.02 + 0.618034 * (value - 1)) % 1, 0.85 - 0.3 * (value // 8 % 2), 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def map_image(found: Segmentation) -> Image.Image:
    """The map as an image of its own size: a palette image whose numbers are the map's values, or 16-bit grey."""
    if len(found.labels) >= MOST_COLOURS:
        return Image.fromarray(found.map.astype(np.uint16))
    image = Image.fromarray(found.map.astype(np.uint8), mode="P")
    image.putpalette([channel for value in range(len(found.labels) + 1) for channel in colour_of(value)])
    return image


def overlay_image(image: Image.Image, found: Segmentation) -> Image.Image:
    """The photograph with the colours of its labels laid over it; where there is none it stays as it is."""
    colours = np.array([colour_of(value) for value in range(len(found.labels) + 1)], dtype=np.uint8)
    painted = Image.fromarray(colours[found.map])
    mask = Image.fromarray(np.where(found.map == BACKGROUND, 0, round(255 * COVER)).astype(np.uint8))
    laid = Image.composite(painted, image, mask)
    drawing = ImageDraw.Draw(laid)
    size = max(10, min(laid.size) // 25)
    for row, part in enumerate(found.parts[: max(1, laid.height // (size + 4) - 1)]):
        top = 4 + row * (size + 4)
        drawing.rectangle((4, top, 4 + size, top + size), fill=colour_of(part.value), outline="white")
        text = f"{part.label} {part.share:.0%}"
        drawing.text((8 + size, top), text, fill="white", font_size=size, stroke_width=2, stroke_fill="black")
    return laid


def write_segmentation(image: Image.Image, found: Segmentation, stem: Path) -> dict[str, Path]:
    """Write ``STEM.map.png`` and ``STEM.overlay.png``."""
    pictures = {"map": map_image(found), "overlay": overlay_image(image, found)}
    return {
        name: write_atomically(Path(f"{stem}.{name}.png"), partial(picture.save, format="PNG"))
        for name, picture in pictures.items()
    }


def segmentation_record(found: Segmentation) -> dict[str, Any]:
    """What is where, as plain JSON values: see ``cli/schemas/segment.json``."""
    height, width = found.map.shape
    parts: list[Mapping[str, Any]] = [
        {
            "label": part.label,
            "value": part.value,
            "share": part.share,
            "regions": [{"box": list(region.box), "share": region.share} for region in part.regions],
        }
        for part in found.parts
    ]
    return {
        "size": [width, height],
        "parts": parts,
        "background": found.background,
        "tiles": found.tiles,
        "places": list(found.places),
        "notes": list(found.notes),
    }
