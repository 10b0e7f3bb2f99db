"""Pictures of segmentations: the map's palette, and what is laid over the photograph."""

from __future__ import annotations

import numpy as np
from PIL import Image

from apm.figures.segments import colour_of, map_image, overlay_image
from apm.segmentation import Segmentation, parts_of


def test_the_palette_and_the_overlay_have_the_colours_of_the_map() -> None:
    found = np.zeros((80, 160), dtype=np.int32)
    found[40:, :100], found[60:, 100:] = 1, 2
    labels = ("cat", "dog")
    segmentation = Segmentation(
        labels=labels, map=found, parts=parts_of(found, labels), background=0.5, tiles=2, places=(1, 1)
    )
    pixels = np.random.default_rng(0).integers(0, 256, (80, 160, 3), dtype=np.uint8)
    drawn = map_image(segmentation)
    np.testing.assert_array_equal(np.asarray(drawn), found)
    colours = np.array([colour_of(value) for value in range(3)])
    np.testing.assert_array_equal(np.asarray(drawn.convert("RGB")), colours[found])
    laid = np.asarray(overlay_image(Image.fromarray(pixels), segmentation))[:, 80:].astype(float)  # right of the words
    seen, here = pixels[:, 80:], found[:, 80:]
    np.testing.assert_array_equal(laid[here == 0], seen[here == 0])
    np.testing.assert_allclose(laid[here > 0], (seen[here > 0] + colours[here][here > 0].astype(float)) / 2, atol=1.01)


def test_neighbouring_labels_have_colours_that_can_be_told_apart() -> None:
    colours = np.array([colour_of(value) for value in range(13)])
    apart = np.linalg.norm(colours[:, None] - colours, axis=-1) + 1e3 * np.eye(13)
    assert (colours[0] == 0).all() and apart.min() > 40
