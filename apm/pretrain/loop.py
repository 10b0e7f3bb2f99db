"""One network trained on many images, step by step: measurements, curves, checkpoints, exact resume."""

from __future__ import annotations

import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import filelock
import numpy as np
import torch
from torch import Tensor, nn

from apm.errors import ApmError, UsageError
from apm.images.files import write_atomically
from apm.images.paths import printable
from apm.pretrain.checkpoint import Checkpoint
from apm.pretrain.config import Schedule


class Processes(Protocol):
    """The processes that share a training; see `ALONE`."""

    @property
    def rank(self) -> int:
        """Number of this one, from 0."""

    @property
    def world(self) -> int:
        """How many there are."""

    def broadcast(self, value: Any) -> Any:
        """Give every process what the first one passes."""


@dataclass(frozen=True)
class _Alone:
    rank: int = 0
    world: int = 1

    def broadcast(self, value: Any) -> Any:
        return value


ALONE = _Alone()


class Trainer(ABC):
    """A network, its optimiser and its checkpoint. What it learns from, a subclass says.

    Attributes:
        path: the checkpoint.
        model: the network.
        step: optimiser steps made.
        log: file beside the checkpoint with one JSON line a measurement: the curves.
    """

    model: nn.Module

    def __init__(
        self, path: str | os.PathLike[str], model: nn.Module, config: Schedule, *, processes: Processes = ALONE
    ) -> None:
        self.path, self.model, self.schedule, self.processes = Path(path), model, config, processes
        self.log = self.path.with_name(self.path.name + ".log.jsonl")
        self.step = 0
        named = list(model.named_parameters())
        decayed = [p for name, p in named if p.ndim > 1 and "bias" not in name]
        others = [p for name, p in named if p.ndim <= 1 or "bias" in name]
        self.optimiser = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=config.lr,
        )

    @abstractmethod
    def _gradients(self) -> dict[str, float]:
        """Set the gradients of the next step; returns the losses before it."""

    @abstractmethod
    def _held_out(self) -> dict[str, float]:
        """Measure the held-out images."""

    @abstractmethod
    def _write(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Write the checkpoint."""

    @property
    def finished(self) -> bool:
        """Whether all steps are made."""
        return self.step >= self.schedule.steps

    def advance(self) -> dict[str, float]:
        """Make one step; returns what it measured: losses before the update, gradient norm, learning rate."""
        self.optimiser.zero_grad()
        losses = self._gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.schedule.clip)
        rate = self.schedule.learning_rate(self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        if not math.isfinite(sum(losses.values()) + norm.item()):
            raise ApmError(
                f"Step {self.step + 1}: the loss or its gradient is not finite. Try a learning rate below "
                f"{self.schedule.lr:g}."
            )
        self.optimiser.step()
        self.step += 1
        return {**losses, "norm": norm.item(), "lr": rate}

    def run(
        self,
        *,
        evaluate_every: int = 100,
        save_every: int = 200,
        on_step: Callable[[int, dict[str, float]], None] = lambda step, losses: None,
    ) -> None:
        """Train to the end, with checkpoints and a log; when that was reached before, do nothing.

        Args:
            evaluate_every: steps between measurements on the held-out images (there is one before the first step and
                one after the last); also the steps that a line of the log averages over.
            save_every: steps between checkpoints.
            on_step: called after each step with its number and losses, and after each measurement on held-out images
                with names that begin with ``held_out`` among them.

        Raises:
            UsageError: another process trains on this checkpoint.
        """
        if self.finished:
            return
        with self._alone_here():
            begun, before = time.perf_counter(), self._shorten_log()
            recent: list[dict[str, float]] = []
            if self.step == 0:
                self._measure(recent, before, on_step)
            while not self.finished:
                recent.append(self.advance())
                on_step(self.step, recent[-1])
                if self.step % evaluate_every == 0 or self.finished:
                    self._measure(recent, before + time.perf_counter() - begun, on_step)
                    recent.clear()
                if self.step % save_every == 0 or self.finished:
                    self.save()

    def save(self) -> None:
        """Write the checkpoint; a finished one is weights alone."""
        if self.processes.rank:
            return
        moments = {
            # a parameter that nothing reads has no moments: they stay 0
            f"{kind}.{name}": self.optimiser.state[parameter].get(kind, torch.zeros_like(parameter))
            for name, parameter in self.model.named_parameters()
            for kind in (() if self.finished else ("exp_avg", "exp_avg_sq"))
        }
        self._write(dict(self.model.state_dict()), moments)

    def _measure(
        self, recent: list[dict[str, float]], seconds: float, on_step: Callable[[int, dict[str, float]], None]
    ) -> None:
        if self.processes.rank:
            return
        means = {key: float(np.mean([one[key] for one in recent])) for key in (recent[0] if recent else ())}
        row = {**means, **self._held_out()}
        line = json.dumps({"step": self.step, **row, "seconds": round(seconds, 3)}) + "\n"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(line)
        on_step(self.step, row)

    def _shorten_log(self) -> float:
        """Drop what a killed run logged beyond its checkpoint; returns the seconds trained up to there."""
        if self.processes.rank:
            return 0.0
        rows = [row for row in read_log(self.log) if row["step"] <= self.step] if self.step else []
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        write_atomically(self.log, text)
        return float(rows[-1]["seconds"]) if rows else 0.0

    def _restore(self, checkpoint: Checkpoint[Any]) -> None:
        self.step = checkpoint.step
        self.model.load_state_dict(checkpoint.weights)
        if checkpoint.moments:
            for name, parameter in self.model.named_parameters():
                self.optimiser.state[parameter] = {
                    "step": torch.tensor(float(self.step)),
                    **{
                        kind: checkpoint.moments[f"{kind}.{name}"].to(parameter.device)
                        for kind in ("exp_avg", "exp_avg_sq")
                    },
                }

    @contextmanager
    def _alone_here(self) -> Iterator[None]:
        if self.processes.rank:
            yield
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.path.with_name(self.path.name + ".lock"))
        try:
            with lock.acquire(timeout=0):
                yield
        except filelock.Timeout:
            raise UsageError(f"Another process is training {printable(self.path)}.") from None


def read_log(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """Read the curves that `Trainer.run` logs; a last line that a kill cut off is left out."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]
