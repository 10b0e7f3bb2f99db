"""Test-time training: what it answers does not depend on company or order, nothing is kept, no label gets in."""

import dataclasses
import inspect
import logging
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import apm.student.engine
import apm.student.model
import apm.test_time.trainer
from apm.errors import ApmError, UsageError
from apm.student import matmul as precision
from apm.student.config import APMConfig
from apm.student.engine import Engine
from apm.student.model import APM
from apm.test_time.options import AdaptConfig
from apm.test_time.trainer import AdaptResult, TestTimeTrainer
from apm.text.zeroshot import ZeroShotHead

MODEL = APMConfig(
    dim=24, image_size=24, patch_size=3, position_dim=32, hidden=(96, 64, 48), heads=4, rgb_hidden=4, init_std=0.1
)
ADAPT = AdaptConfig(steps=8, lr=1e-3, precision="fp32")


def batch(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, MODEL.image_size, MODEL.image_size, generator=generator)
    return images, torch.randn(count, MODEL.dim, generator=generator)


def head(labels: int, seed: int = 0) -> ZeroShotHead:
    features = torch.randn(labels, MODEL.dim, generator=torch.Generator().manual_seed(seed))
    return ZeroShotHead(
        tuple(map(str, range(labels))), torch.nn.functional.normalize(features, dim=1), logit_scale=30.0
    )


def same(a: AdaptResult, b: AdaptResult, pick: Tensor | slice = slice(None)) -> None:
    """All of ``a`` is, bit by bit, what ``b`` holds at ``pick``."""
    for name in ("tokens", "losses", "cosines", "final_losses", "final_cosines", "steps", "finite", "step_tokens"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            assert torch.equal(x.nan_to_num(9e9), y[pick].nan_to_num(9e9)), name


@pytest.mark.parametrize(
    "changes",
    [{}, {"precision": "bf16"}, {"loss": "cosine"}, {"loss": "soft"}, {"tolerance": 0.7}, {"queries": 9}],
    ids=["fp32", "bf16", "cosine", "soft", "tolerance", "queries"],
)
def test_the_answer_is_the_same_alone_in_a_batch_and_in_reversed_order(changes: dict[str, object]) -> None:
    config = dataclasses.replace(ADAPT, **changes)  # type: ignore[arg-type]
    images, targets = batch(7)
    told: dict[str, Any] = {"head": head(11), "record_tokens": True}
    parts = {i: slice(i, i + 1) for i in (0, 3, 6)}
    alone = {i: TestTimeTrainer(MODEL, config).adapt(images[part], targets[part], **told) for i, part in parts.items()}
    for batch_size in (None, 3, 7):
        trainer = TestTimeTrainer(MODEL, config, batch_size=batch_size)
        together = trainer.adapt(images, targets, **told)
        assert together.finite.all()
        same(trainer.adapt(images.flip(0), targets.flip(0), **told), together, torch.arange(6, -1, -1))
        for i, part in parts.items():
            same(alone[i], together, part)
        if "tolerance" in changes:
            assert together.steps.min() < together.steps.max()  # else it would show nothing


def test_softened_targets_are_met_and_leave_free_what_no_label_asks_for() -> None:
    images, targets = batch(2)
    labels = head(5)
    results = {}
    for loss in ("mse", "soft"):
        config = dataclasses.replace(ADAPT, steps=100, loss=loss)
        results[loss] = TestTimeTrainer(MODEL, config).adapt(images, targets, head=labels)
    said, wanted = labels.probabilities(results["soft"].tokens), labels.probabilities(targets)
    assert float((said - wanted).abs().max()) < 0.01 < 0.4 < float((said - 1 / 5).abs().max())
    assert results["soft"].final_losses.max() < 1e-3
    assert results["soft"].final_cosines.max() < 0.9 < 0.95 < results["mse"].final_cosines.min()


def test_softened_targets_are_of_the_labels_of_each_call() -> None:
    images, targets = batch(2)
    config = dataclasses.replace(ADAPT, loss="soft", temperature=2.0)
    used = TestTimeTrainer(MODEL, config, batch_size=2)
    for labels in (head(5), head(5, seed=1), head(40)):
        found = used.adapt(images, targets, head=labels)
        same(found, TestTimeTrainer(MODEL, config, batch_size=2).adapt(images, targets, head=labels))
    with pytest.raises(UsageError, match="there are no labels: give adapt a head"):
        used.adapt(images, targets)
    narrow = ZeroShotHead(("a", "b"), torch.eye(2), 1.0)
    with pytest.raises(UsageError, match="have width 2, the targets 24"):
        used.adapt(images, targets, head=narrow)
    targets[0, 3] = torch.nan
    assert used.adapt(images, targets, head=head(5)).finite.tolist() == [False, True]


def test_a_second_call_knows_nothing_of_the_first() -> None:
    trainer = TestTimeTrainer(MODEL, ADAPT)
    images, targets = batch(2)
    first = trainer.adapt(images, targets)
    trainer.adapt(*batch(3, seed=1))
    same(trainer.adapt(images, targets), first)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("method", ["evaluate", "backward", "update"])
def test_a_failure_half_way_leaves_nothing_behind(
    method: str, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, targets = batch(3)
    trainer = TestTimeTrainer(MODEL, ADAPT, batch_size=batch_size)
    original, calls = getattr(Engine, method), []

    def fail(self: Engine, **options: bool) -> None:
        calls.append(method)
        if len(calls) == 5:
            raise ValueError("half way")
        original(self, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, method, fail)
        with pytest.raises(ValueError, match="half way"):
            trainer.adapt(*batch(3, seed=1))
    fresh = TestTimeTrainer(MODEL, ADAPT, batch_size=batch_size)
    same(trainer.adapt(images, targets), fresh.adapt(images, targets))


def test_an_image_that_is_not_finite_is_flagged_and_hurts_no_other() -> None:
    images, targets = batch(5)
    clean = TestTimeTrainer(MODEL, ADAPT).adapt(images, targets)
    targets[1, 3] = float("nan")
    targets[2] = 1e30  # finite, but its square is not
    images[3, 0, 5, 5] = float("inf")
    for batch_size in (1, 5):
        result = TestTimeTrainer(MODEL, ADAPT, batch_size=batch_size).adapt(images, targets, keep_field=True)
        assert result.finite.tolist() == [True, False, False, False, True]
        good = [0, 4]
        assert torch.equal(result.tokens[good], clean.tokens[good])
        assert torch.equal(result.losses[good], clean.losses[good])
        assert result.tokens[1:4].isnan().all() and result.final_losses[1:4].isnan().all()
        assert result.steps.tolist() == [8, 0, 0, 0, 8]
        features = result.features([0], [0])
        assert features[good].isfinite().all() and features[1:4].isnan().all()


def test_the_result_tells_what_happened() -> None:
    images, targets = batch(3)
    result = TestTimeTrainer(MODEL, ADAPT).adapt(images, targets, record_tokens=True)
    assert result.tokens.shape == (3, 24) and result.losses.shape == result.cosines.shape == (3, 8)
    assert result.step_tokens is not None and result.step_tokens.shape == (3, 9, 24)
    assert torch.equal(result.step_tokens[:, -1], result.tokens)
    torch.testing.assert_close(result.losses, (result.step_tokens[:, :-1] - targets[:, None]).square().mean(dim=2))
    torch.testing.assert_close(result.final_losses, (result.tokens - targets).square().mean(dim=1))
    torch.testing.assert_close(result.final_cosines, torch.cosine_similarity(result.tokens, targets))
    assert (result.final_losses < result.losses[:, 0]).all()
    assert result.steps.tolist() == [8] * 3 and result.steps.dtype == torch.int64
    assert result.seconds > 0 and result.precision == "fp32"
    assert TestTimeTrainer(MODEL, ADAPT).adapt(images, targets).step_tokens is None


def test_it_converges_to_its_target() -> None:
    images, targets = batch(2)
    config = AdaptConfig(steps=400, lr=1e-3, precision="fp32", tolerance=1e-4)
    result = TestTimeTrainer(MODEL, config).adapt(images, targets)
    assert (result.final_losses <= 1e-4).all() and (result.steps < 400).all()
    assert (result.final_cosines > 0.9999).all()


@pytest.mark.parametrize("readout", ["query", "mean"])
def test_features_are_the_plain_forms_after_the_same_steps(readout: str) -> None:
    config = dataclasses.replace(MODEL, readout=readout)
    images, targets = batch(2)
    result = TestTimeTrainer(config, ADAPT).adapt(images, targets, keep_field=True)
    rows, cols = [0, 7, 3.5, 2], [5, 0, 1, 2.25]
    model = APM(config, seed=ADAPT.seed)
    adam = torch.optim.Adam(model.parameters(), lr=ADAPT.lr)
    for _ in range(ADAPT.steps):
        adam.zero_grad()
        (model(images[1:]) - targets[1:]).square().mean().backward()
        adam.step()
    with torch.no_grad():
        expected = model.field(images[1:], rows, cols)
    torch.testing.assert_close(result.features(rows, cols)[1:], expected, rtol=1e-4, atol=1e-5)
    many = torch.rand(5000, dtype=torch.float64) * 7  # more than are answered at a time
    torch.testing.assert_close(
        result.features(many, many)[:, 4500:4501], result.features(many[4500:4501], many[4500:4501])
    )
    with pytest.raises(UsageError, match="4 rows and 3 columns"):
        result.features(rows, cols[:3])


def test_features_of_a_student_not_kept() -> None:
    result = TestTimeTrainer(MODEL, ADAPT).adapt(*batch(1))
    with pytest.raises(UsageError, match="keep_field=True"):
        result.features([0], [0])


def test_the_seed_alone_decides_the_start() -> None:
    images, targets = batch(1)
    tokens = [
        TestTimeTrainer(MODEL, dataclasses.replace(ADAPT, seed=seed)).adapt(images, targets).tokens
        for seed in (0, 0, 1)
    ]
    assert torch.equal(tokens[0], tokens[1]) and not torch.equal(tokens[0], tokens[2])
    torch.manual_seed(99)  # torch's own generator has no part in it
    assert torch.equal(TestTimeTrainer(MODEL, ADAPT).adapt(images, targets).tokens, tokens[0])


def test_inputs_are_left_as_they_are() -> None:
    images, targets = batch(3)
    copies = images.clone(), targets.clone()
    targets.requires_grad_()
    result = TestTimeTrainer(MODEL, ADAPT).adapt(images, targets)
    assert torch.equal(images, copies[0]) and torch.equal(targets, copies[1]) and targets.grad is None
    assert not result.tokens.requires_grad


def test_shapes_that_do_not_fit_are_named() -> None:
    trainer = TestTimeTrainer(MODEL, ADAPT)
    images, targets = batch(2)
    with pytest.raises(UsageError, match=r"\(B, 3, 24, 24\).*\(2, 3, 20, 24\)"):
        trainer.adapt(images[:, :, :20], targets)
    with pytest.raises(UsageError, match=r"\(2, 24\).*\(2, 23\)"):
        trainer.adapt(images, targets[:, :23])
    with pytest.raises(UsageError, match="at least 1"):
        trainer.adapt(images[:0], targets[:0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "useless"),
        ({"lr": -1e-4}, r"-0\.0001"),
        ({"lr": float("nan")}, "nan"),
        ({"loss": "msee"}, 'Did you mean "mse"'),
        ({"precision": "fp16"}, "bf16"),
        ({"seed": -1}, "-1"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"queries": 0}, "queries"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        AdaptConfig(**changes)  # type: ignore[arg-type]


def test_more_queries_than_locations_are_refused() -> None:
    with pytest.raises(UsageError, match=r"64 locations.*65"):
        TestTimeTrainer(MODEL, dataclasses.replace(ADAPT, queries=65))
    with pytest.raises(UsageError, match="batch_size"):
        TestTimeTrainer(MODEL, ADAPT, batch_size=0)


def test_out_of_memory_halves_the_batch_and_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    images, targets = batch(7)
    expected = TestTimeTrainer(MODEL, ADAPT).adapt(images, targets)
    original, tried = Engine.run, []

    def run(self: Engine, *args: int, **options: bool) -> object:
        tried.append(self.batch)
        if self.batch > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return original(self, *args, **options)

    monkeypatch.setattr(Engine, "run", run)
    trainer = TestTimeTrainer(MODEL, ADAPT, batch_size=8)
    with caplog.at_level(logging.WARNING, logger="apm"):
        same(trainer.adapt(images, targets), expected)
        same(trainer.adapt(images, targets), expected)
    assert tried == [7, 3, 1, *[1] * 6, *[1] * 7]
    assert len(caplog.records) == 1 and "7 images" in caplog.text


def test_not_even_one_image_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Engine, *args: int, **options: bool) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Engine, "run", run)
    with pytest.raises(ApmError, match=r"GiB.*small"):
        TestTimeTrainer(MODEL, ADAPT).adapt(*batch(2))


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Engine, *args: int, **options: bool) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(Engine, "run", run)
    with pytest.raises(RuntimeError, match="something else"):
        TestTimeTrainer(MODEL, ADAPT, batch_size=4).adapt(*batch(4))


@pytest.mark.parametrize(("ratio", "expected"), [(2.0, "bf16"), (1.31, "bf16"), (1.29, "fp32"), (0.1, "fp32")])
def test_auto_precision_follows_the_measurement(ratio: float, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bf16_gain", lambda device: ratio)
    assert TestTimeTrainer(MODEL, dataclasses.replace(ADAPT, precision="auto")).precision == expected


@pytest.mark.parametrize(
    ("fp32", "bf16"),
    [(2e9, 2e9), (5e9, 0.2e9), (60e9, 0.2e9), (60e9, 1.5e9), (60e9, 59e9), (90e9, 700e9), (1e13, 1e14)],
)
def test_the_measurement_takes_a_moment_on_any_machine(
    fp32: float, bf16: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that only products move forward, by their operations at known rates (1.5 GFLOP/s: seen, emulated)."""
    now = 0.0

    def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
        nonlocal now
        now += 2 * out.numel() * a.shape[1] / (bf16 if a.dtype == torch.bfloat16 else fp32)

    monkeypatch.setattr(precision.time, "perf_counter", lambda: now)
    monkeypatch.setattr(precision.torch, "mm", multiply)
    assert precision.bf16_gain.__wrapped__(torch.device("cpu")) == pytest.approx(bf16 / fp32)
    assert 0 < now <= 0.2


def test_the_measurement_itself_runs_and_leaves_the_threads_as_they_were() -> None:
    threads = torch.get_num_threads()
    assert precision.bf16_gain(torch.device("cpu")) > 0
    assert torch.get_num_threads() == threads
    assert precision.bf16_gain(torch.device("cpu")) == precision.bf16_gain(torch.device("cpu"))  # once a process


def test_who_asks_for_the_slower_precision_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for gain, asked, told in ((0.004, "bf16", True), (1.1, "bf16", False), (0.004, "auto", False)):
        monkeypatch.setattr(precision, "bf16_gain", lambda device, gain=gain: gain)
        text = precision.slowness(asked, torch.device("cpu"))  # type: ignore[arg-type]
        assert (text is not None) == told


FORBIDDEN = ("label", "class", "truth", "correct", "answer", "category")


@pytest.mark.parametrize(
    "module", [apm.test_time.trainer, apm.student.engine, apm.student.model], ids=lambda module: module.__name__
)
def test_nothing_that_adapts_accepts_a_label(module: ModuleType) -> None:
    functions = []
    for name, thing in vars(module).items():
        if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(thing):
            functions.append((name, thing))
        elif inspect.isclass(thing):
            if "__init__" in vars(thing) or not issubclass(thing, torch.nn.Module):  # else torch's own
                functions.append((name, thing))
            functions += [
                (f"{name}.{key}", getattr(thing, key))
                for key, value in vars(thing).items()
                if not key.startswith("_") and callable(getattr(thing, key))
            ]
    assert len(functions) > 3
    for name, function in functions:
        for parameter in inspect.signature(function).parameters.values():
            assert not any(word in parameter.name.lower() for word in FORBIDDEN), f"{name}({parameter.name})"
            assert parameter.kind is not inspect.Parameter.VAR_KEYWORD, f"{name}(**{parameter.name})"
