"""One image in the layers of a fixed model: which conditions there are, and that the measures are of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from apm.errors import UsageError
from apm.student import islands
from apm.teachers import load_layers
from apm.teachers.layers import LayerSource
from apm.test_time.layer_fields import observe_layers, pooled


@pytest.fixture(scope="module")
def source() -> LayerSource:
    return load_layers("vit:test_resnet:1,2@random", size=64)


@pytest.fixture(scope="module")
def images() -> tuple[Image.Image, Image.Image]:
    """A blue quarter on red, and halves."""
    first, second = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (80, 64), "white")
    first.paste("blue", (32, 0, 64, 32))
    second.paste("black", (0, 32, 80, 64))
    return first, second


def test_conditions_are_what_they_are_called(source: LayerSource, images: tuple[Image.Image, Image.Image]) -> None:
    first, second = images
    untrained = source.at_random(5)
    found = observe_layers(first, second, source, untrained, parts=4, seed=1)
    assert [(one.layer, one.places) for one in found] == [("1", 16), ("2", 8)]
    for one in found:
        wanted = {
            "image": source.encode(first)[one.layer],
            "random weights": untrained.encode(first)[one.layer],
            "shuffled image": source.encode(islands.shuffle_patches(first, 8, 1))[one.layer],
            "other image": source.encode(second.crop((8, 0, 72, 64)))[one.layer],
        }
        assert list(one.fields) == [*wanted, "colours", "coordinates"] == list(one.measured) == list(one.clusters)
        assert all(torch.equal(torch.from_numpy(one.fields[name]), values) for name, values in wanted.items())
        own = islands.superpixels(first, one.places, 4)
        np.testing.assert_array_equal(one.superpixels, own)
        for name, field in one.fields.items():
            assert one.measured[name]["AMI image"] == islands.agreement(islands.clusters(field, 4, seed=1), own)
            assert one.measured[name]["contrast image"] == islands.boundary_contrast(field, own)
    coarse = found[1]
    assert coarse.fields["colours"][0, 0].tolist() == [255, 0, 0] and coarse.fields["coordinates"][2, 5].tolist() == [
        2,
        5,
    ]
    assert coarse.title == "layer 2 (layer2), 8 × 8" or coarse.title == "layer2, 8 × 8"


def test_controls_are_left_out_where_they_are_not_wanted(
    source: LayerSource, images: tuple[Image.Image, Image.Image]
) -> None:
    assert list(observe_layers(*images, source, None, parts=4, controls=False)[0].fields) == ["image"]
    assert "random weights" not in observe_layers(*images, source, None, parts=4)[0].fields


def test_too_few_places_are_told(source: LayerSource, images: tuple[Image.Image, Image.Image]) -> None:
    with pytest.raises(UsageError, match=r"Layer 2 of .* has 8 × 8 locations, too few for 40 parts"):
        observe_layers(*images, source, None, parts=40, controls=False)


def test_blocks_of_places_are_taken_together() -> None:
    field = np.arange(7 * 7 * 2, dtype=np.float32).reshape(7, 7, 2)
    coarse = pooled(field, 3)  # blocks of 3 × 3, the seventh row and column left out
    assert coarse.shape == (2, 2, 2)
    np.testing.assert_allclose(coarse[1, 0], field[3:6, 0:3].mean(axis=(0, 1)))
    assert pooled(field, 7) is not field and np.array_equal(pooled(field, 7), field)
