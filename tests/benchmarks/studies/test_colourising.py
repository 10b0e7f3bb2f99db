"""Colours of grey photographs, measured: errors of known colours, baselines, held-out images, pictures."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage.color import deltaE_cie76, rgb2lab

from apm.benchmarks.studies import colourising
from apm.benchmarks.studies.colourising import NAMES, Baselines, at_places, compare, reduced, summary
from apm.benchmarks.studies.study import RESULTS
from apm.errors import UsageError
from apm.pretrain.cache import build_cache
from apm.pretrain.images import open_images
from apm.pretrain.trainer import Pretrainer
from tests.pretraining import STUDENT, TRAINING, make_folder, picture

GREY = replace(TRAINING, grey_input=True, steps=2)


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint, and the images that it was trained on."""
    folder, path = make_folder(tmp_path / "images"), tmp_path / "c.safetensors"
    source = open_images(folder)
    cache = build_cache(source, None, tmp_path / "cache", size=STUDENT.image_size)
    data = {"data": source.fingerprint, "teacher": None, "grid_size": None}
    Pretrainer(path, cache, STUDENT, GREY, data=data, precision="fp32").run()
    return path, folder


def test_errors_of_colours_that_are_known() -> None:
    image = picture(3, side=32)
    own = rgb2lab(np.asarray(image))
    exact = own[..., 1:].astype(np.float32)  # a place for every pixel
    grey = image.convert("L").convert("RGB")
    found = compare(image, {"exact": exact, "grey": np.zeros_like(exact)})
    assert found.delta_e["exact"] < 0.5 and found.squared["exact"] < 0.5
    chroma = np.linalg.norm(own[..., 1:], axis=-1)
    assert found.delta_e["grey"] == pytest.approx(chroma.mean(), rel=0.02)
    assert found.squared["grey"] == pytest.approx(np.square(chroma).mean(), rel=0.02)
    assert found.chroma["own"] == pytest.approx(chroma.mean(), rel=1e-3) and found.chroma["grey"] < 0.5
    assert deltaE_cie76(own, rgb2lab(np.asarray(grey))).mean() >= found.delta_e["grey"] - 0.1


def test_baselines_are_means_and_the_line_through_them() -> None:
    rng = np.random.default_rng(0)
    light = rng.uniform(20, 80, (400, 2, 2))
    mixed = light.reshape(400, 4) @ rng.normal(0, 0.3, (4, 8)) + rng.normal(0, 5, 8)
    train = np.concatenate((light[..., None], mixed.reshape(400, 2, 2, 2)), axis=-1).astype(np.float32)
    baselines = Baselines(train)
    image = Image.fromarray(rng.integers(60, 200, (2, 2), dtype=np.uint8)).convert("RGB").resize((40, 30), 0)
    found = baselines(image)
    np.testing.assert_allclose(found["place"], train[..., 1:].mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["constant"][1, 0], train[..., 1:].mean((0, 1, 2)), rtol=1e-3, atol=1e-3)
    seen = at_places(image, 2)[..., 0]
    exact = np.linalg.lstsq(np.c_[light.reshape(400, 4), np.ones(400)], mixed, rcond=None)[0]
    np.testing.assert_allclose(found["linear"].ravel(), np.r_[seen.ravel(), 1] @ exact, rtol=1e-2, atol=0.1)
    assert not found["grey"].any() and set(found) == set(colourising.BASELINES)


def test_places_are_means_over_equal_cells() -> None:
    image = picture(5, side=24).resize((24, 24))
    wanted = rgb2lab(np.asarray(image)).reshape(3, 8, 3, 8, 3).mean((1, 3))
    np.testing.assert_allclose(at_places(image, 3), wanted, atol=0.01)
    assert reduced(image, 12).size == (12, 12) and reduced(image, 99).size == (24, 24) == image.size


def test_summary_is_paired_with_the_student() -> None:
    same = dict.fromkeys(NAMES, 4.0)
    chroma = {"own": 3.0, "student": 1.0}
    rows = [
        colourising.Errors(dict.fromkeys(NAMES, level) | {"student": level - 1}, same, chroma)
        for level in (3.0, 5.0, 10.0)
    ]
    found = summary("set", rows)
    assert found["above_student"]["grey"] == [1.0, 0.0] and found["delta_e"]["grey"][0] == 6
    assert found["delta_e"]["grey"][1] == pytest.approx(np.std([3, 5, 10], ddof=1) / 3**0.5)
    assert found["rms"]["linear"] == 2 and found["explained"]["place"] == 0


def test_it_measures_held_out_images_and_other_sets(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = trained
    other = make_folder(tmp_path / "others" / "birds", 5)
    out = tmp_path / "r.json"
    arguments = [str(path), "--root", str(folder), "--other", str(other), "--limit", "4", "--record", str(out)]
    colourising.main(arguments)
    record = json.loads(out.read_text())
    sets = {one["name"]: one for one in record["sets"]}
    assert {name: one["images"] for name, one in sets.items()} == {"held out": 3, "birds": 4, "these others": 4}
    assert record["train_images"] == record["fitted_images"] == 9 and record["checkpoint"]["settings"]["grey_input"]
    assert sets["birds"]["delta_e"] == sets["these others"]["delta_e"]
    for one in sets.values():
        assert set(one["delta_e"]) == set(NAMES) and one["explained"]["grey"] == 0
    _, held_out = GREY.split(12)
    names = sorted(item.relative_to(folder).as_posix() for item in folder.rglob("*.png"))
    images = [Image.open(folder / names[number]).convert("RGB") for number in held_out]
    grey = [np.linalg.norm(rgb2lab(np.asarray(image))[..., 1:], axis=-1).mean() for image in images]
    assert sets["held out"]["delta_e"]["grey"][0] == pytest.approx(np.mean(grey), rel=0.05)
    text = colourising.table(record)
    assert text in capsys.readouterr().out and "| birds | 4 |" in text and "9 training images" in text


def test_what_cannot_be_measured_is_told(trained: tuple[Path, Path], tmp_path: Path) -> None:
    path, _ = trained
    with pytest.raises(UsageError, match="checkpoint and --root"):
        colourising.main([str(path)])
    with pytest.raises(UsageError, match="does not hold the images that the student was trained on"):
        colourising.main([str(path), "--root", str(make_folder(tmp_path / "more", 5))])
    with pytest.raises(UsageError, match="--pictures needs a checkpoint and --images"):
        colourising.main([str(path), "--pictures", str(tmp_path / "p.png")])


def test_the_student_of_the_repository_is_the_one_that_was_measured() -> None:
    content = (RESULTS / "colour-student.safetensors").read_bytes()
    record = json.loads((RESULTS / colourising.STUDY.results).read_text())
    assert hashlib.sha256(content).hexdigest()[:16] == record["file"]


def test_pictures_are_drawn(trained: tuple[Path, Path], tmp_path: Path) -> None:
    path, folder = trained
    files = [str(file) for file in sorted(folder.rglob("*.png"))[:2]]
    colourising.main([str(path), "--pictures", str(tmp_path / "p.png"), "--images", *files])
    with Image.open(tmp_path / "p.png") as drawn:
        assert np.asarray(drawn.convert("RGB")).std() > 5
