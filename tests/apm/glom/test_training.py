"""How GLOM learns: hidden places, the contrast, exact resume."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from apm.errors import UsageError
from apm.glom.config import GLOMConfig, GLOMTraining
from apm.glom.model import GLOM
from apm.glom.training import (
    NETWORK,
    GLOMTrainer,
    contrast,
    denoising_errors,
    hide,
    load_glom,
    settle,
    shapes,
)
from apm.pretrain.cache import GridCache, build_cache
from apm.pretrain.checkpoint import read_checkpoint, read_network
from apm.pretrain.images import open_images
from apm.pretrain.loop import read_log
from apm.pretrain.student import Student
from tests.launch import finish
from tests.pretraining import make_folder

SIZES = GLOMConfig(image_size=16, patch_size=4, dim=6, levels=3, expansion=2)
TRAINING = GLOMTraining(steps=6, batch_size=4, lr=1e-2, warmup=2, held_out=0.25, contrast_columns=20, seed=3)
DATA = {"data": "fake"}


def make_images(folder: Path, count: int = 12) -> GridCache:
    return build_cache(open_images(make_folder(folder / "images", count)), None, folder / "cache", size=16)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> GridCache:
    return make_images(tmp_path_factory.mktemp("data"))


def trainer(path: Path, cache: GridCache, config: GLOMTraining = TRAINING, sizes: GLOMConfig = SIZES) -> GLOMTrainer:
    return GLOMTrainer(path, cache, sizes, config, data=DATA, precision="fp32")


def test_a_cache_without_a_teacher_holds_images_alone(cache: GridCache) -> None:
    assert cache.images.shape == (12, 16, 16, 3) and cache.grids.shape == (12, 0, 0, 0)
    assert cache.inputs(np.array([1])).shape == (1, 3, 16, 16) and cache.images.std() > 10


def test_hidden_places_are_not_seen_and_the_error_is_theirs_alone(cache: GridCache) -> None:
    model, images = GLOM(SIZES, seed=1), cache.inputs(np.arange(2))
    hidden = torch.zeros(2, 16, dtype=torch.bool)
    hidden[0, 5] = hidden[1, [0, 15]] = True
    seen = hide(model, images, hidden)
    assert (seen[0, :, 4:8, 4:8] == 0).all() and (seen[1, :, :4, :4] == 0).all() and (seen[1, :, 12:, 12:] == 0).all()
    assert (seen != images).sum() == 3 * 3 * 16  # three places of 4 x 4 pixels in 3 colours
    embeddings = model(seen)[:, :, 0]
    read = model.images(model.pixels(embeddings))
    first = (read - images)[0, :, 4:8, 4:8].square().mean()
    second = torch.stack([(read - images)[1, :, :4, :4], (read - images)[1, :, 12:, 12:]]).square().mean()
    torch.testing.assert_close(denoising_errors(model, embeddings, images, hidden), torch.stack([first, second]))


def test_which_places_are_hidden_is_a_function_of_the_settings() -> None:
    config = GLOMTraining(hidden=0.3, seed=5)
    one = config.hidden_places(50, 10, draw=(0, 7))
    assert (one.sum(1) == 3).all() and one.any(0).all()
    assert np.array_equal(one, config.hidden_places(50, 10, draw=(0, 7)))
    assert not np.array_equal(one, config.hidden_places(50, 10, draw=(0, 8)))
    assert not np.array_equal(one, replace(config, seed=6).hidden_places(50, 10, draw=(0, 7)))
    assert (replace(config, hidden=0.01).hidden_places(3, 10, draw=()).sum(1) == 1).all()
    assert (replace(config, hidden=0.99).hidden_places(3, 10, draw=()).sum(1) == 9).all()


def test_it_looks_after_half_the_steps_or_more() -> None:
    drawn = {TRAINING.settling_steps(step, SIZES) for step in range(200)}
    assert drawn == {3, 4, 5, 6}
    assert {replace(TRAINING, settling=1).settling_steps(step, SIZES) for step in range(20)} == {1}
    assert {replace(TRAINING, settling=5).settling_steps(step, SIZES) for step in range(200)} == {3, 4, 5}


def test_the_contrast_is_the_cross_entropy_of_ones_own_place() -> None:
    rng = np.random.default_rng(0)
    said, settled = rng.standard_normal((2, 5, 2, 4))
    wanted = []
    for level in range(2):
        for m in range(5):
            unit = [one / np.linalg.norm(one) for one in settled[:, level]]
            scores = np.array([said[m, level] @ one / np.linalg.norm(said[m, level]) for one in unit]) / 0.2
            wanted.append(np.log(np.exp(scores).sum()) - scores[m])
    found = contrast(torch.from_numpy(said), torch.from_numpy(settled), temperature=0.2, agree=1.0)
    assert found.item() == pytest.approx(np.mean(wanted), rel=1e-12)


def test_places_that_agree_do_not_repel_and_others_do() -> None:
    settled = torch.tensor([[1.0, 0.1], [1.0, 0.0], [-1.0, 0.3]], dtype=torch.float64)[:, None]  # the first two agree
    said = settled.clone().requires_grad_()
    two = contrast(said, settled, temperature=0.1, agree=0.9)
    only = [F.cosine_similarity(said[m, 0], settled[n, 0], dim=0) / 0.1 for m, n in ((0, 0), (0, 2))]
    rows = [torch.stack(only).log_softmax(0)[0]]
    rows.append(
        torch.stack([F.cosine_similarity(said[1, 0], settled[n, 0], dim=0) / 0.1 for n in (1, 2)]).log_softmax(0)[0]
    )
    rows.append(
        torch.stack([F.cosine_similarity(said[2, 0], settled[n, 0], dim=0) / 0.1 for n in (2, 0, 1)]).log_softmax(0)[0]
    )
    torch.testing.assert_close(two, -torch.stack(rows).mean())
    assert contrast(said, settled, temperature=0.1, agree=1.0) > two  # now they would
    assert contrast(said, settled, temperature=0.1, agree=-1.0).item() == 0  # all agree


def test_the_contrast_moves_what_is_said_and_not_where_it_settled() -> None:
    said, settled = (
        torch.randn(4, 1, 3, generator=torch.Generator().manual_seed(n), requires_grad=True) for n in (1, 2)
    )
    contrast(said, settled, temperature=0.1, agree=0.9).backward()
    assert said.grad is not None and said.grad.abs().max() > 0 and settled.grad is None


def test_settle_is_the_models_own_with_the_last_opinions() -> None:
    model = GLOM(SIZES, seed=2)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    before, after = list(model.states(images, steps=4))[-2:]
    embeddings, opinions = settle(model, images, 4)
    assert torch.equal(embeddings, after)
    torch.testing.assert_close(
        before + opinions.bottom_up + opinions.top_down + opinions.consensus, after * model.votes
    )


def test_losses_are_of_hidden_places_and_both_nets(cache: GridCache, tmp_path: Path) -> None:
    mine = trainer(tmp_path / "c.safetensors", cache)
    numbers, hidden = np.array([3, 1]), TRAINING.hidden_places(2, 16, draw=())
    columns = np.array([0, 7, 16, 31])
    with torch.no_grad():
        errors, contrasted = mine.losses(numbers, hidden, columns, steps=3)
        images, mask = cache.inputs(numbers), torch.from_numpy(hidden)
        levels, opinions = settle(mine.model, hide(mine.model, images, mask), 3)
        torch.testing.assert_close(errors, denoising_errors(mine.model, levels[:, :, 0], images, mask))
        rows = [one.flatten(0, 1)[columns] for one in (opinions.bottom_up, opinions.top_down, levels)]
        how = {"temperature": 0.1, "agree": 0.7}
        both = contrast(rows[0], rows[2], **how) + contrast(rows[1][:, :2], rows[2][:, :2], **how)
        torch.testing.assert_close(contrasted, both / 2)


def test_a_step_follows_both_losses_as_they_are_weighed(cache: GridCache, tmp_path: Path) -> None:
    config = replace(TRAINING, contrast_weight=0.3)
    mine, other = (trainer(tmp_path / f"{name}.safetensors", cache, config) for name in "ab")
    numbers, draw = config.batch(other.train, 0), (0, 0)
    hidden, columns = config.hidden_places(4, 16, draw=draw), other._columns(4, *draw)
    errors, contrasted = other.losses(numbers, hidden, columns, steps=config.settling_steps(0, SIZES))
    (errors.mean() + 0.3 * contrasted).backward()  # type: ignore[no-untyped-call]
    assert mine.gradients() == {"denoising": errors.mean().item(), "contrast": contrasted.item()}
    for (name, one), two in zip(mine.model.named_parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, msg=name)


@pytest.mark.slow
def test_it_learns_to_fill_in_hidden_places(cache: GridCache, tmp_path: Path) -> None:
    mine = trainer(tmp_path / "c.safetensors", cache, replace(TRAINING, steps=150, batch_size=8))
    mine.run(evaluate_every=75)
    rows = read_log(mine.log)
    assert [row["step"] for row in rows] == [0, 75, 150]
    grey = [np.square(cache.inputs(np.array([n])).numpy()).mean() for n in mine.train]
    assert rows[-1]["denoising"] < 0.5 * np.mean(grey)  # better than to leave them grey
    assert rows[-1]["held_out_denoising"] < rows[0]["held_out_denoising"]
    last = {name: rows[-1][f"held_out_{name}"] for name in ("denoising", "contrast")}
    assert last == mine.held_out_losses()


@pytest.mark.slow
def test_the_contrast_alone_is_learned_too(cache: GridCache, tmp_path: Path) -> None:
    mine = trainer(tmp_path / "c.safetensors", cache, replace(TRAINING, steps=60, contrast_weight=10.0))
    mine.run(evaluate_every=30)
    rows = read_log(mine.log)
    assert rows[-1]["held_out_contrast"] < 0.8 * rows[0]["held_out_contrast"]


@pytest.mark.parametrize(
    "change", [{"levels": 1}, {"top_down": False}, {"consensus": "none"}, {"consensus": "others", "radius": 1.5}]
)
def test_every_variant_trains_and_is_taken_up(cache: GridCache, tmp_path: Path, change: dict[str, Any]) -> None:
    sizes = replace(SIZES, **change)
    mine = trainer(tmp_path / "c.safetensors", cache, sizes=sizes)
    mine.advance()
    mine.save()
    again = trainer(tmp_path / "c.safetensors", cache, sizes=sizes)
    assert again.step == 1
    one, other = mine.advance(), again.advance()
    assert one == other
    for name, weight in mine.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name


def test_bf16_is_near_float32(cache: GridCache, tmp_path: Path) -> None:
    full = trainer(tmp_path / "a.safetensors", cache)
    low = GLOMTrainer(tmp_path / "b.safetensors", cache, SIZES, TRAINING, data=DATA, precision="bf16")
    one, other = full.advance(), low.advance()
    assert one != other
    assert other["denoising"] == pytest.approx(one["denoising"], rel=0.05)
    assert other["contrast"] == pytest.approx(one["contrast"], rel=0.05)


WORKER = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.apm.glom.test_training import make_images, trainer

folder, kill_after = Path(sys.argv[1]), int(sys.argv[2])

def kill(step, losses):
    if step == kill_after:
        os.kill(os.getpid(), signal.SIGKILL)

trainer(folder / "c.safetensors", make_images(folder)).run(evaluate_every=1, save_every=2, on_step=kill)
"""


def work(folder: Path, kill_after: int = -1) -> int:
    return finish(WORKER, folder, folder, kill_after)


@pytest.mark.slow
def test_after_a_kill_the_weights_are_those_of_a_run_without_one(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert work(whole) == 0
    assert work(broken, kill_after=5) == -signal.SIGKILL
    half = read_network(broken / "c.safetensors", NETWORK)
    assert half.step == 4 and not half.finished
    assert work(broken) == 0
    assert (whole / "c.safetensors").read_bytes() == (broken / "c.safetensors").read_bytes()
    curves = [[{**row, "seconds": 0} for row in read_log(f / "c.safetensors.log.jsonl")] for f in (whole, broken)]
    assert curves[0] == curves[1] and [row["step"] for row in curves[0]] == list(range(7))


def test_a_checkpoint_keeps_its_radius_and_that_it_has_none(cache: GridCache, tmp_path: Path) -> None:
    for radius in (None, 2.5, GLOMConfig().radius):
        path = tmp_path / f"{radius}.safetensors"
        trainer(path, cache, replace(TRAINING, steps=1), sizes=replace(SIZES, radius=radius)).run()
        assert load_glom(path)[0].config.radius == radius
    assert GLOMConfig().radius == 1.5


def test_a_finished_checkpoint_is_loaded_and_other_kinds_are_told(cache: GridCache, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    mine = trainer(path, cache, sizes=replace(SIZES, radius=2.5))
    mine.run()
    model, settings = load_glom(path)
    assert model.config == mine.model.config and settings["step"] == 6 and settings["lr"] == TRAINING.lr
    for name, weight in mine.model.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
    images = cache.inputs(np.arange(2))
    with torch.no_grad():
        assert torch.equal(model(images), mine.model(images))
    with pytest.raises(UsageError, match="is not a checkpoint of `apm pretrain` but of another network"):
        Student.load(path)
    with pytest.raises(UsageError, match="is not a checkpoint of `apm pretrain` but of another network"):
        read_checkpoint(path)
    with pytest.raises(UsageError, match="no such checkpoint; `apm glom train` makes one"):
        load_glom(tmp_path / "none.safetensors")
    with pytest.raises(UsageError, match=r"dim: 6 there, 8 here"):
        trainer(path, cache, sizes=replace(SIZES, radius=2.5, dim=8))
    with pytest.raises(UsageError, match=r"hidden: 0\.5 there, 0\.25 here"):
        trainer(path, cache, replace(TRAINING, hidden=0.25), sizes=replace(SIZES, radius=2.5))


def test_shapes_are_those_of_the_parameters() -> None:
    for change in ({}, {"levels": 1}, {"top_down": False}, {"radius": 2.0}):
        config = replace(SIZES, **change)  # type: ignore[arg-type]
        assert shapes(config) == {name: tuple(p.shape) for name, p in GLOM(config).state_dict().items()}


@pytest.mark.parametrize(
    "values",
    [{"hidden": 0.0}, {"hidden": 1.0}, {"settling": 0}, {"contrast_columns": 1}, {"agree": 1.5}, {"temperature": 0.0},
     {"contrast_weight": -1.0}, {"steps": 0}, {"lr": float("nan")}],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"must be|above 0|from -1 to 1"):
        GLOMTraining(**values)


def test_a_level_that_is_not_there_is_refused(cache: GridCache, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="read_level must be below 3, the number of levels, not 3"):
        trainer(tmp_path / "c", cache, replace(TRAINING, read_level=3))
