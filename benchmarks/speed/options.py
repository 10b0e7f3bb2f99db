"""What every measurement is told, and what it works on."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from apm.student.config import APMConfig
from apm.student.engine import Engine
from apm.student.matmul import measured_precision
from apm.student.model import APM, draw_parameters

DIM = 512
"""D, the token's width, where no teacher gives it."""
TINY = APMConfig(
    dim=32, image_size=32, patch_size=8, position_dim=16, hidden=(32, 16, 16), heads=4, rgb_hidden=8, init_std=0.1
)
"""The student of ``--quick``: large enough to run every line, too small for any number to mean something."""

Record = dict[str, Any]
Products = Literal["fp32", "bf16"]


class Options(Namespace):
    """Size, device and repetitions, which all measurements are told; beside them a kind's own arguments."""

    preset: str = "paper"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: torch.device = torch.device("cpu")
    rounds: int = 9
    quick: bool = False

    def but(self, **changes: Any) -> Options:
        """The same with other values."""
        return Options(**{**vars(self), **changes})

    def some(self, values: Sequence[int]) -> Sequence[int]:
        """Points of a sweep: all of them, or two if it is to be quick."""
        return values[:2] if self.quick else values

    @property
    def config(self) -> APMConfig:
        return TINY if self.quick else APMConfig.preset(self.preset, dim=DIM)

    @property
    def of_commands(self) -> str:
        """The preset that `apm`'s commands are told, which have no tiny one."""
        return "small" if self.quick else self.preset

    @property
    def shown_preset(self) -> str:
        return "tiny" if self.quick else self.preset

    @property
    def chosen_precision(self) -> Products:
        """Of the products: the one asked for, else the one that is faster on the device."""
        return measured_precision(self.device) if self.precision == "auto" else self.precision

    def found(self, rows: Sequence[Record], summary: Mapping[str, Any] | None = None, **more: Any) -> Record:
        """What was measured under which settings (``more`` among them), as a record has it."""
        student = {**asdict(self.config), "hidden": list(self.config.hidden)}
        settings = {"preset": self.shown_preset, "student": student, "rounds": self.rounds, **more}
        return {"settings": settings, "summary": dict(summary or {}), "rows": list(rows)}


def images_and_targets(config: APMConfig, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Noise of the right shape and size: images (B, 3, S, S) and targets (B, D). Times do not depend on content."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((count, 3, config.image_size, config.image_size), dtype=np.float32)
    targets = 0.4 * rng.standard_normal((count, config.dim), dtype=np.float32)
    return torch.from_numpy(images).to(device), torch.from_numpy(targets).to(device)


def loaded_engine(
    config: APMConfig, precision: Products, device: torch.device, *, batch: int = 1, queries: int | None = None
) -> Engine:
    """An engine with images and targets in it, ready to step."""
    initial = draw_parameters(config, np.random.Generator(np.random.PCG64(0)))
    engine = Engine(config, initial, batch=batch, precision=precision, queries=queries, device=device)
    engine.load(*images_and_targets(config, batch, device))
    return engine


def plain_step(
    config: APMConfig, device: torch.device, rows: Tensor | None = None, cols: Tensor | None = None
) -> Callable[[], object]:
    """One step of the plain form with autograd and torch's Adam, at these locations or all."""
    image, target = images_and_targets(config, 1, device)
    model = APM(config).to(device)
    adam = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step() -> None:
        adam.zero_grad()
        F.mse_loss(model(image, rows, cols), target).backward()
        adam.step()

    return step
