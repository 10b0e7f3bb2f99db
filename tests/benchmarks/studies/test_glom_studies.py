"""Studies of a trained GLOM: hidden places and what fills them, parts switched off, islands against masks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from apm.benchmarks.studies import (
    glom_curves,
    glom_islands,
    glom_parts,
    glom_reconstruction,
    glom_student,
    partitions,
    scenes,
)
from apm.benchmarks.studies.autoencoder import (
    Autoencoder,
    AutoencoderSizes,
    AutoencoderTrainer,
    filling_errors,
    parameters,
    shapes,
    train_until,
    width_of_size,
)
from apm.benchmarks.studies.glom_images import Holes, held_out, read_trained, switched
from apm.benchmarks.studies.scenes import Scene
from apm.errors import UsageError
from apm.glom.config import GLOMConfig, GLOMTraining
from apm.glom.training import GLOMTrainer
from apm.pretrain.cache import build_cache
from apm.pretrain.images import open_images
from apm.student import islands
from tests.fakes import FakeTeacher
from tests.pretraining import make_folder, picture

SIZES = GLOMConfig(image_size=16, patch_size=4, dim=6, levels=2, expansion=1)
TRAINING = GLOMTraining(steps=4, batch_size=4, lr=1e-2, warmup=2, held_out=0.25, contrast_columns=12, seed=3)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("glom") / "images")


@pytest.fixture(scope="module")
def checkpoint(images: Path) -> Path:
    """A GLOM of three steps, one before the last."""
    source, path = open_images(images), images.parent / "glom.safetensors"
    cache = build_cache(source, None, images.parent / "glom.safetensors.cache", size=16)
    trainer = GLOMTrainer(path, cache, SIZES, TRAINING, data={"data": source.fingerprint}, precision="fp32")
    train_until(trainer, 3)
    return path


def options(checkpoint: Path, root: Path, **others: Any) -> SimpleNamespace:
    return SimpleNamespace(checkpoint=checkpoint, root=root, cache=None, limit=None, command="here", **others)


# --- the autoencoder --------------------------------------------------------------------------------------------------


def test_an_autoencoder_has_the_width_that_comes_nearest_to_a_size() -> None:
    assert shapes(AutoencoderSizes(width=2)) == {
        name: tuple(value.shape) for name, value in Autoencoder(AutoencoderSizes(width=2)).named_parameters()
    }
    counts = {width: parameters(shapes(AutoencoderSizes(width=width))) for width in (18, 19, 20)}
    assert width_of_size(counts[19]) == 19 and width_of_size(counts[20] - 1) == 20
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = Autoencoder(AutoencoderSizes(width=2))
    assert model(images).shape == images.shape
    other = images.clone()
    other[:, :, 0, 0] += 1
    assert (model(images) - model(other))[:, :, 12:, 12:].abs().max() > 0  # a corner is seen from afar
    with pytest.raises(UsageError, match="halves images three times"):
        AutoencoderSizes(image_size=12)


def test_errors_of_fillings_are_of_hidden_pixels_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    images, filled = torch.randn(2, 2, 3, 8, 8, generator=generator)
    hidden = torch.tensor([[True, False, False, True], [False, True, False, False]])
    errors = filling_errors(filled, images, hidden, 4)
    squares = (filled - images).square().numpy()
    assert errors[0] == pytest.approx((squares[0, :, :4, :4].mean() + squares[0, :, 4:, 4:].mean()) / 2, rel=1e-5)
    assert errors[1] == pytest.approx(squares[1, :, :4, 4:].mean(), rel=1e-5)


def test_an_autoencoder_goes_on_where_it_was(images: Path, checkpoint: Path, tmp_path: Path) -> None:
    cache = read_trained(options(checkpoint, images)).images(options(checkpoint, images))

    def trainer(name: str) -> AutoencoderTrainer:
        sizes = AutoencoderSizes(width=2, image_size=16)
        return AutoencoderTrainer(tmp_path / name, cache, sizes, TRAINING, data={}, precision="fp32")

    whole, first = trainer("a.safetensors"), trainer("b.safetensors")
    before = whole.held_out_losses()
    train_until(whole, 4)
    train_until(first, 2)
    second = trainer("b.safetensors")
    assert second.step == 2
    train_until(second, 4)
    train_until(second, 1)  # it is past that
    assert second.step == 4 and whole.held_out_losses() == second.held_out_losses() != before
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


# --- hidden places ----------------------------------------------------------------------------------------------------


def test_simple_fillings_are_made_of_what_is_seen() -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(1, 3, 12, 12, generator=generator)
    hidden = torch.tensor([[True, False, True, False, True, False, False, False, True]])
    found = glom_reconstruction.simple_fillings(Holes(images, hidden), 4)
    colours = {n: images[0, :, 4 * (n // 3) :, 4 * (n % 3) :][:, :4, :4].mean((1, 2)) for n in range(9)}
    seen = [1, 3, 5, 6, 7]
    torch.testing.assert_close(found["mean"][0, :, 0, 0], torch.stack([colours[n] for n in seen]).mean(0))
    weights = [1 / ((n // 3) ** 2 + (n % 3) ** 2) for n in seen]  # of the first place, at (0, 0)
    wanted = sum(weight * colours[n] for weight, n in zip(weights, seen, strict=True)) / sum(weights)
    torch.testing.assert_close(found["near"][0, :, 3, 2], wanted)
    assert not found["grey"].any()


def test_fillings_are_compared_on_the_same_hidden_places(images: Path, checkpoint: Path) -> None:
    chosen = options(checkpoint, images, autoencoder=None)
    record = glom_reconstruction.measure(chosen)  # type: ignore[arg-type]
    assert record["images"] == 3 and record["autoencoder"]["step"] == record["glom"]["training"]["step"] == 3
    assert (checkpoint.with_suffix(".autoencoder.safetensors")).is_file()
    trained = read_trained(chosen)  # type: ignore[arg-type]
    (holes,) = held_out(trained, trained.images(chosen), None)  # type: ignore[arg-type]
    patches = trained.model.patches(holes.images)
    grey = (patches.square().mean(-1) * holes.hidden).sum(1) / holes.hidden.sum(1)
    assert record["errors"]["grey"][0] == pytest.approx(grey.mean().item(), rel=1e-5)
    levels = trained.model(trained.model.images(patches.masked_fill(holes.hidden[..., None], 0)), steps=4)
    own = ((trained.model.pixels(levels[:, :, 0]) - patches).square().mean(-1) * holes.hidden).sum(1)
    assert record["errors"]["glom"][0] == pytest.approx((own / holes.hidden.sum(1)).mean().item(), rel=1e-5)
    above = record["above_glom"]["autoencoder"][0]
    assert above == pytest.approx(record["errors"]["autoencoder"][0] - record["errors"]["glom"][0], abs=1e-6)
    environment = {"processor": "p", "threads": 1}
    text = glom_reconstruction.table({**record, "environment": environment, "command": "c", "date": "d"})
    assert "| GLOM |" in text and "3 of 4 steps" in text


def test_other_images_than_those_trained_on_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    chosen = options(checkpoint, make_folder(tmp_path / "others", 5))
    with pytest.raises(UsageError, match="not what the checkpoint was trained on"):
        read_trained(chosen).images(chosen)  # type: ignore[arg-type]


def test_a_part_that_is_switched_off_is_not_heard(checkpoint: Path, images: Path) -> None:
    model = read_trained(options(checkpoint, images)).model  # type: ignore[arg-type]
    seen = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    tokens, levels = model.tokens(model.patches(seen)), list(model.states(seen, steps=2))[-1]
    heard = model.opinions(levels, tokens)
    for parts, kept, counts in (
        ({"consensus": "none"}, levels + heard.bottom_up + heard.top_down, [3, 2]),
        ({"top_down": False}, levels + heard.bottom_up + heard.consensus, [3, 3]),
    ):
        other = switched(model, **parts)
        moved = other.step(levels, other.opinions(levels, tokens))
        torch.testing.assert_close(moved, kept / torch.tensor(counts, dtype=torch.float32)[:, None])


@pytest.mark.slow
def test_parts_are_measured_by_step_switched_off_and_never_there(
    checkpoint: Path, images: Path, tmp_path: Path
) -> None:
    chosen = options(checkpoint, images, settling=None, retrain=2, variants=tmp_path / "variants")
    record = glom_parts.measure(chosen)  # type: ignore[arg-type]
    off, never = record["errors"]["switched off"], record["errors"]["never there"]
    assert set(off) == set(never) == set(glom_parts.VARIANTS) and {len(rows) for rows in off.values()} == {6}
    assert len({str(rows) for rows in [*off.values(), *never.values()]}) == 10
    whole = glom_reconstruction.measure(options(checkpoint, images, autoencoder=None))  # type: ignore[arg-type]
    assert off["all parts"][3] == pytest.approx(whole["errors"]["glom"], rel=1e-6)  # after the 4 settling steps
    assert glom_parts.measure(chosen)["errors"] == record["errors"]  # type: ignore[arg-type]  # from its checkpoints
    environment = {"processor": "p", "threads": 1}
    text = glom_parts.table({**record, "environment": environment, "command": "c", "date": "d"})
    assert text.count("| no top-down |") == 2 and "| 6 steps |" in text


# --- trainings side by side -------------------------------------------------------------------------------------------


def test_trainings_that_differ_in_a_setting_stand_side_by_side(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    trained = read_trained(options(checkpoint, images))  # type: ignore[arg-type]
    cache = trained.images(options(checkpoint, images))  # type: ignore[arg-type]

    def other(name: str, **changes: Any) -> Path:
        path, config = tmp_path / f"{name}.safetensors", replace(TRAINING, **changes)
        known = {"data": trained.settings["data"]}
        GLOMTrainer(path, cache, replace(SIZES, radius=None), config, data=known, precision="fp32").run(
            evaluate_every=2
        )
        return path

    first = tmp_path / "first.safetensors"
    GLOMTrainer(first, cache, SIZES, TRAINING, data={"data": trained.settings["data"]}, precision="fp32").run()
    second = other("second")
    record = glom_curves.measure(SimpleNamespace(checkpoints=[first, second]))  # type: ignore[arg-type]
    logs = [
        {row["step"]: row for row in map(json.loads, Path(f"{path}.log.jsonl").read_text().splitlines())}
        for path in (first, second)
    ]
    assert record["steps"] == sorted(logs[0].keys() & logs[1].keys()) and record["steps"][-1] == 4
    assert [one["differs"] for one in record["trainings"]] == [{"radius": 1.5}, {"radius": None}]
    for log, one in zip(logs, record["trainings"], strict=True):
        assert one["held_out_denoising"] == [log[step]["held_out_denoising"] for step in record["steps"]]
    text = glom_curves.table({**record, "environment": {"processor": "p"}, "command": "c", "date": "d"})
    assert "| step | radius 1.5 | radius none |" in text and "lr 0.01 over 4 steps, seed 3" in text
    with pytest.raises(UsageError, match="two trainings or more"):
        glom_curves.measure(SimpleNamespace(checkpoints=[first]))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="differ in held_out"):
        wrong = [first, other("third", held_out=0.5)]
        glom_curves.measure(SimpleNamespace(checkpoints=wrong))  # type: ignore[arg-type]


# --- islands ----------------------------------------------------------------------------------------------------------

HALVES = np.array([[1, 1, 2, 2]] * 4)


def test_a_place_is_what_most_of_it_is() -> None:
    mask = np.zeros((64, 64), np.int32)
    mask[:, 20:] = 7  # of the second column's 16 pixels 12 are
    mask[32:, :16] = 300
    found = scenes.places_of(Image.fromarray(mask), 4)
    np.testing.assert_array_equal(found, [[-1, 7, 7, 7], [-1, 7, 7, 7], [300, 7, 7, 7], [300, 7, 7, 7]])


def test_fields_that_follow_the_truth_score_and_others_do_not() -> None:
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(3, 5))
    field = directions[HALVES] + 0.01 * rng.normal(size=(4, 4, 5))
    across = HALVES.T.copy()
    good = glom_islands.score(field, HALVES, across, 2)
    assert good["clusters"] == good["islands"] == 1 and good["contrast"] > 1.5 and abs(good["other"]) < 0.2
    bad = glom_islands.score(field, across, HALVES, 2)
    assert bad["clusters"] == good["other"] and abs(bad["islands"]) < 0.2 and abs(bad["contrast"]) < 0.7
    unknown = HALVES.copy()
    unknown[:, 1] = -1  # no known neighbours are of two parts
    assert Scene("a", picture(1), HALVES).usable and not Scene("a", picture(1), unknown).usable
    partly = HALVES.copy()
    partly[0] = -1
    assert glom_islands.score(field, partly, across, 2)["clusters"] == 1


@pytest.mark.parametrize("parts", [1, 2, 5, 16])
def test_islands_are_cut_at_the_threshold_that_gives_so_many(parts: int) -> None:
    field = np.random.default_rng(1).normal(size=(4, 4, 6))
    found = partitions.cut_into_islands(field, parts)
    counts = [
        int(islands.regions(field - field.mean((0, 1)), threshold).max()) + 1
        for threshold in [*np.linspace(-1, 1, 301), 2]
    ]
    assert abs(int(found.max()) + 1 - parts) == min(abs(count - parts) for count in counts)


def coco(folder: Path, count: int = 3) -> Path:
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        image = picture(number, 32)  # 32 × 36, a corner of another colour
        image.save(folder / "images" / f"{number}.jpg")
        mask = np.full((32, 36), 20, np.uint8)
        mask[:16, :16] = 5
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
    return folder


@pytest.mark.slow
def test_masks_score_all_sources_and_rows_are_kept(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(glom_islands, "load_teacher", lambda name, device: FakeTeacher(dim=16))
    chosen = options(
        checkpoint, coco(tmp_path), teacher="fake", preset="small", steps=1, seed=0, parts=2, device="cpu",
        rows=tmp_path / "rows.jsonl",
    )  # fmt: skip
    record = glom_islands.measure(chosen)  # type: ignore[arg-type]
    assert record["images"] == {"masks": 3, "composites": 3} and record["grid"] == 4
    masks = record["scores"]["masks"]
    assert {"GLOM, level 0", "GLOM, level 1", "GLOM not trained, level 1", "teacher's grid", "colours"} < set(masks)
    assert masks["colours"]["clusters"][0] > 0.5  # the corner has a colour of its own
    assert masks["colours"]["clusters"][0] > masks["coordinates"]["clusters"][0]
    rows = chosen.rows.read_text().splitlines()
    assert len(rows) == 7
    chosen.rows.write_text("\n".join([*rows[:6], rows[6][:20]]))  # a kill cut the last row off
    seen: list[Any] = []
    original = glom_islands.Sources.__call__
    monkeypatch.setattr(glom_islands.Sources, "__call__", lambda self, square: seen.append(0) or original(self, square))
    again = glom_islands.measure(chosen)  # type: ignore[arg-type]
    assert len(seen) == 1 and again["scores"] == record["scores"]
    chosen.limit = 2  # the second photograph would be beside another one, and composites be made of two
    with pytest.raises(UsageError, match="images: 3 there, 2 here"):
        glom_islands.measure(chosen)  # type: ignore[arg-type]
    environment = {"processor": "p", "threads": 1}
    text = glom_islands.table({**record, "environment": environment, "command": "c", "date": "d"})
    assert "3 composites and the pasted square" in text
    with pytest.raises(UsageError, match="holds no photographs with masks"):
        list(scenes.photographs(tmp_path / "none", 4))


# --- as a student of test-time training -------------------------------------------------------------------------------


@pytest.mark.slow
def test_students_are_compared_with_their_teacher_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glom_student, "load_teacher", lambda name, device: FakeTeacher(dim=16))
    monkeypatch.setattr(glom_student, "SPECS", ("apm", "glom-ttt", "glom-ttt:settling=1"))
    chosen = SimpleNamespace(
        root=make_folder(tmp_path / "images", 4),
        teacher="fake",
        preset="small",
        steps=2,
        limit=None,
        seed=0,
        device="cpu",
    )
    record = glom_student.measure(chosen)  # type: ignore[arg-type]
    assert record["images"] == 4 and record["classes"] == 2 and record["settings"]["glom-ttt"]["steps"] == 2
    for row in record["methods"].values():
        gained = row["accuracy"] - record["teacher_accuracy"]
        assert gained == pytest.approx((row["wrong_to_right"] - row["right_to_wrong"]) / 4)
        assert row["cosine_minimum"] <= row["cosine"] < 1
    # 64 places, 3 levels and 2 top-down nets of 64 → 256 → 64 numbers, in 6 settling steps; three times with gradients
    nets = 64 * 5 * 2 * 2 * 64 * 256 * 6 * 3
    assert nets < record["methods"]["glom-ttt"]["operations"] < 1.3 * nets
    assert record["methods"]["glom-ttt:settling=1"]["operations"] < record["methods"]["glom-ttt"]["operations"] / 4
    text = glom_student.table({**record, "environment": {"processor": "p"}, "command": "c", "date": "d"})
    assert "| `glom-ttt` |" in text and "4 images, 2 classes" in text
