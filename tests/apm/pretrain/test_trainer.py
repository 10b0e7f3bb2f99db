"""Self-supervised training: what is learned, exact resume, many processes, refusals."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from apm.errors import ApmError, UsageError
from apm.images.files import alone_with
from apm.images.load import student_input
from apm.pretrain.cache import GridCache
from apm.pretrain.checkpoint import read_checkpoint
from apm.pretrain.config import PretrainConfig
from apm.pretrain.loop import read_log
from apm.pretrain.student import Student, answer
from apm.pretrain.trainer import Pretrainer, pooled_colours
from apm.student.field import resample
from apm.student.model import APM
from apm.student.position import grid_locations, position_code
from tests.launch import TORCHRUN, finish
from tests.pretraining import DATA, STUDENT, TRAINING, make_cache, picture


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> GridCache:
    return make_cache(tmp_path_factory.mktemp("data"))


def trainer(path: Path, cache: GridCache, config: PretrainConfig = TRAINING, **more: object) -> Pretrainer:
    settings = {"data": DATA, "precision": "fp32", **more}
    return Pretrainer(path, cache, STUDENT, config, **settings)  # type: ignore[arg-type]


def test_cheap_form_is_the_models_own(cache: GridCache) -> None:
    model = APM(replace(STUDENT, init_std=0.5), seed=1)
    images = cache.inputs(np.arange(3))
    rows, cols = torch.tensor([0.0, 2.5, 3.0, -1.0]), torch.tensor([1.0, 0.25, 3.0, 7.5])
    features, colours = answer(model, model.column(images), position_code(rows, cols, STUDENT.position_dim))
    torch.testing.assert_close(features, model.field(images, rows, cols), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(colours, model.rgb(images, rows, cols), rtol=1e-5, atol=1e-6)
    (features.square().sum() + colours.sum()).backward()
    cheap = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    (model.field(images, rows, cols).square().sum() + model.rgb(images, rows, cols).sum()).backward()
    for one, (name, parameter) in zip(cheap, model.named_parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-4, atol=1e-4, msg=name)
    low, _ = answer(model, model.column(images), position_code(rows, cols, STUDENT.position_dim), precision="bf16")
    assert low.dtype == torch.float32 and 0 < (low - features).abs().max() < 0.1 * features.abs().max()


def test_losses_are_the_squared_errors_at_the_students_own_locations(cache: GridCache, tmp_path: Path) -> None:
    mine = trainer(tmp_path / "c.safetensors", cache)
    numbers = np.array([7, 2])
    images = cache.inputs(numbers)
    rows, cols = grid_locations(STUDENT.grid)
    target = resample(cache.targets(numbers), STUDENT.grid)
    pixels = torch.from_numpy(cache.images[numbers]).double() / 255  # (2, 16, 16, 3)
    pooled = pixels.unflatten(1, (4, 4)).unflatten(3, (4, 4)).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(pooled_colours(images, 4), pooled.float(), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        grid, rgb = mine.losses(numbers)
        torch.testing.assert_close(grid, (mine.model.field(images, rows, cols) - target).square().mean((1, 2)))
        torch.testing.assert_close(rgb, (mine.model.rgb(images, rows, cols) - pooled.float()).square().mean((1, 2)))
        some = np.array([1, 9])
        parts = mine.losses(numbers, some)[0]
        torch.testing.assert_close(
            parts, (mine.model.field(images, rows, cols) - target)[:, some].square().mean((1, 2))
        )


def test_held_out_errors_are_measured_in_float32(cache: GridCache, tmp_path: Path) -> None:
    mine = trainer(tmp_path / "c.safetensors", cache, precision="bf16")
    with torch.no_grad():
        for parameter in mine.model.parameters():  # large enough for bfloat16's rounding to be seen
            parameter.mul_(20)
        exact = [one.mean().item() for one in mine.losses(mine.held_out, precision="fp32")]
        rounded = [one.mean().item() for one in mine.losses(mine.held_out, precision="bf16")]
    assert mine.precision == "bf16" and rounded[0] != exact[0]
    assert mine.held_out_losses() == pytest.approx(dict(zip(("grid", "rgb"), exact, strict=True)), rel=1e-6)


def test_it_starts_from_the_means_and_learns(cache: GridCache, tmp_path: Path) -> None:
    mine = trainer(tmp_path / "c.safetensors", cache, replace(TRAINING, steps=150, held_out=0.2))
    grids = cache.grids[mine.train].astype(np.float64)
    start = mine.model.mlp.head.bias.detach().numpy()
    np.testing.assert_allclose(start, grids.mean((0, 1, 2)), rtol=1e-5)
    mine.run(evaluate_every=50)
    rows = read_log(mine.log)
    assert [row["step"] for row in rows] == [0, 50, 100, 150]
    assert rows[-1]["grid"] < 0.3 * np.square(grids - grids.mean((0, 1, 2))).mean()
    assert rows[-1]["held_out_grid"] < rows[0]["held_out_grid"]
    assert rows[-1]["held_out_rgb"] < rows[0]["held_out_rgb"]
    last = {name: rows[-1][f"held_out_{name}"] for name in ("grid", "rgb")}
    assert last == mine.held_out_losses()


def test_order_split_and_rate_are_functions_of_the_settings() -> None:
    config = PretrainConfig(steps=100, batch_size=5, warmup=10, held_out=0.2, lr=0.5, locations=3)
    train, held_out = config.split(20)
    assert len(held_out) == 4 and sorted([*train, *held_out]) == list(range(20))
    seen = np.concatenate([config.batch(train, step) for step in range(16)])
    for epoch in range(5):  # every image once a pass, though 5 does not divide 16
        assert sorted(seen[16 * epoch : 16 * (epoch + 1)]) == sorted(train)
    assert not np.array_equal(seen[:16], seen[16:32])
    assert [config.learning_rate(step) for step in (0, 9, 10, 55, 100)] == pytest.approx([0.05, 0.5, 0.5, 0.25, 0])
    places = [config.places(16, step) for step in range(50)]
    assert all(len(set(one)) == 3 for one in places) and set(np.concatenate(places)) == set(range(16))
    assert np.array_equal(replace(config, locations=None).places(16, 3), np.arange(16))
    train, held_out = PretrainConfig(held_out=0.001).split(2)
    assert len(train) == len(held_out) == 1


def test_a_damaged_log_is_told(cache: GridCache, tmp_path: Path) -> None:
    mine = trainer(tmp_path / "c.safetensors", cache)
    mine.advance()
    mine.save()
    mine.log.write_bytes(b"\0\0\n")
    with pytest.raises(UsageError, match=r"c\.safetensors\.log\.jsonl is damaged"):
        trainer(tmp_path / "c.safetensors", cache).run()


WORKER = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
from apm.processes import join
from apm.pretrain.trainer import Pretrainer
from tests.pretraining import DATA, STUDENT, TRAINING, make_cache

folder, kill_after = Path(sys.argv[1]), int(sys.argv[2])

def kill(step, losses):
    if step == kill_after:
        os.kill(os.getpid(), signal.SIGKILL)

with join() as group:
    cache = make_cache(folder / f"data{group.rank}")
    mine = Pretrainer(folder / "c.safetensors", cache, STUDENT, replace(TRAINING, locations=5), data=DATA,
                      precision="fp32", processes=group)
    mine.run(evaluate_every=1, save_every=2, on_step=kill)
"""


def work(folder: Path, *launcher: str, kill_after: int = -1) -> int:
    return finish(WORKER, folder, folder, kill_after, launcher=launcher)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, without a break."""
    folder = tmp_path_factory.mktemp("whole")
    assert work(folder) == 0
    return folder


@pytest.mark.slow
def test_after_a_kill_the_weights_are_those_of_a_run_without_one(whole: Path, tmp_path: Path) -> None:
    assert work(tmp_path, kill_after=5) == -signal.SIGKILL
    half = read_checkpoint(tmp_path / "c.safetensors")
    assert half.step == 4 and not half.finished
    assert read_log(tmp_path / "c.safetensors.log.jsonl")[-1]["step"] == 4
    assert work(tmp_path) == 0
    assert (tmp_path / "c.safetensors").read_bytes() == (whole / "c.safetensors").read_bytes()
    curves = [
        [{**row, "seconds": 0} for row in read_log(folder / "c.safetensors.log.jsonl")] for folder in (tmp_path, whole)
    ]
    assert curves[0] == curves[1] and [row["step"] for row in curves[0]] == list(range(7))


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(whole: Path, tmp_path: Path) -> None:
    assert work(tmp_path, *TORCHRUN, "--nproc-per-node=2") == 0
    one, two = (load_file(folder / "c.safetensors") for folder in (whole, tmp_path))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-6, msg=name)
    start = APM(STUDENT, seed=TRAINING.seed).state_dict()
    moved = max((one[f"model.{name}"] - start[name]).abs().max() for name in start)
    apart = max((one[name] - two[name]).abs().max() for name in one)
    assert apart < 1e-4 * moved  # far nearer to one another than to where they began


def test_processes_that_share_a_batch_unevenly_weigh_each_image_the_same(cache: GridCache, tmp_path: Path) -> None:
    whole = trainer(tmp_path / "a.safetensors", cache, replace(TRAINING, batch_size=3))
    whole.advance()
    want = [parameter.grad.clone() for parameter in whole.model.parameters() if parameter.grad is not None]

    class Part:
        world = 2

        def __init__(self, rank: int) -> None:
            self.rank = rank

        def broadcast(self, value: str) -> str:
            return value

    total = [torch.zeros_like(gradient) for gradient in want]
    for rank in (0, 1):
        part = trainer(tmp_path / "b.safetensors", cache, replace(TRAINING, batch_size=3), processes=Part(rank))
        part.add_up = lambda sums: None  # type: ignore[method-assign]
        part.config = replace(part.config, clip=1e9)
        part.advance()
        for gradient, parameter in zip(total, part.model.parameters(), strict=True):
            assert parameter.grad is not None
            gradient += parameter.grad
    norm = torch.cat([gradient.flatten() for gradient in total]).norm()
    for one, other in zip(total, want, strict=True):
        torch.testing.assert_close(one * min(1.0, TRAINING.clip / float(norm)), other, rtol=1e-4, atol=1e-7)


def test_finished_checkpoint_is_weights_alone_and_training_it_again_does_nothing(
    cache: GridCache, tmp_path: Path
) -> None:
    path = tmp_path / "c.safetensors"
    trainer(path, cache).run(save_every=2)
    found = read_checkpoint(path)
    assert found.finished and found.step == TRAINING.steps and not found.moments
    assert found.settings["lr"] == TRAINING.lr and found.settings["teacher"] == "fake@0"
    before = path.read_bytes(), path.stat().st_mtime_ns
    again = trainer(path, cache)
    assert again.finished
    again.run()
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    student = Student.load(path)
    assert student.config == STUDENT
    for name, weight in student.model.state_dict().items():
        assert torch.equal(weight, found.weights[name])


def test_other_settings_are_refused_by_name(cache: GridCache, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    first = trainer(path, cache)
    first.advance()
    first.save()
    with pytest.raises(
        UsageError, match=r"made with other settings\. lr: 0\.01 there, 0\.02 here; seed: 3 there, 4 here\."
    ):
        trainer(path, cache, replace(TRAINING, lr=0.02, seed=4))
    with pytest.raises(UsageError, match="teacher: fake@0 there, fake@1 here"):
        trainer(path, cache, data={**DATA, "teacher": "fake@1"})
    with pytest.raises(UsageError, match=r"hidden: \(16, 12, 8\) there, \(16, 12, 9\) here"):
        Pretrainer(path, cache, replace(STUDENT, hidden=(16, 12, 9)), TRAINING, data=DATA, precision="fp32")
    with pytest.raises(UsageError, match="precision: fp32 there, bf16 here"):
        trainer(path, cache, precision="bf16")
    assert trainer(path, cache).step == 1


def test_auto_goes_on_in_the_precision_it_began_with(
    cache: GridCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apm.pretrain.loop.measured_precision", lambda device: "bf16")
    first = trainer(tmp_path / "c.safetensors", cache, precision="auto")
    first.advance()
    first.save()
    monkeypatch.setattr("apm.pretrain.loop.measured_precision", lambda device: "fp32")
    again = trainer(tmp_path / "c.safetensors", cache, precision="auto")
    assert (first.precision, again.precision, again.step) == ("bf16", "bf16", 1)


def test_only_one_process_trains_a_checkpoint(cache: GridCache, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    with alone_with(path, "training"), pytest.raises(UsageError, match="Another process is training"):
        trainer(path, cache).run()


def test_what_is_no_checkpoint_is_told(cache: GridCache, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    with pytest.raises(UsageError, match="no such checkpoint; `apm pretrain` makes one"):
        read_checkpoint(path)
    with pytest.raises(UsageError, match="is a folder"):
        read_checkpoint(tmp_path)
    with pytest.raises(UsageError, match=r"/dev/null cannot be read: .*\."):
        read_checkpoint("/dev/null")
    path.write_bytes(b"hello")
    with pytest.raises(UsageError, match="not a safetensors file, or is damaged"):
        read_checkpoint(path)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(UsageError, match="it has no record of how it was made"):
        read_checkpoint(path)
    trainer(path.with_name("d.safetensors"), cache).run()
    data = path.with_name("d.safetensors").read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UsageError, match="damaged"):
        read_checkpoint(path)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    tensors = load_file(path.with_name("d.safetensors"))
    for wrong, message in (
        ({**tensors, "model.mlp.head.bias": torch.zeros(3)}, r"model|mlp\.head\.bias is \(3,\) and should be \(4,\)"),
        ({**tensors, "model.mlp.head.bias": torch.full((4,), torch.nan)}, "not finite. Restore it, or train"),
        ({**tensors, "model.mlp.head.bias": torch.zeros(4, dtype=torch.int32)}, "holds whole numbers"),
    ):
        save_file(wrong, path, metadata=header["__metadata__"])
        with pytest.raises(UsageError, match=message):
            read_checkpoint(path)
    record = json.loads(header["__metadata__"]["apm"])
    save_file(tensors, path, metadata={"apm": json.dumps({**record, "format": 99})})
    with pytest.raises(UsageError, match="has format 99"):
        read_checkpoint(path)


def test_damaged_metadata_is_one_line_of_error(cache: GridCache, tmp_path: Path) -> None:
    path, wrong = tmp_path / "c.safetensors", tmp_path / "wrong.safetensors"
    trainer(path, cache).run()
    data = path.read_bytes()
    record = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["apm"])
    tensors = load_file(path)
    values = (None, [], {}, "x\x1b[2J", -1, 1.5, 10**400, True)
    sizes = ("dim", "image_size", "patch_size", "position_dim", "hidden", "init_std", "readout")
    damaged = [{**record, name: value} for name in ("student", "settings", "step", "finished") for value in values]
    damaged += [{**record, "student": {**record["student"], name: value}} for name in sizes for value in values]
    damaged += [{**record, "student": {**record["student"], "hidden": [1, 2.5, 3]}}, {**record, "student": {"x": 1}}]
    texts = [json.dumps(one) for one in damaged] + ["{", "[" * 100_000, "[]", "7", '{"format": NaN}', "null"]
    refused = 0
    for text in texts:
        save_file(tensors, wrong, metadata={"apm": text})
        try:
            read_checkpoint(wrong)
        except UsageError as error:
            assert str(error).startswith(str(wrong)) and str(error).isprintable() and len(str(error)) < 500, error
            refused += 1
    assert refused > 80 and refused >= len(texts) - 5  # any plain settings will do, and finished is true


def test_a_loss_that_is_not_finite_stops_it_and_leaves_the_checkpoint(cache: GridCache, tmp_path: Path) -> None:
    mine = trainer(tmp_path / "c.safetensors", cache)
    mine.advance()
    mine.save()
    with torch.no_grad():
        mine.model.mlp.head.bias.fill_(torch.inf)
    with pytest.raises(ApmError, match="Step 2: the loss or its gradient is not finite"):
        mine.advance()
    assert read_checkpoint(mine.path).step == 1


@pytest.mark.parametrize(
    "values",
    [{"steps": 0}, {"batch_size": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"held_out": 0.0}, {"held_out": 1.0},
     {"rgb_weight": -1.0}, {"locations": 0}, {"clip": 0.0}, {"warmup": -1}, {"weight_decay": float("inf")}],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"must be|above 0"):
        PretrainConfig(**values)  # type: ignore[arg-type]


def test_a_teacher_of_another_width_is_refused(cache: GridCache, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="grid has width 4, but the student's dim is 8"):
        Pretrainer(tmp_path / "c", cache, replace(STUDENT, dim=8), TRAINING, data=DATA)


def test_half_weights_are_read_as_float32(cache: GridCache, tmp_path: Path) -> None:
    from apm.pretrain.checkpoint import write_checkpoint

    path = tmp_path / "c.safetensors"
    trainer(path, cache).run()
    made = read_checkpoint(path)
    weights = {name: weight.half() for name, weight in made.weights.items()}
    write_checkpoint(tmp_path / "half.safetensors", replace(made, weights=weights))
    whole, half = Student.load(path), Student.load(tmp_path / "half.safetensors")
    column = whole.columns(student_input(picture(1), 16)[None])
    rows, cols = grid_locations(4)
    assert half.model.mlp.head.weight.dtype == torch.float32
    torch.testing.assert_close(half.field(column, rows, cols), whole.field(column, rows, cols), rtol=1e-2, atol=1e-3)
