"""Self-supervised training of ONE student on many images: its field against a teacher's grid, its colours too.

Modi & Rawat 2024, section 3 and figure 5. Unlike in test-time training, all images share the weights; what the student
knows of an image is its trigger column alone. Loss: ``mean((f - G)²) + rgb_weight · mean((rgb - pooled image)²)`` over
the student's own locations; G is the teacher's grid resampled to them.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, get_args

import filelock
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from apm.errors import ApmError, UsageError, unknown
from apm.field import answer
from apm.files import write_atomically
from apm.grids import resample
from apm.images import IMAGENET_MEAN, IMAGENET_STD
from apm.model import APM, APMConfig
from apm.paths import printable
from apm.position import grid_locations, position_code
from apm.precision import Precision, measured_precision
from apm.pretrain_cache import GridCache
from apm.pretrain_checkpoint import Checkpoint, check_settings, read_checkpoint, write_checkpoint
from apm.pretrain_config import PretrainConfig


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


class Pretrainer:
    """One student, its optimiser, and the images in a cache; trains from wherever the checkpoint at `path` is.

    Attributes:
        model: the student.
        step: optimiser steps made.
        train, held_out: numbers of the images in the cache.
        precision: ``fp32`` or ``bf16``, what ``auto`` chose.
        log: file beside the checkpoint with one JSON line a measurement: the curves.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        cache: GridCache,
        student: APMConfig,
        config: PretrainConfig,
        *,
        data: Mapping[str, Any],
        precision: Precision = "auto",
        device: str | torch.device = "cpu",
        processes: Processes = ALONE,
    ) -> None:
        """Draw the student, or take it up from the checkpoint.

        Args:
            path: checkpoint file; need not exist.
            cache: inputs and targets of all images.
            student: sizes.
            config: how to train.
            data: what identifies images and teacher, plain JSON values; part of the settings.
            precision: of the two middle layers; ``auto``: the checkpoint's, else what is faster here.
            device: where to train.
            processes: those that share each batch.

        Raises:
            UsageError: the checkpoint is damaged, or was made with other settings (each is named).
        """
        if precision not in get_args(Precision):
            raise unknown("precision", precision, get_args(Precision))
        if cache.grids.shape[-1] != student.dim:
            raise UsageError(f"The teacher's grid is {cache.grids.shape[-1]} wide and the student's dim {student.dim}.")
        self.path, self.cache, self.config, self.processes = Path(path), cache, config, processes
        self.device = torch.device(device)
        checkpoint = read_checkpoint(self.path) if self.path.exists() else None
        chosen: Any = precision
        if precision == "auto":  # as it was begun, if it was: a busy machine may measure otherwise the next time
            chosen = checkpoint.settings.get("precision") if checkpoint else measured_precision(self.device)
        self.precision = str(processes.broadcast(chosen))
        self.train, self.held_out = config.split(len(cache.names))
        self.settings = {**data, **asdict(config), "precision": self.precision, "images": len(cache.names)}
        self.log = self.path.with_name(self.path.name + ".log.jsonl")
        self.step = 0
        self.model = APM(student, seed=config.seed).to(self.device)
        self._positions = position_code(*grid_locations(student.grid), student.position_dim).to(self.device)
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimiser = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=config.lr,
        )
        if checkpoint is not None:
            self._restore(checkpoint)
        else:
            self._start_from_means()

    @property
    def finished(self) -> bool:
        """Whether all steps are made."""
        return self.step >= self.config.steps

    def losses(
        self, numbers: NDArray[np.int64], places: NDArray[np.int64] | None = None, *, precision: str = "fp32"
    ) -> tuple[Tensor, Tensor]:
        """Squared errors of the images with these numbers in the cache: of the grid (B,) and of the colours (B,).

        At the cells with the numbers `places`, or at all of them; ``precision`` is of the two middle layers.
        """
        at = slice(None) if places is None else torch.from_numpy(places).to(self.device)
        images = self.cache.inputs(numbers).to(self.device)
        grids = resample(self.cache.targets(numbers).to(self.device), self.model.config.grid)[:, at]  # (B, Q, D)
        colours = pooled_colours(images, self.model.config.patch_size)[:, at]  # (B, Q, 3)
        features, seen = answer(self.model, self.model.column(images), self._positions[at], precision=precision)
        return (features - grids).square().mean((1, 2)), (seen - colours).square().mean((1, 2))

    @torch.no_grad()
    def held_out_losses(self) -> tuple[float, float]:
        """Mean squared errors of grid and colours over the held-out images, in float32."""
        parts = [self.losses(part) for part in _parts(self.held_out, self.config.batch_size)]
        grid, rgb = (torch.cat(kind).mean().item() for kind in zip(*parts, strict=True))
        return grid, rgb

    def advance(self) -> dict[str, float]:
        """Make one step; returns what it measured: losses before the update, gradient norm, learning rate."""
        numbers = self.config.batch(self.train, self.step)
        mine = numbers[self.processes.rank :: self.processes.world]
        self.optimiser.zero_grad()
        sums = torch.zeros(2, device=self.device)
        if len(mine):
            places = self.config.places(self.model.config.cells, self.step)
            grid, rgb = self.losses(mine, places, precision=self.precision)
            # each process's part of the mean over the whole batch: the sum of gradients is the whole batch's gradient
            ((grid.sum() + self.config.rgb_weight * rgb.sum()) / len(numbers)).backward()
            sums = torch.stack((grid.detach().sum(), rgb.detach().sum()))
        self._add_up(sums)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        rate = self.config.learning_rate(self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        grid_loss, rgb_loss = (sums / len(numbers)).tolist()
        if not math.isfinite(grid_loss + rgb_loss + norm.item()):
            raise ApmError(
                f"Step {self.step + 1}: the loss or its gradient is not finite. Try a learning rate below "
                f"{self.config.lr:g}."
            )
        self.optimiser.step()
        self.step += 1
        return {"grid": grid_loss, "rgb": rgb_loss, "norm": norm.item(), "lr": rate}

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
                with `held_out_grid` and `held_out_rgb` among them.

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
            f"{kind}.{name}": self.optimiser.state[parameter][kind]
            for name, parameter in self.model.named_parameters()
            for kind in (() if self.finished else ("exp_avg", "exp_avg_sq"))
        }
        weights = dict(self.model.state_dict())
        write_checkpoint(self.path, Checkpoint(self.model.config, self.settings, self.step, weights, moments))

    def _measure(
        self, recent: list[dict[str, float]], seconds: float, on_step: Callable[[int, dict[str, float]], None]
    ) -> None:
        if self.processes.rank:
            return
        means = {key: float(np.mean([one[key] for one in recent])) for key in (recent[0] if recent else ())}
        grid, rgb = self.held_out_losses()
        row = {**means, "held_out_grid": grid, "held_out_rgb": rgb}
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

    def _restore(self, checkpoint: Checkpoint) -> None:
        check_settings(self.path, checkpoint, self.model.config, self.settings)
        self.step = checkpoint.step
        self.model.load_state_dict(checkpoint.weights)
        if checkpoint.moments:
            for name, parameter in self.model.named_parameters():
                self.optimiser.state[parameter] = {
                    "step": torch.tensor(float(self.step)),
                    **{k: checkpoint.moments[f"{k}.{name}"].to(self.device) for k in ("exp_avg", "exp_avg_sq")},
                }

    def _start_from_means(self) -> None:
        """Let the outputs begin at the training images' mean feature and colour.

        The colours end in a ReLU: one whose drawn bias is negative, which is one in two, would be dead for ever.
        """
        features, colours = np.zeros(self.model.config.dim), np.zeros(3)
        for part in _parts(self.train, 256):
            features += self.cache.grids[part].mean((1, 2), dtype=np.float64).sum(0)
            colours += self.cache.images[part].mean((1, 2), dtype=np.float64).sum(0) / 255
        with torch.no_grad():
            self.model.mlp.head.bias.copy_(torch.from_numpy(features / len(self.train)))
            self.model.rgb_head.layer3.bias.copy_(torch.from_numpy(colours / len(self.train)))

    def _add_up(self, sums: Tensor) -> None:
        """Sum losses and gradients over the processes, in one exchange."""
        if self.processes.world == 1:
            return
        from torch import distributed

        parameters = list(self.model.parameters())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        joined = torch.cat([sums, *(gradient.flatten() for gradient in gradients)])
        distributed.all_reduce(joined)
        sums.copy_(joined[:2])
        for parameter, part in zip(parameters, joined[2:].split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter).clone()

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


def pooled_colours(images: Tensor, patch_size: int) -> Tensor:
    """Normalised images (B, 3, S, S) -> mean colour of every patch (B, N, 3) in [0, 1].

    In [0, 1] and not in the image's normalised units, as the RGB head ends in a ReLU and cannot say less than zero.
    """
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    pooled = functional.avg_pool2d(images, patch_size) * std + mean
    return pooled.flatten(2).mT.clamp(0, 1)


def read_log(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """Read the curves that `Pretrainer.run` logs; a last line that a kill cut off is left out."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _parts(numbers: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]
