"""How masked autoencoders and their heads learn: losses, what is changed, exact resume, several processes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from apm.errors import UsageError
from apm.mae.augment import crop, crop_maps
from apm.mae.config import HeadTraining, MAEConfig, MAETraining, kept_places
from apm.mae.model import MaskedAutoencoder
from apm.mae.published import NETWORK, Start, read_start
from apm.mae.training import TRAINED, HeadTrainer, MAETrainer, load_mae
from apm.pretrain.cache import GridCache, build_cache
from apm.pretrain.checkpoint import read_network
from apm.pretrain.images import open_images
from apm.pretrain.loop import read_log
from apm.processes import Group
from tests.launch import TORCHRUN, finish
from tests.pretraining import make_folder

SIZES = MAEConfig(
    image_size=16, patch_size=4, width=8, depth=2, heads=2, decoder_width=8, decoder_depth=1, decoder_heads=2,
    head_width=8, head_depth=1, head_heads=2,
)  # fmt: skip
TRAINING = MAETraining(steps=6, batch_size=4, lr=1e-2, warmup=2, held_out=0.25, seed=3)
HEADS = HeadTraining(steps=6, batch_size=4, lr=1e-2, warmup=2, held_out=0.25, seed=3)
DATA = {"data": "fake"}
NAMES = ("even", "odd")


def make_images(folder: Path, count: int = 12) -> GridCache:
    make_folder(folder / "images", count)
    return found_images(folder)


def found_images(folder: Path) -> GridCache:
    return build_cache(open_images(folder / "images"), None, folder / "cache", size=16)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> GridCache:
    return make_images(tmp_path_factory.mktemp("data"))


def trainer(path: Path, cache: GridCache, config: MAETraining = TRAINING, **options: Any) -> MAETrainer:
    return MAETrainer(path, cache, SIZES, config, data=DATA, **{"precision": "fp32", **options})


def start() -> Start:
    return Start(SIZES, MaskedAutoencoder(SIZES, seed=9).state_dict(), "digest")


def head_trainer(path: Path, cache: GridCache, kind: Any = "probe", **options: Any) -> HeadTrainer:
    given = {"start": start(), "precision": "fp32", **options}
    config = given.pop("config", HEADS)
    labels = np.arange(len(cache.names)) % 2
    return HeadTrainer(
        path, cache, replace(SIZES, classes=2), replace(config, kind=kind), labels=labels, class_names=NAMES,
        data=DATA, **given,
    )  # fmt: skip


def test_a_crop_is_the_box_that_was_drawn_scaled_up() -> None:
    squares = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(3, 2, 3)
    torch.testing.assert_close(crop(squares, whole), squares)
    mirrored = whole.clone()
    mirrored[:, 0, 0] = -1
    torch.testing.assert_close(crop(squares, mirrored), squares.flip(3))
    quarter = torch.tensor([[0.5, 0, -0.5], [0, 0.5, 0.5]])[None]  # the lower left quarter
    plain = F.interpolate(squares[:1, :, 4:, :4], size=8, mode="bicubic", align_corners=False)
    inner = (..., slice(3, None), slice(None, 5))  # where the crop's own edges are out of the kernel's reach
    torch.testing.assert_close(crop(squares[:1], quarter)[inner], plain[inner])


def test_crops_are_a_function_of_their_numbers_and_lie_inside() -> None:
    maps = crop_maps(200, 64, min_area=0.2, draw=(1, 7, 3))
    assert torch.equal(maps, crop_maps(200, 64, min_area=0.2, draw=(1, 7, 3)))
    assert not torch.equal(maps, crop_maps(200, 64, min_area=0.2, draw=(1, 7, 4)))
    wide, high = maps[:, 0, 0].abs(), maps[:, 1, 1]
    assert (wide + maps[:, 0, 2].abs() <= 1 + 1e-6).all() and (high + maps[:, 1, 2].abs() <= 1 + 1e-6).all()
    assert (wide * high).min() > 0.18 and 80 < (maps[:, 0, 0] < 0).sum() < 120


def test_each_image_has_its_own_order_and_the_step_decides() -> None:
    one = TRAINING.orders(5, 16, draw=(0, 7))
    assert (np.sort(one, 1) == np.arange(16)).all() and len({tuple(row) for row in one}) == 5
    assert np.array_equal(one, TRAINING.orders(5, 16, draw=(0, 7)))
    assert not np.array_equal(one, TRAINING.orders(5, 16, draw=(0, 8)))


def test_a_step_is_adamw_on_the_mean_error_of_the_crops(cache: GridCache, tmp_path: Path) -> None:
    mine = trainer(tmp_path / "c.safetensors", cache)
    numbers = TRAINING.batch(mine.train, 0)
    images = crop(cache.inputs(numbers), crop_maps(4, 16, min_area=0.2, draw=(3, 7, 0)))
    orders = torch.from_numpy(TRAINING.orders(4, 16, draw=(0, 0)))
    other = MaskedAutoencoder(SIZES, seed=3)
    loss = other(images, orders, kept_places(16, 0.75)).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
    found = mine.advance()
    assert found["reconstruction"] == pytest.approx(loss.item(), rel=1e-5)
    assert found["norm"] == pytest.approx(norm.item(), rel=1e-4)
    grown = [p.ndim > 1 and "bias" not in n for n, p in other.named_parameters()]
    groups = [
        {"params": [p for p, g in zip(other.parameters(), grown, strict=True) if g is decayed], "weight_decay": decay}
        for decayed, decay in ((True, 0.05), (False, 0.0))
    ]
    torch.optim.AdamW(groups, lr=1e-2 / 2, betas=(0.9, 0.95)).step()
    for (name, one), two in zip(mine.model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", [*TRAINED])
def test_each_kind_changes_what_it_says_and_nothing_else(cache: GridCache, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "h.safetensors"
    mine = head_trainer(path, cache, kind)
    first = {name: weight.clone() for name, weight in mine.model.state_dict().items()}
    for name, weight in start().weights.items():
        assert torch.equal(first[name], weight), name
    mine.run()
    for name, weight in mine.model.state_dict().items():
        trained = name.startswith(TRAINED[kind]) and name != "encoder.pos_embed"
        assert torch.equal(weight, first[name]) is not trained, name
    found = load_mae(path)
    assert (found.kind, found.class_names, found.step) == (kind, NAMES, 6)
    names = {"cross_entropy", "accuracy"} | ({"reconstruction"} if kind == "joint" else set())
    assert mine.held_out_losses().keys() == names
    assert {*names, *(f"held_out_{name}" for name in names)} < read_log(mine.log)[-1].keys()


def test_losses_of_labels_are_smoothed_cross_entropy_on_whole_images(cache: GridCache, tmp_path: Path) -> None:
    mine = head_trainer(tmp_path / "h.safetensors", cache, "joint")
    images, orders = mine.fixed(0, np.array([3, 1, 2]))
    labels = torch.tensor([1, 1, 0])
    found = mine.losses(images, labels, orders)
    logits = mine.model.logits(images)
    smooth = 0.9 * F.one_hot(labels, 2) + 0.1 / 2
    torch.testing.assert_close(found["cross_entropy"], -(smooth * logits.log_softmax(1)).sum(1))
    assert found["accuracy"].tolist() == (logits.argmax(1) == labels).float().tolist()
    torch.testing.assert_close(found["reconstruction"], mine.model(images, orders, 4))
    assert torch.equal(images, cache.inputs(np.array([3, 1, 2])))


def test_joint_training_follows_labels_and_weighed_masked_patches(cache: GridCache, tmp_path: Path) -> None:
    config = replace(HEADS, kind="joint", mask_weight=0.3)
    mine = head_trainer(tmp_path / "h.safetensors", cache, "joint", config=config)
    numbers = config.batch(mine.train, 0)
    images = crop(cache.inputs(numbers), crop_maps(4, 16, min_area=0.2, draw=(3, 7, 0)))
    orders = torch.from_numpy(config.orders(4, 16, draw=(0, 0)))
    other = MaskedAutoencoder(replace(SIZES, classes=2))
    other.load_state_dict(mine.model.state_dict())
    cross = F.cross_entropy(other.logits(images), torch.from_numpy(numbers % 2), label_smoothing=0.1)
    (cross + 0.3 * other(images, orders, 4).mean()).backward()
    mine.gradients()
    for (name, one), two in zip(mine.model.named_parameters(), other.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", [None, *TRAINED])
def test_it_is_taken_up_where_it_stopped(cache: GridCache, tmp_path: Path, kind: str | None) -> None:
    def made() -> Any:
        path = tmp_path / "c.safetensors"
        return trainer(path, cache) if kind is None else head_trainer(path, cache, kind)

    mine = made()
    mine.advance()
    mine.save()
    again = made()
    assert again.step == 1 and [mine.advance(), mine.advance()] == [again.advance(), again.advance()]
    for name, weight in mine.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name


@pytest.mark.parametrize("kind", [None, "joint"])
def test_processes_share_a_batch(cache: GridCache, tmp_path: Path, kind: str | None) -> None:
    """The parts' gradients, added up, are those of the whole; also where there are more processes than images."""

    def made(path: Path, **options: Any) -> Any:
        return trainer(path, cache, **options) if kind is None else head_trainer(path, cache, kind, **options)

    alone = made(tmp_path / "a.safetensors")
    whole = alone.gradients()
    for world in (3, 5):
        sums: dict[str, torch.Tensor] = {}
        losses: list[dict[str, float]] = []
        for rank in range(world):
            part = made(tmp_path / "b.safetensors", processes=_Alone(rank, world))
            part.add_up = lambda sums: None  # type: ignore[method-assign]
            losses.append(part.gradients())
            for name, parameter in part.model.named_parameters():
                if parameter.grad is not None:
                    sums[name] = sums.get(name, 0) + parameter.grad
        for name, parameter in alone.model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(sums[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
        for name, value in whole.items():
            assert sum(one[name] for one in losses) == pytest.approx(value, rel=1e-4)


class _Alone(Group):
    """One of several processes, which hears nothing of the others."""

    def broadcast(self, value: Any) -> Any:
        return value


def test_bf16_is_near_float32(cache: GridCache, tmp_path: Path) -> None:
    for make in (trainer, head_trainer):
        full = make(tmp_path / f"{make.__name__}a.safetensors", cache).advance()
        low = make(tmp_path / f"{make.__name__}b.safetensors", cache, precision="bf16").advance()
        name = next(iter(full))
        assert low != full and low[name] == pytest.approx(full[name], rel=0.05)


@pytest.mark.slow
def test_it_learns_to_say_masked_patches_and_classes(cache: GridCache, tmp_path: Path) -> None:
    mine = trainer(tmp_path / "c.safetensors", cache, replace(TRAINING, steps=200, batch_size=8))
    mine.run(evaluate_every=100)
    rows = read_log(mine.log)
    assert rows[-1]["held_out_reconstruction"] < 0.8 * rows[0]["held_out_reconstruction"]
    base = read_start(tmp_path / "c.safetensors", SIZES)
    head = head_trainer(
        tmp_path / "h.safetensors", cache, "probe", start=base, config=replace(HEADS, steps=200, batch_size=8)
    )
    head.run(evaluate_every=200)
    assert read_log(head.log)[-1]["accuracy"] > 0.8  # even and odd are two colours each, by heart


@pytest.mark.parametrize("kind", [None, "joint"])
def test_a_run_in_two_sessions_ends_in_the_bytes_of_one(cache: GridCache, tmp_path: Path, kind: str | None) -> None:
    def made(name: str) -> Any:
        path = tmp_path / f"{name}.safetensors"
        return trainer(path, cache) if kind is None else head_trainer(path, cache, kind)

    def stop(step: int, losses: dict[str, float]) -> None:
        if step == 5:  # one step after the checkpoint
            raise KeyboardInterrupt

    made("whole").run(evaluate_every=1, save_every=2)
    with pytest.raises(KeyboardInterrupt):
        made("broken").run(evaluate_every=1, save_every=2, on_step=stop)
    half = read_network(tmp_path / "broken.safetensors", NETWORK)
    assert half.step == 4 and not half.finished
    made("broken").run(evaluate_every=1, save_every=2)
    one, two = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("whole", "broken"))
    assert one == two
    logs = [read_log(tmp_path / f"{name}.safetensors.log.jsonl") for name in ("whole", "broken")]
    curves = [[{**row, "seconds": 0} for row in log] for log in logs]
    assert curves[0] == curves[1] and [row["step"] for row in curves[0]] == list(range(7))


WORKER = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.apm.mae.test_training import found_images, head_trainer
from apm.processes import join

folder = Path(sys.argv[1])
with join() as group:
    head_trainer(folder / "c.safetensors", found_images(folder), "joint", processes=group).run(evaluate_every=1)
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    images = make_images(tmp_path)  # before the processes: they would read what another is writing
    head_trainer(tmp_path / "one.safetensors", images, "joint").run(evaluate_every=1)
    assert finish(WORKER, tmp_path, tmp_path, launcher=(*TORCHRUN, "--nproc-per-node=2")) == 0
    curves = [read_log(tmp_path / f"{name}.safetensors.log.jsonl") for name in ("one", "c")]
    assert [row["step"] for row in curves[1]] == list(range(7))
    for mine, theirs in zip(*curves, strict=True):  # the norm is of the gradients of both
        for name in mine.keys() - {"seconds"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3), name


def test_what_cannot_be_trained_or_continued_is_refused(cache: GridCache, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    with pytest.raises(UsageError, match="probe needs a masked autoencoder to start from"):
        head_trainer(path, cache, "probe", start=None)
    trainer(path, cache).save()
    with pytest.raises(UsageError, match=r"masked: 0\.75 there, 0\.5 here"):
        trainer(path, cache, replace(TRAINING, masked=0.5))
    with pytest.raises(UsageError, match="start: None there, digest here"):
        trainer(path, cache, start=start())
    with pytest.raises(UsageError, match="classes: 0 there, 2 here"):
        head_trainer(path, cache)


def test_a_head_that_does_not_say_its_classes_is_damaged(cache: GridCache, tmp_path: Path) -> None:
    path = tmp_path / "h.safetensors"
    mine = head_trainer(path, cache)
    for names in ("[]", "no json", json.dumps(["one", "two", "three"])):
        mine.settings["class_names"] = names
        mine.save()
        with pytest.raises(UsageError, match="is damaged: it does not say the 2 classes of its head"):
            load_mae(path)
