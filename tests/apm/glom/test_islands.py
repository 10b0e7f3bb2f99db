"""Islands of GLOM's levels and the tree they form."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apm.errors import UsageError
from apm.glom.islands import Island, island_labels, parse_tree
from apm.student.islands import regions

AXES = np.eye(4)


def columns(*drawings: tuple[str, ...]) -> np.ndarray:
    """Levels from the lowest up, each drawn with a digit a place: places of one digit have one direction."""
    return np.stack([AXES[[[int(one) for one in line] for line in drawing]] for drawing in drawings], axis=2)


# a face at the left, with eyes above a mouth, beside the ground; "2" at the lower level crosses the whole's border
FACE = columns(("0102", "0102", "2222"), ("1110", "1110", "1110"))


def test_parts_lie_inside_their_wholes() -> None:
    labels = island_labels(FACE, 0.9)
    assert labels.tolist() == [
        [[0, 1, 2, 3], [0, 1, 2, 3], [4, 4, 4, 3]],
        [[0, 0, 0, 1]] * 3,
    ]
    face, ground = parse_tree(labels)
    assert (face.level, len(face.places), len(face.parts)) == (1, 9, 4)
    assert [part.places for part in face.parts] == [
        ((0, 0), (1, 0)),
        ((0, 1), (1, 1)),
        ((0, 2), (1, 2)),
        ((2, 0), (2, 1), (2, 2)),
    ]
    column = ((0, 3), (1, 3), (2, 3))
    assert ground == Island(level=1, places=column, parts=(Island(level=0, places=column, parts=()),))


def test_it_is_plain_json() -> None:
    _, ground = parse_tree(island_labels(FACE, 0.9))
    places = [[0, 3], [1, 3], [2, 3]]
    assert json.loads(json.dumps(ground.as_json())) == {
        "level": 1,
        "places": places,
        "parts": [{"level": 0, "places": places, "parts": []}],
    }


def test_the_threshold_decides_how_alike_neighbours_are() -> None:
    angles = np.radians([0, 10, 40, 45])  # cosines of neighbours: 0.985, 0.866, 0.996
    row = np.stack([np.cos(angles), np.sin(angles)], axis=-1)[None, :, None]
    found = {threshold: island_labels(3 * row, threshold)[0, 0].tolist() for threshold in (-1, 0.8, 0.9, 0.99, 1)}
    assert found == {-1: [0, 0, 0, 0], 0.8: [0, 0, 0, 0], 0.9: [0, 0, 1, 1], 0.99: [0, 1, 2, 2], 1: [0, 1, 2, 3]}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(-1, 1))
def test_every_level_is_a_partition_and_refines_the_one_above(seed: int, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    levels = rng.standard_normal((3, 4, 3, 2))
    labels = island_labels(levels, threshold)
    top = regions(levels[:, :, 2], threshold)
    pairs = set(zip(labels[2].ravel().tolist(), top.ravel().tolist(), strict=True))
    assert len(pairs) == len(np.unique(top)) == len(np.unique(labels[2]))  # the same partition, numbered anew
    for level in (0, 1):
        for number in np.unique(labels[level]):
            assert len(np.unique(labels[level + 1][labels[level] == number])) == 1

    def check(island: Island) -> None:
        if island.level:
            assert sorted(place for part in island.parts for place in part.places) == list(island.places)
        for part in island.parts:
            assert part.level == island.level - 1
            check(part)

    tree = parse_tree(labels)
    assert sorted(place for island in tree for place in island.places) == [(r, c) for r in range(3) for c in range(4)]
    for island in tree:
        check(island)


def test_what_cannot_be_read_is_told() -> None:
    with pytest.raises(UsageError, match=r"shape \(H, W, L, D\), not \(3, 4, 2\)"):
        island_labels(np.ones((3, 4, 2)), 0.9)
    with pytest.raises(UsageError, match=r"from -1 to 1, not 1\.5"):
        island_labels(FACE, 1.5)
    with pytest.raises(UsageError, match="not finite"):
        island_labels(np.full((1, 2, 1, 1), np.nan), 0.5)
