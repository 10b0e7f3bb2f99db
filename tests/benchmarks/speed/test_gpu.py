"""`make gpu` without a GPU: all of its code on a CPU, and the engine on tensors that only pretend to be a GPU's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from apm.benchmarks.speed import __main__ as command
from apm.benchmarks.speed import gpu, gpu_checks
from apm.benchmarks.speed.gpu_checks import Case, run_checks
from apm.benchmarks.speed.options import TINY
from apm.student.cells import Cells
from apm.student.config import APMConfig
from apm.student.engine import Engine
from apm.student.model import draw_parameters
from apm.test_time.options import AdaptConfig
from apm.test_time.trainer import TestTimeTrainer
from tests.counters import Operations

CPU = torch.device("cpu")
both = pytest.mark.parametrize("precision", ["fp32", "bf16"])
Precision = Literal["fp32", "bf16"]


# -- the engine on a GPU that is not there


class Placement(Operations):
    """Notes every operation that touches a tensor of the CPU, or draws random numbers."""

    def __init__(self) -> None:
        super().__init__(self.note)
        self.calls, self.astray = 0, list[str]()

    def note(self, func: Any, taken: list[torch.Tensor], made: list[torch.Tensor]) -> None:
        self.calls += 1
        if torch.Tag.nondeterministic_seeded in func.tags:  # a graph would need to be told of the generator
            self.astray.append(f"{func} draws random numbers")
        if any(value.device.type != "cuda" for value in (*taken, *made)):
            self.astray.append(f"{func} {[(tuple(value.shape), str(value.device)) for value in (*taken, *made)]}")


OPTIONS: list[dict[str, Any]] = [
    {},
    {"queries": 7},
    {"tolerance": 1e-3, "loss": "cosine"},
    {"distil": "both", "rgb_weight": 0.5, "queries": 5},
    {"distil": "both", "view_cells": 6},
    {"guide": "rgb", "queries": 5},
    {"distil": "both", "agree": 0.5},
    {"loss": "soft", "temperature": 2.0, "texts": 7},
]


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
@pytest.mark.parametrize("readout", ["query", "mean"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_on_a_gpu_touches_nothing_of_the_cpu(
    precision: Precision, readout: Literal["query", "mean"], options: dict[str, Any]
) -> None:
    """What is captured must be on the GPU, of fixed shapes, and never ask for a value (a fake tensor has none)."""
    config = replace(TINY, readout=readout, guide=options.get("guide", "none"))
    initial = draw_parameters(config, np.random.Generator(np.random.PCG64(0)))
    options = {name: value for name, value in options.items() if name != "guide"}
    with FakeTensorMode(allow_non_fake_inputs=True):
        engine = Engine(config, initial, batch=3, precision=precision, device="cuda", **options)
        side = config.image_size
        grids: torch.Tensor | Cells | None = None
        if count := options.get("view_cells"):
            grids = Cells(torch.ones(3, count, config.cells) / config.cells, torch.zeros(3, count, config.dim))
        elif options.get("distil") == "both":
            grids = torch.zeros(3, config.cells, config.dim)
        text = torch.ones(count, config.dim) if (count := options.get("texts")) else None
        engine.load(torch.zeros(3, 3, side, side), torch.zeros(3, config.dim), grids, text)
        held = {name: value.device.type for name, value in _tensors(engine).items()}
        assert len(held) > 40 and set(held.values()) == {"cuda"}, held
        drawn = engine._draw(1)
        assert drawn is None or drawn.device.type == "cuda"
        with Placement() as placement:
            if drawn is not None:
                engine._read.take(engine._all, drawn[0])
            engine.step()
            engine.evaluate()
            engine.reset()
    assert placement.calls > 100
    assert placement.astray == []


@pytest.mark.slow
@both
def test_the_trainer_brings_its_answers_back(precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images and targets on the CPU, students on a GPU: shapes and devices of all that `adapt` returns."""
    monkeypatch.setattr(Engine, "advance", Engine.step)  # a graph needs a real GPU
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    count, steps = 5, 3
    adapt = AdaptConfig(steps=steps, precision=precision, queries=5, distil="both", rgb_weight=0.1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        trainer = TestTimeTrainer(TINY, adapt, device="cuda", batch_size=2)
        result = trainer.adapt(
            torch.zeros(count, 3, TINY.image_size, TINY.image_size),
            torch.zeros(count, TINY.dim),
            grids=torch.zeros(count, TINY.cells, TINY.dim),
            keep_field=True,
            record_tokens=True,
            snapshots=(0, steps),
        )
        made = {name: value for name, value in vars(result).items() if isinstance(value, torch.Tensor)}
        made |= {f"field {step}": value for step, value in result.fields.items()}
        made |= {"features": result.features([0.0, 1.5], [1.0, 2.5]), "attention": result.attention([0.0], [1.0])}
        assert {name: value.device.type for name, value in made.items()} == dict.fromkeys(made, "cpu")
        assert len(made) == 12 and {len(value) for value in made.values()} == {count}
        assert result.folded is not None and result.folded.columns.device.type == "cuda"


def test_the_placement_test_would_see_a_tensor_left_behind() -> None:
    initial = draw_parameters(TINY, np.random.Generator(np.random.PCG64(0)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        engine = Engine(TINY, initial, device="cuda")
        engine._axis = engine._axis.cpu()
        with Placement() as placement, pytest.raises(RuntimeError, match="device"):
            engine.step()
            assert not placement.astray, "device"


def _tensors(thing: Any, name: str = "engine") -> dict[str, torch.Tensor]:
    """All tensors that an engine holds, also inside of what it holds."""
    found = {}
    for key, value in vars(thing).items():
        if isinstance(value, torch.Tensor):
            found[f"{name}.{key}"] = value
        elif isinstance(value, dict):
            found.update({f"{name}.{key}.{k}": v for k, v in value.items() if isinstance(v, torch.Tensor)})
        elif (
            hasattr(value, "__dict__")
            and type(value).__module__.startswith("apm.")
            and not isinstance(value, APMConfig)
        ):
            found.update(_tensors(value, f"{name}.{key}"))
    return found


# -- the checks


@pytest.mark.slow
@both
def test_every_check_holds_on_a_cpu(precision: Precision) -> None:
    rows = run_checks(Case(TINY, precision, CPU, steps=6))
    assert [row["name"] for row in rows if not row["held"]] == []
    assert len(rows) == 15 and all(row["error"] is None for row in rows)


def _slower(engine: Engine) -> None:
    engine.rows.lr *= 0.7


def _unbiased(engine: Engine) -> None:
    engine.weights["mlp.layer3.bias"].zero_()


WRONG: dict[str, tuple[Callable[[Engine], None], str]] = {
    "rate": (_slower, "token after the steps, against the plain form"),
    "bias": (_unbiased, "token, against the plain form"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", WRONG)
def test_the_checks_see_a_wrong_engine(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil, seen = WRONG[fault]
    made = Engine.__init__

    def wrong(self: Engine, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        spoil(self)

    monkeypatch.setattr(Engine, "__init__", wrong)
    rows = {row["name"]: row for row in run_checks(Case(TINY, "fp32", CPU, steps=6))}
    assert not rows[seen]["held"]


@pytest.mark.slow
def test_the_checks_see_moments_that_survive_and_a_graph_that_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reset = Engine.reset

    def forgetful(self: Engine) -> None:
        first = getattr(self, "_kept", None)
        reset(self)
        if first is not None:
            self.rows.first_moment.fill_(1e-3)
        self._kept = True  # type: ignore[attr-defined]

    monkeypatch.setattr(Engine, "reset", forgetful)
    monkeypatch.setattr(Engine, "advance", lambda self: self.evaluate(everywhere=False))
    rows = {row["name"]: row for row in run_checks(Case(TINY, "fp32", CPU, steps=6))}
    broken = rows["the graph against eager steps"]  # it breaks, is told, and does not hide the others
    assert not broken["held"] and "the steps changed nothing" in broken["error"]
    monkeypatch.undo()
    monkeypatch.setattr(Engine, "reset", forgetful)
    rows = {row["name"]: row for row in run_checks(Case(TINY, "fp32", CPU, steps=6))}
    assert not rows["token after a reset"]["held"]


# -- the command


@pytest.fixture
def quiet_commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Answer for the processes that would be started; returns what they were asked."""
    asked: list[list[str]] = []

    def run(arguments: list[str], *, timeout: float, **_: Any) -> Any:
        asked.append(list(arguments[1:]))
        assert 1 < timeout <= gpu.BUDGET
        out = json.dumps({"top": [{"label": "cat"}]}) if "classify" in arguments else "3 passed in 1 s"
        return gpu.subprocess.CompletedProcess(arguments, 0, out, "")

    class Warm:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def __call__(self, _: Path) -> Any:
            return type("Answer", (), {"top": [type("Label", (), {"label": "cat"})]})

    monkeypatch.setattr(gpu, "run_apart", run)
    monkeypatch.setattr(gpu, "Classifier", Warm)
    return asked


ON_A_CPU = ("--quick", "--device", "cpu", "--precision", "fp32")


@pytest.mark.slow
def test_all_parts_on_a_cpu(
    tmp_path: Path,
    quiet_commands: list[list[str]],
    picture: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu, "has_tests", lambda _: True)
    where = ["--out", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")]
    assert command.main(["gpu", *ON_A_CPU, "--rounds", "2", "--photograph", str(picture), *where]) == 0
    (path,) = (tmp_path / "results").iterdir()
    made = json.loads(path.read_text(encoding="utf-8"))
    assert path.name.startswith("gpu-tiny-") and gpu.failures(made) == []
    parts = [row["part"] for row in made["rows"]]
    assert list(dict.fromkeys(parts)) == ["tests", "check", "speed", "classify", "bench"]
    assert made["summary"]["checks"] == made["summary"]["checks_held"] == 30
    sweeps = [(row["sweep"], row["batch"], row["steps"], row["queries"]) for row in made["rows"] if row.get("sweep")]
    assert sweeps == [
        ("batch", 1, 2, 16),
        ("batch", 2, 2, 16),
        ("steps", 2, 1, 16),
        ("steps", 2, 5, 16),
        ("queries", 2, 2, 2),
        ("precision", 2, 2, 16),
    ]
    rows = [row for row in made["rows"] if row.get("sweep")]
    assert rows[-2]["floor"]["compute"] == pytest.approx(rows[0]["floor"]["compute"] / 8)
    assert [row["precision"] for row in rows] == ["fp32"] * 5 + ["bf16"]
    assert [arguments[1] for arguments in quiet_commands] == ["pytest", "apm", *["torch.distributed.run"] * 2]
    screen = capsys.readouterr().out
    assert "30 of 30 checks hold" in screen and "not reached" in screen and len(screen.splitlines()) <= 40
    page = (tmp_path / "docs" / "speed-gpu.md").read_text(encoding="utf-8")
    assert page.count("| yes |") == 30 and "apm bench under torchrun" in page and path.name in page


@pytest.mark.slow
def test_what_fails_is_told_and_hides_nothing(
    quiet_commands: list[list[str]], picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory for this")
        yield

    monkeypatch.setitem(gpu.PARTS, "speed", broken)
    monkeypatch.setattr(gpu_checks, "LIMITS", {name: dict.fromkeys(of, 0.0) for name, of in gpu_checks.LIMITS.items()})
    given = gpu.gpu.read([*ON_A_CPU, "--rounds", "1", "--photograph", str(picture)])
    made = gpu.gpu.measured(given)
    missed = gpu.failures(made)
    assert any("no memory for this" in line for line in missed) and any("exceeds 0.0" in line for line in missed)
    assert {"classify", "bench"} <= {row["part"] for row in made["rows"]}
    assert "| speed: OutOfMemoryError: no memory for this |" in gpu.gpu.table(made)
    assert "**no**" in gpu.page([{**made, "file": "x.json"}])
    monkeypatch.setattr(gpu, "BUDGET", 0.0)
    made = gpu.gpu.measure(given)
    assert all("no time left" in line for line in gpu.failures(made)) and len(gpu.failures(made)) == 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_command_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["gpu", "--out", str(tmp_path), "--docs", str(tmp_path)]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_check_that_does_not_hold_is_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"part": "check", "name": "token", "precision": "fp32", "distance": 1.0, "limit": 0.1, "held": False}
    monkeypatch.setattr(gpu, "PARTS", {"check": lambda *_: [{**row, "hidden": 8, "error": None}]})
    where = ["--out", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")]
    assert command.main(["gpu", *ON_A_CPU, *where]) == 1
    assert "**no**" in (tmp_path / "docs" / "speed-gpu.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_commands_of_make_gpu_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("check", "speed"):  # what starts no process is in the tests above
        monkeypatch.setitem(gpu.PARTS, part, lambda *_: ())
    results = tmp_path / "results"
    assert command.main(["gpu", *ON_A_CPU, "--out", str(results), "--docs", str(tmp_path / "docs")]) == 0
    (path,) = results.iterdir()
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [row["part"] for row in rows] == ["classify"] * 2 + ["bench"] * 2
    assert all(row.get("seconds") or row["wall_seconds"] for row in rows) and not any(row.get("error") for row in rows)
    assert (tmp_path / "docs" / "speed-gpu.md").is_file()
