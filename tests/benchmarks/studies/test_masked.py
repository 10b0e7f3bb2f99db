"""Photographs with masks: reading, objects pasted along their outlines, and scores against hand-made counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from apm.benchmarks.studies import masked
from apm.benchmarks.studies.masked import Masked, by_category, counts, mean_iou, pixel_accuracy, tallied
from apm.errors import UsageError


def photograph(name: str, truth: np.ndarray) -> Masked:
    """Whose colour is its category."""
    pixels = np.repeat((40 * truth[..., None]).clip(0, 255), 3, axis=2).astype(np.uint8)
    return Masked(name, Image.fromarray(pixels), truth.astype(np.int32))


def write(root: Path, *photographs: Masked) -> None:
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for one in photographs:
        one.image.save(root / "images" / f"{one.name}.jpg", quality=95)
        Image.fromarray(one.truth.astype(np.uint8)).save(root / "masks" / f"{one.name}.png")
    (root / "categories.tsv").write_text("0\tunlabeled\n1\tred-thing\n2\twall-brick\n187\tsky-other-merged\n")


def test_names_are_words() -> None:
    names = ("sky-other-merged", "door-stuff", "wall-brick", "floor-wood", "window-blind", "tree-merged", "hot dog")
    found = [masked.words(name) for name in names]
    assert found == ["sky", "door", "brick wall", "wood floor", "window blind", "tree", "hot dog"]


def test_photographs_are_read_with_their_masks_in_parts(tmp_path: Path) -> None:
    truth = np.ones((4, 6), dtype=int)
    write(tmp_path, *(photograph(name, truth) for name in "abc"))
    (tmp_path / "masks" / "b.png").unlink()
    assert masked.read_categories(tmp_path) == {1: "red thing", 2: "brick wall", 187: "sky"}
    assert [one.name for one in masked.read_masked(tmp_path, 9)] == ["a", "c"]
    parts = [masked.read_masked(tmp_path, 9, part)[0] for part in ("tuning", "report")]
    assert [one.name for one in parts] == ["a", "c"] and (parts[0].truth == 1).all()
    Image.new("L", (3, 3)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(UsageError, match=r"a\.png is \(3, 3\), its photograph \(6, 4\)"):
        masked.read_masked(tmp_path, 9)
    with pytest.raises(UsageError, match="holds no photographs"):
        masked.read_masked(tmp_path / "none", 9)
    with pytest.raises(UsageError, match=r"categories\.tsv cannot be read"):
        masked.read_categories(tmp_path / "none")


def test_objects_are_pasted_along_their_own_outlines() -> None:
    truth = np.full((60, 80), 2)
    y, x = np.mgrid[0:60, 0:80]
    disc = (y - 30) ** 2 + (x - 30) ** 2 < 15**2
    truth[disc] = 5
    truth[0:3, 0:3] = 5  # too small to be an object
    truth[:, 70:] = 120  # stuff
    source, ground = photograph("source", truth), photograph("ground", np.full((50, 40), 3))
    ((category, outline),) = masked.objects_of(source)  # what surrounds the disc is nearly all of the photograph
    assert category == 5 and (outline == disc).all()
    (one,) = masked.composites([source, ground], 20, seed=0)
    assert (one.pasted, one.name) == (5, "source-5-on-ground")  # never on a photograph of its own category
    there = one.truth == 5
    assert set(np.unique(one.truth)) == {3, 5} and one.image.size == (40, 50)
    pixels = np.asarray(one.image)[..., 0]
    assert (abs(pixels[there].astype(int) - 200) < 90).all() and (pixels[~there] == 120).all()
    rows, cols = np.flatnonzero(there.any(1)), np.flatnonzero(there.any(0))
    side = max(rows[-1] - rows[0], cols[-1] - cols[0]) + 1
    assert 0.4 * 40 - 1 <= side <= 0.7 * 40 + 1
    assert there.sum() == pytest.approx(np.pi / 4 * side**2, rel=0.1)  # a disc, not its box
    (again,) = masked.composites([source, ground], 1, seed=0)
    assert (again.truth == one.truth).all() and again.image == one.image


def test_counts_leave_out_what_is_unlabelled() -> None:
    truth = np.array([[1, 1, 2, 0]], dtype=np.int32)
    found = np.array([[1, 2, 2, 1]], dtype=np.int32)
    assert counts(found, truth) == {"1": [1, 1, 2], "2": [1, 2, 1]}
    tally = tallied([counts(found, truth), {"3": [0, 4, 0]}])
    assert tally.shape == (2, 3, 3)
    together = tally.sum(axis=0)
    assert mean_iou(together) == pytest.approx((1 / 2 + 1 / 2) / 2)  # 3 is said and nowhere: no category to be found
    assert pixel_accuracy(together) == pytest.approx(2 / 3)
    assert by_category([counts(found, truth), {"3": [0, 4, 0]}]) == {
        "1": {"iou": 0.5, "images": 1},
        "2": {"iou": 0.5, "images": 1},
    }


def test_intervals_are_of_resampled_photographs() -> None:
    weights = masked.resampled(50, seed=1)
    assert weights.shape == (masked.RESAMPLES + 1, 50) and (weights.sum(axis=1) == 50).all() and (weights[0] == 1).all()
    values = np.random.default_rng(0).normal(size=50)
    found = masked.with_interval(weights @ values / 50)
    assert found["value"] == pytest.approx(values.mean())
    error = 1.96 * values.std() / 50**0.5
    assert found["high"] - found["value"] == pytest.approx(error, rel=0.15)
    assert found["value"] - found["low"] == pytest.approx(error, rel=0.15)
