"""What the commands that train a network on images share: options and their checks, progress, Ctrl-C."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apm.errors import UsageError
from apm.images.paths import printable

from .render import notice, progress_line, progress_on_terminal

if TYPE_CHECKING:
    from apm.pretrain.loop import Trainer

TRAINING, FILES = "Training", "Files"  # panels of the help

Out = Annotated[Path, typer.Option(help="The checkpoint; training goes on from it if it exists.", metavar="CKPT")]
Steps = Annotated[int, typer.Option(help="Optimiser steps.", rich_help_panel=TRAINING)]
LearningRate = Annotated[float, typer.Option(help="Highest learning rate of AdamW.", rich_help_panel=TRAINING)]
Warmup = Annotated[int, typer.Option(help="Steps until the highest learning rate.", rich_help_panel=TRAINING)]
WeightDecay = Annotated[float, typer.Option(help="AdamW's weight decay.", rich_help_panel=TRAINING)]
HeldOut = Annotated[
    float, typer.Option(help="Share of the images to measure on, never trained on.", rich_help_panel=TRAINING)
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=TRAINING)]
EvaluateEvery = Annotated[
    int, typer.Option(help="Steps between measurements on held-out images.", rich_help_panel=FILES)
]
SaveEvery = Annotated[int, typer.Option(help="Steps between checkpoints.", rich_help_panel=FILES)]
MaxPixels = Annotated[
    int | None, typer.Option(help="Skip larger images (width × height). Default: 89478485.", rich_help_panel=FILES)
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.", rich_help_panel=FILES)]

_SAY_EVERY = 20.0  # seconds between lines where stderr is no terminal


def check_training(out: Path, evaluate_every: int, save_every: int, max_pixels: int | None) -> None:
    """Refuse, before anything is computed, what cannot work.

    Raises:
        UsageError: `out` can be no checkpoint, or a number is too small.
    """
    if out.is_dir():
        raise UsageError(
            f"{printable(out)} is a folder; --out names the checkpoint's file, such as student.safetensors."
        )
    if out.suffix != ".safetensors":
        raise UsageError(f"{printable(out)}: a checkpoint's name ends in .safetensors.")
    for name, value in (("--evaluate-every", evaluate_every), ("--save-every", save_every)):
        if value < 1:
            raise UsageError(f"{name} must be 1 or more, not {value}.")
    if max_pixels is not None and max_pixels < 1:
        raise UsageError(f"--max-pixels must be 1 or more, not {max_pixels}.")


def train(
    trainer: Trainer,
    names: Mapping[str, str],
    evaluate_every: int,
    save_every: int,
    *,
    wanted: bool = True,
    speaks: bool = True,
) -> None:
    """Train to the end, and say how far it is.

    Args:
        trainer: goes on from where its checkpoint is.
        names: its losses → what they are called; the first one is shown at every step.
        evaluate_every: steps between measurements.
        save_every: steps between checkpoints.
        wanted: False shows no progress.
        speaks: False says nothing of Ctrl-C: another process does.
    """
    if wanted and trainer.step > 0:
        state = "finished: nothing left to train" if trainer.finished else f"goes on from step {trainer.step:,}"
        notice(f"{printable(trainer.path)} {state}.")
    try:
        with TrainingProgress(
            trainer.schedule.steps, "train", wanted=wanted, done=trainer.step, names=names
        ) as progress:
            trainer.run(evaluate_every=evaluate_every, save_every=save_every, on_step=progress.step)
    except KeyboardInterrupt:
        if speaks:
            progress_line("interrupted; the same command goes on from the last checkpoint")
        raise typer.Exit(130) from None


class TrainingProgress:
    """A bar where stderr is a terminal, else a line now and then; nothing where it is not wanted."""

    def __init__(
        self, total: int, doing: str, *, wanted: bool, done: int = 0, names: Mapping[str, str] | None = None
    ) -> None:
        self.total, self.doing, self.wanted, self.done, self.names = total, doing, wanted, done, dict(names or {})
        self._bar = progress_on_terminal(total, wanted=wanted, doing=doing)
        self._said = time.monotonic()

    def __enter__(self) -> TrainingProgress:
        self._rich = self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)

    def image(self, error: str | None) -> None:
        """One image more."""
        self._advance(self.done + 1, f"{self.done + 1:,} of {self.total:,} images")

    def step(self, step: int, losses: dict[str, float]) -> None:
        """Another step, or a measurement on held-out images."""
        first, *_ = self.names
        far = f"step {step:,} of {self.total:,}: "
        if f"held_out_{first}" in losses:
            trained = f", trained {losses[first]:.5f}" if first in losses else ""
            shown = [f"{word} held out {losses[f'held_out_{name}']:.5f}" for name, word in self.names.items()]
            self._say(far + "; ".join([shown[0] + trained, *shown[1:]]))
        else:
            self._advance(step, f"{far}{self.names[first]} {losses[first]:.5f}")

    def _advance(self, done: int, text: str) -> None:
        self.done = done
        if self._rich is not None:
            self._rich.update(self._rich.task_ids[0], completed=done)
        elif time.monotonic() - self._said > _SAY_EVERY:
            self._say(text)

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        if self._rich is not None:
            self._rich.console.print(printable(text), markup=False)
        elif self.wanted:
            progress_line(f"{self.doing}: {text}")
