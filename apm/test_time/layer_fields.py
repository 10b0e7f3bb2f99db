"""One image's fields in the layers of a fixed model, and what their islands follow: nothing is trained.

Beside the layers stand controls of the same shape: the same network with weights at random, the image's patches in
another order, another image, and what needs no network at all, the mean colours of the places and their coordinates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from apm.errors import UsageError
from apm.student import islands
from apm.teachers.layers import LayerSource
from apm.test_time.island_fields import PATCHES, Field, Subject, coordinates, measures, square_of

LEAST = 2
"""Minimum mean number of locations per part."""


@dataclass(frozen=True)
class LayerSeen:
    """One layer's field of an image, beside the controls'."""

    layer: str
    """The layer as it was asked for."""
    module: str
    fields: dict[str, Field]
    """By condition, (h, h, D): "image" first; colours and coordinates have a D of their own."""
    superpixels: islands.Labels
    """Superpixels of the image, at the layer's locations."""
    measured: dict[str, dict[str, float]]
    """By condition: see `apm.test_time.island_fields.measures`."""
    clusters: dict[str, islands.Labels]
    """By condition: k-means of the features."""

    @property
    def field(self) -> Field:
        """The image's own field."""
        return self.fields["image"]

    @property
    def places(self) -> int:
        """Side, in locations."""
        return len(self.field)

    @property
    def title(self) -> str:
        """The layer in a few words."""
        module = self.module.removeprefix("trunk.")
        named = module if self.layer in module else f"layer {self.layer} ({module})"
        return f"{named}, {self.places} × {self.places}"


def fields_of(
    image: Image.Image,
    other: Image.Image,
    source: LayerSource,
    untrained: LayerSource | None,
    *,
    seed: int = 0,
    controls: bool = True,
) -> dict[str, dict[str, Field]]:
    """Compute the fields of every layer under every condition: layer → condition → (h, h, D).

    Args:
        image: the image looked at; its central square counts.
        other: another one, for a control.
        source: the layers.
        untrained: the same layers with random weights; None if those of `source` are random already.
        seed: of the order of the patches.
        controls: whether these are computed.
    """
    square = square_of(image)
    seen = {"image": source.encode(square)}
    if controls:
        if untrained is not None:
            seen["random weights"] = untrained.encode(square)
        seen["shuffled image"] = source.encode(islands.shuffle_patches(square, PATCHES, seed))
        seen["other image"] = source.encode(square_of(other))
    found = {layer: {name: of[layer].numpy() for name, of in seen.items()} for layer in source.modules}
    if controls:
        for fields in found.values():
            side = len(fields["image"])
            fields["colours"] = np.asarray(square.resize((side, side), Image.Resampling.BOX), dtype=np.float32)
            fields["coordinates"] = coordinates(side)
    return found


def observe_layers(
    image: Image.Image,
    other: Image.Image,
    source: LayerSource,
    untrained: LayerSource | None,
    *,
    threshold: float = 0.9,
    parts: int = 12,
    seed: int = 0,
    controls: bool = True,
) -> list[LayerSeen]:
    """Compute and measure one image's layers: see `fields_of`; `threshold` and `parts` as in `IslandOptions`.

    Raises:
        UsageError: a layer has too few places for so many parts.
    """
    found = fields_of(image, other, source, untrained, seed=seed, controls=controls)
    return [
        _measured(layer, source, fields, (square_of(image), square_of(other)), threshold, parts, seed)
        for layer, fields in found.items()
    ]


def _measured(
    layer: str,
    source: LayerSource,
    fields: Mapping[str, Field],
    squares: tuple[Image.Image, Image.Image],
    threshold: float,
    parts: int,
    seed: int,
) -> LayerSeen:
    side = len(fields["image"])
    if side * side < LEAST * parts:
        raise UsageError(
            f"Layer {layer} of {source.name} has {side} × {side} locations, too few for {parts} parts: choose an "
            "earlier layer, a larger --grid-size or fewer --parts."
        )
    own, others = (islands.superpixels(square, side, parts) for square in squares)
    subject = Subject(inputs={}, superpixels=own, other_superpixels=others)
    clusters = {name: islands.clusters(field, parts, seed=seed) for name, field in fields.items()}
    return LayerSeen(
        layer=layer,
        module=source.modules[layer],
        fields=dict(fields),
        superpixels=own,
        measured={
            name: measures(field, subject, threshold=threshold, parts=parts, found=clusters[name])
            for name, field in fields.items()
        },
        clusters=clusters,
    )


def pooled(field: NDArray[np.floating], side: int) -> Field:
    """Mean over blocks of locations, leaving at most `side` per side: (h, h, D) → (h', h', D).

    Places at the right and below that fill no block are left out.
    """
    step = -(-len(field) // side)
    count = len(field) // step
    blocks = field[: count * step, : count * step].reshape(count, step, count, step, -1)
    return blocks.mean(axis=(1, 3)).astype(np.float32)
