"""One network trained on many images, step by step: measurements, curves, checkpoints, exact resume."""

from __future__ import annotations

import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from apm.errors import ApmError, UsageError, unknown
from apm.images.files import alone_with, read_json_lines, write_atomically
from apm.images.paths import printable
from apm.pretrain.cache import GridCache
from apm.pretrain.checkpoint import Checkpoint, Network, check_settings, read_network, write_checkpoint
from apm.pretrain.config import Schedule
from apm.processes import ALONE, Group
from apm.student.config import Precision
from apm.student.matmul import measured_precision


class Trainer(ABC):
    """A network, its optimiser, and the images in a cache; trains from wherever the checkpoint at `path` is.

    A subclass says which network, what it learns from the images, and what is measured on those held out.

    Attributes:
        path: the checkpoint.
        log: file beside it with one JSON line a measurement: the curves.
        model: the network; its ``config`` holds its sizes.
        config: how it is trained.
        settings: all that decides the weights, beside the sizes: plain JSON values.
        precision: ``fp32`` or ``bf16``, what ``auto`` chose.
        train, held_out: numbers of the images in the cache.
        step: optimiser steps made.
    """

    network: ClassVar[Network[Any]]
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)  # of AdamW
    model: Any

    def __init__(
        self,
        path: str | os.PathLike[str],
        cache: GridCache,
        sizes: Any,
        config: Any,
        *,
        data: Mapping[str, Any],
        precision: Precision = "auto",
        device: str | torch.device = "cpu",
        processes: Group = ALONE,
    ) -> None:
        """Draw the network, or take it up from the checkpoint.

        Args:
            path: checkpoint file; need not exist.
            cache: the images, and what is to be learned of them.
            sizes: of the network.
            config: how to train.
            data: what identifies the images and what is learned, plain JSON values; part of the settings.
            precision: of the large matrix products; ``auto``: the checkpoint's, else what is faster here.
            device: where to train.
            processes: those that share each batch.

        Raises:
            UsageError: the checkpoint is damaged, or was made with other settings (each is named); sizes, images and
                settings do not go together.
        """
        if precision not in get_args(Precision):
            raise unknown("precision", precision, get_args(Precision))
        self.path, self.cache, self.config, self.processes = Path(path), cache, config, processes
        self.log = self.path.with_name(self.path.name + ".log.jsonl")
        self.device = torch.device(device)
        self.check(sizes)
        self.model = self.network.draw(sizes, config.seed).to(self.device)
        self.optimiser = _optimiser(self.model, config, self.betas)
        self.step = 0
        self.train, self.held_out = config.split(len(cache.names))
        checkpoint = read_network(self.path, self.network) if self.path.exists() else None
        chosen: Any = precision
        if precision == "auto":  # as it was begun, if it was: a busy machine may measure otherwise the next time
            chosen = checkpoint.settings.get("precision") if checkpoint else measured_precision(self.device)
        self.precision = str(processes.broadcast(chosen))
        self.settings = {**data, **asdict(config), "precision": self.precision, "images": len(cache.names)}
        if checkpoint is None:
            self.begin()
        else:
            check_settings(self.path, checkpoint, sizes, self.settings)
            self._restore(checkpoint)

    def check(self, sizes: Any) -> None:  # noqa: B027  (some have nothing to refuse)
        """Refuse sizes that do not go with the images or the settings, by a `UsageError`."""

    def begin(self) -> None:  # noqa: B027  (most stay as drawn)
        """Change the initial weights, if they should not stay as drawn."""

    @abstractmethod
    def gradients(self) -> dict[str, float]:
        """Set the gradients of the next step; returns the losses before it."""

    @abstractmethod
    def held_out_losses(self) -> dict[str, float]:
        """Measure the held-out images, in float32: the same losses."""

    @property
    def mine(self) -> slice:
        """This process's part of a batch."""
        return slice(self.processes.rank, None, self.processes.world)

    def share(
        self, weights: Mapping[str, float], losses: Callable[[NDArray[np.int64]], Mapping[str, Tensor]]
    ) -> dict[str, float]:
        """Set the gradients of the weighed sum of some losses' means over the batch, which the processes share.

        Args:
            weights: of the losses; 0 of what is only told.
            losses: numbers of images in the cache (b,) → each image's losses (b,), by name.

        Returns:
            The losses' means over the whole batch.
        """
        numbers = self.config.batch(self.train, self.step)
        sums = torch.zeros(len(weights), device=self.device)
        if len(part := numbers[self.mine]):
            found = losses(part)
            each = [found[name].sum() for name in weights]
            total = torch.stack([weight * one for weight, one in zip(weights.values(), each, strict=True)]).sum()
            # each process's part of the mean over the whole batch: the sum of gradients is the whole batch's gradient
            (total / len(numbers)).backward()
            sums = torch.stack(each).detach()
        self.add_up(sums)
        return dict(zip(weights, (sums / len(numbers)).tolist(), strict=True))

    def add_up(self, sums: Tensor) -> None:
        """Sum the numbers in `sums` (n,) and the gradients over the processes, in one exchange."""
        if self.processes.world == 1:
            return
        from torch import distributed

        parameters = [p for p in self.model.parameters() if p.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        joined = torch.cat([sums, *(gradient.flatten() for gradient in gradients)])
        distributed.all_reduce(joined)
        sums.copy_(joined[: len(sums)])
        each = joined[len(sums) :].split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, each, strict=True):
            parameter.grad = part.view_as(parameter).clone()

    @property
    def finished(self) -> bool:
        """Whether all steps are made."""
        return self.step >= self.config.steps

    def advance(self) -> dict[str, float]:
        """Make one step; returns what it measured: losses before the update, gradient norm, learning rate."""
        self.optimiser.zero_grad()
        losses = self.gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        rate = self.config.learning_rate(self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        if not math.isfinite(sum(losses.values()) + norm.item()):
            raise ApmError(
                f"Step {self.step + 1}: the loss or its gradient is not finite. Try a learning rate below "
                f"{self.config.lr:g}."
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
        with nullcontext() if self.processes.rank else alone_with(self.path, "training"):
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
        """Write the checkpoint; a finished one holds only weights."""
        if self.processes.rank:
            return
        moments = {
            # a parameter that nothing reads has no moments: they stay 0
            f"{kind}.{name}": self.optimiser.state[parameter].get(kind, torch.zeros_like(parameter))
            for name, parameter in self.model.named_parameters()
            for kind in (() if self.finished else ("exp_avg", "exp_avg_sq"))
        }
        weights = dict(self.model.state_dict())
        checkpoint = Checkpoint(self.model.config, self.settings, self.step, weights, moments, self.network.name)
        write_checkpoint(self.path, checkpoint)

    def _measure(
        self, recent: list[dict[str, float]], seconds: float, on_step: Callable[[int, dict[str, float]], None]
    ) -> None:
        if self.processes.rank:
            return
        means = {key: float(np.mean([one[key] for one in recent])) for key in (recent[0] if recent else ())}
        row = {**means, **{f"held_out_{name}": loss for name, loss in self.held_out_losses().items()}}
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


def _optimiser(model: nn.Module, config: Schedule, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW, whose weight decay leaves biases and other vectors alone."""
    named = list(model.named_parameters())
    decayed = [p for name, p in named if p.ndim > 1 and "bias" not in name]
    others = [p for name, p in named if p.ndim <= 1 or "bias" in name]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.lr,
        betas=betas,
    )


def parts(numbers: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    """Cut into parts of `size`; the last one may be smaller."""
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]


def read_log(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """Read the curves that `Trainer.run` logs; none where there is no file.

    Raises:
        UsageError: a line, other than a last one that was cut off, is no JSON.
    """
    try:
        return read_json_lines(path)
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise UsageError(f"{printable(path)} is damaged ({error}): remove it to go on without its curves.") from error
