"""Pictures of GLOM's columns: what they show, and the files of `apm glom show`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from apm.figures.glom import _laid_out, level_colours, watch, write_show
from apm.glom.config import GLOMConfig
from apm.glom.islands import island_labels, parse_tree
from apm.glom.model import GLOM
from apm.images.load import student_input
from tests.apm.glom.test_islands import FACE
from tests.pretraining import picture

SIZES = GLOMConfig(image_size=16, patch_size=4, dim=6, levels=3, expansion=1)


def test_what_is_watched_are_the_models_states_at_their_places() -> None:
    model, image = GLOM(SIZES, seed=1), picture(3)
    states = watch(model, image, 4)
    assert states.shape == (5, 4, 4, 3, 6)
    with torch.no_grad():
        last = model(student_input(image, 16)[None], steps=4)[0]
    np.testing.assert_array_equal(states[-1].reshape(16, 3, 6), last.numpy())
    assert watch(model, image).shape[0] == 7


def test_places_that_are_equal_have_one_colour_and_others_do_not() -> None:
    # the second step moves all places alike: the colours, which show how places differ, stay
    states = np.stack([np.zeros_like(FACE), FACE, FACE + 5.0]).astype(np.float32)
    colours = level_colours(states)
    assert colours.shape == (3, 2, 3, 4, 3) and colours.min() >= 0 and colours.max() <= 1
    np.testing.assert_allclose(colours[1], colours[2], atol=1e-5)
    top = colours[2, 1]
    np.testing.assert_allclose(top[:, :3], np.broadcast_to(top[0, 0], (3, 3, 3)), atol=1e-5)
    assert np.abs(top[0, 0] - top[0, 3]).max() > 0.5
    assert np.abs(colours[0] - colours[0][:, :1, :1]).max() < 1e-6  # nothing differs before the first step


def test_wholes_stand_above_the_middle_of_their_parts() -> None:
    placed = {
        (island.level, island.places[0]): (x, ends)
        for island, x, ends in _laid_out(parse_tree(island_labels(FACE, 0.9)))
    }
    assert [placed[0, at][0] for at in ((0, 0), (0, 1), (0, 2), (2, 0), (0, 3))] == [0, 1, 2, 3, 4]
    assert placed[1, (0, 0)] == (1.5, [0, 1, 2, 3]) and placed[1, (0, 3)] == (4, [4])


def test_the_files_hold_the_islands_of_the_last_step(tmp_path: Path) -> None:
    model, image = GLOM(SIZES, seed=1), picture(3)
    files = write_show(model, image, tmp_path / "new" / "x", steps=3, threshold=0.99, settings={"trained": "0 steps"})
    assert [file.name for file in files] == ["x-levels.png", "x-tree.png", "x-levels.gif", "x-tree.json", "x.npz"]
    labels = island_labels(watch(model, image, 3)[-1], 0.99)
    assert labels.max() + 1 > 1  # there is something to tell apart
    record = json.loads(files[3].read_text())
    assert record["settings"] == {"trained": "0 steps", "steps": 3, "threshold": 0.99}
    assert record["grid"] == [4, 4] and record["islands"] == [int(level.max()) + 1 for level in labels]
    assert record["tree"] == [island.as_json() for island in parse_tree(labels)]
    with np.load(files[4]) as arrays:
        np.testing.assert_array_equal(arrays["islands"], labels)
        assert arrays["embeddings"].shape == (4, 4, 4, 3, 6)
    with Image.open(files[2]) as film:
        assert getattr(film, "n_frames", 1) >= 3 and film.size == (4 * 164 - 4, 160)
    for file in files[:2]:
        with Image.open(file) as drawn:
            assert min(drawn.size) > 300 and np.asarray(drawn.convert("L")).std() > 10


@pytest.mark.parametrize("config", [GLOMConfig(image_size=4, patch_size=4, dim=2, levels=1)])
def test_one_place_and_one_level_are_drawn_too(tmp_path: Path, config: GLOMConfig) -> None:
    files = write_show(GLOM(config), picture(1), tmp_path / "x", steps=1, threshold=0.9, settings={})
    assert json.loads(files[3].read_text())["tree"] == [{"level": 0, "places": [[0, 0]], "parts": []}]
