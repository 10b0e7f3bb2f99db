"""Counts from shapes against real modules, torch's counter, and the buffers that an engine really holds."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
import typer
from typer.testing import CliRunner

import apm.classifier
import apm.cli
import apm.teachers
from apm.benchmarks.speed import profile as counts
from apm.benchmarks.speed.options import TINY, images_and_targets, loaded_engine
from apm.benchmarks.speed.published_loop import PublishedLoop
from apm.cli.profile import profile as command
from apm.student.config import APMConfig
from apm.student.model import APM, parameter_shapes
from tests.fakes import FakeTeacher

CPU = torch.device("cpu")


@pytest.mark.parametrize("preset", ["paper", "small"])
@pytest.mark.parametrize("readout", ["query", "mean"])
def test_parameters(preset: str, readout: str) -> None:
    config = APMConfig.preset(preset, dim=768, readout=readout)  # type: ignore[arg-type]
    sizes = {name: torch.Size(shape).numel() for name, shape in parameter_shapes(config).items()}
    assert sum(counts.student_parameters(config).values()) == sum(sizes.values())
    colours = sum(size for name, size in sizes.items() if name.startswith("rgb_head."))
    assert counts.trained_parameters(config) == sum(sizes.values()) - colours


def test_the_numbers_of_the_paper() -> None:
    config = APMConfig.preset("paper", dim=768)
    assert sum(counts.student_parameters(config).values()) == pytest.approx(22.8e6, rel=2e-3)
    assert counts.middle_flops(config) == pytest.approx(64.4e9, rel=1e-3)
    assert counts.published_flops(config) == pytest.approx(1040e9, rel=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("readout", ["query", "mean"])
def test_a_student_confirmed_by_a_real_one(precision: str, readout: str) -> None:
    config = replace(APMConfig.preset("small", dim=64, readout=readout), image_size=112)  # type: ignore[arg-type]
    profile = counts.profile_student(config, precision=precision)
    assert sum(profile.parameters.values()) == profile.counted_parameters
    assert profile.middle < profile.step < profile.plain < profile.published
    # vectors and alignment are left out; the rounding buffer of the bf16 gradients is not
    assert sum(profile.memory.values()) == pytest.approx(profile.counted_memory, rel=0.01)


def test_memory_of_a_batch() -> None:
    config = APMConfig.preset("small", dim=64)
    engine = loaded_engine(config, "bf16", CPU, batch=3)
    assert sum(counts.engine_bytes(config, "bf16", 3).values()) == pytest.approx(counts.held_bytes(engine), rel=0.01)


@pytest.mark.parametrize("readout", ["query", "mean"])
def test_operations_without_numbers_are_those_of_real_steps(readout: Literal["query", "mean"]) -> None:
    config = replace(TINY, readout=readout)
    for queries in (None, 5):
        engine = loaded_engine(config, "bf16", CPU, batch=2, queries=queries)
        assert counts.measured_flops(engine.step) == 2 * counts.step_flops(config, queries)
    image, target = images_and_targets(config, 1, CPU)
    model, loop = APM(config), PublishedLoop(config, image, target)
    # fused attention computes its scores again on the way back: 2 N D more
    again = (0, 2 * config.cells * config.dim) if readout == "query" else (0,)
    plain = counts.measured_flops(lambda: F.mse_loss(model(image), target).backward())
    assert plain - counts.plain_flops(config) in again
    assert counts.measured_flops(loop.step) - counts.published_flops(config) in [8 * more for more in again]


def test_operations_of_the_plain_form_and_of_the_published_loop() -> None:
    """By hand: forward, and twice as much backward where inputs need a gradient."""
    c = APMConfig.preset("small", dim=64)
    n, (h1, h2, h3), width = c.cells, c.hidden, c.cells + c.position_dim
    products = n * (width * h1 + h1 * h2 + h2 * h3 + h3 * c.dim)  # the coordinate MLP
    readout = 2 * c.dim**2 + 2 * n * c.dim**2 + 2 * n * c.dim  # query and output; keys and values; attention
    column = 3 * c.patch_size**2 * n
    plain = 3 * 2 * (products + readout) + 2 * 2 * column
    rgb = n * c.rgb_hidden * (c.dim + width + c.rgb_hidden + 3)
    assert counts.plain_flops(c) == plain
    assert counts.published_flops(c) == 8 * (plain + 3 * 2 * rgb)


def test_a_teacher_that_is_a_module_and_one_that_is_not() -> None:
    fake = FakeTeacher()
    profile = counts.profile_teacher(fake)
    assert (profile.image_parameters, profile.text_parameters) == (None, None)
    assert (profile.name, profile.dim) == ("fake", 16)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = torch.nn.Linear(8, 4, bias=False)
            self.text = torch.nn.Linear(3, 2, bias=False)

    class Towers(FakeTeacher):
        model = Model()

        def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.model.visual(torch.ones(len(pixels), 8))

    profile = counts.profile_teacher(Towers())
    assert (profile.image_parameters, profile.text_parameters) == (32, 6)
    assert profile.image_flops == 2 * 8 * 4


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apm.teachers, "load_teacher", lambda *_, **__: FakeTeacher(dim=32))
    app = typer.Typer()
    app.command()(command)
    arguments = ["--preset", "small", "--teacher", "fake", "--precision", "fp32", "--device", "cpu"]
    done = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    record: dict[str, Any] = json.loads(done.stdout)
    assert record["student"]["config"]["dim"] == record["teacher"]["dim"] == 32
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    for text in ("counted by torch", "really held", "image tower", f"{record['student']['counted_parameters']:,}"):
        assert text in done.stdout


@pytest.mark.parametrize("arguments", [["--dim", "0"], ["--preset", "papre"], ["--precision", "fp16"]])
def test_wrong_usage_is_told_before_anything_slow(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apm.teachers, "load_teacher", None)
    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, ["--teacher", "embedded", *arguments])
    assert isinstance(done.exception, apm.errors.UsageError)


def test_the_tiny_student_has_all_parts() -> None:
    assert all(counts.student_parameters(TINY).values())
