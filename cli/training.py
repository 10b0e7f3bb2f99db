"""What the commands that train a network on images share: options and their checks, progress, Ctrl-C."""

# ruff: noqa: RUF009  (`setting` makes fields)
from __future__ import annotations

import json
import time
import typing
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apm.errors import UsageError
from apm.images.paths import printable
from apm.settings import at_least, check_values, setting
from apm.student.config import Precision

from .data import place_of
from .options import flag, options_of
from .progress import LINE_EVERY
from .render import (
    failure,
    notice,
    notice_if_slow,
    progress_line,
    progress_on_terminal,
    say,
    say_json,
    told_when_interrupted,
)

if TYPE_CHECKING:
    from apm.pretrain.cache import GridCache
    from apm.pretrain.checkpoint import Network
    from apm.pretrain.images import ImageSource
    from apm.pretrain.loop import Trainer
    from apm.teachers.base import GridTeacher

TRAINING, RUN = "Training", "The run"  # panels of the help

Images = Annotated[
    Path, typer.Argument(help="Images in and below a folder, or Parquet files with a column image.", metavar="DATA")
]
Out = Annotated[Path, typer.Option(help="The checkpoint; training continues from it if it exists.", metavar="CKPT")]


@dataclass(frozen=True, kw_only=True)
class Session:
    """How a training is carried out; of this, only the precision affects the weights.

    Raises:
        UsageError: a value that cannot work.
    """

    precision: Precision = setting(
        "auto", "Number format of the large matrix products: auto, fp32 or bf16.", choices=typing.get_args(Precision)
    )
    device: str = setting("auto", "auto, cpu or cuda.")
    evaluate_every: int = setting(100, "Steps between measurements on held-out images.", check=at_least(1))
    save_every: int = setting(200, "Steps between checkpoints.", check=at_least(1))
    cache: Path | None = setting(None, "Folder for cached images and targets.", default_words="CKPT.cache")
    max_pixels: int | None = setting(
        None, "Skip larger images (width × height).", default_words="89478485", check=at_least(1)
    )
    quiet: bool = setting(False, "Show no progress.")
    as_json: bool = setting(False, "Print the result as one JSON object.")

    def __post_init__(self) -> None:
        """Check each value."""
        check_values(self, flag)


session_options = options_of(Session, "session", RUN, spelled={"quiet": "--quiet -q", "as_json": "--json"})
"""Gives a command the options of a `Session`, in place of its parameter ``session``."""


def check_checkpoint(out: Path) -> None:
    """Refuse, before anything is computed, a path that cannot be a checkpoint's.

    Raises:
        UsageError: it is a folder, or does not end in .safetensors.
    """
    if out.is_dir():
        raise UsageError(
            f"{printable(out)} is a folder; --out names the checkpoint's file, such as student.safetensors."
        )
    if out.suffix != ".safetensors":
        raise UsageError(f"{printable(out)}: a checkpoint's name ends in .safetensors.")


def train_network(
    make: Callable[..., Trainer],
    network: Network[Any],
    source: ImageSource,
    out: Path,
    sizes: Any,
    config: Any,
    session: Session,
    *,
    names: Mapping[str, str],
    result: str,
    data: Mapping[str, Any] | None = None,
    teacher: GridTeacher | None = None,
    grid_size: int | None = None,
) -> None:
    """Train, in one process or as one of several, from where the checkpoint is; only the first one prints.

    Args:
        make: makes the trainer from `out`, the cache, `sizes`, `config`, and the options of `Trainer`.
        network: what is trained.
        source: the images.
        out: the checkpoint.
        sizes: of the network.
        config: how to train.
        session: how to carry it out.
        names: the losses → what they are called; the first one is shown at every step.
        result: what is said at the end, see `_say_result`.
        data: what else identifies what is learned, besides the images.
        teacher: gives the grids that are learned; None: only the images are.
        grid_size: side of its input, in pixels.
    """
    from apm.pretrain.checkpoint import check_settings, read_network
    from apm.processes import join

    known, place = {"data": source.fingerprint, **(data or {})}, place_of(session.device)
    if out.exists():  # said now, and not after many images have been read
        check_settings(out, read_network(out, network), sizes, {**known, **asdict(config)})
    with join() as group:
        talks = group.first and not session.quiet
        if group.first:
            for note in () if teacher is None else teacher.notes:
                notice(note)
            if source.left_out is not None:
                failure(source.left_out)
            notice_if_slow(session.precision, place)
            cache = _images_of(source, out, session, sizes.image_size, teacher, grid_size, wanted=talks, speaks=True)
        group.barrier()
        if not group.first:  # the first process has filled the cache
            cache = _images_of(source, out, session, sizes.image_size, teacher, grid_size, wanted=False, speaks=False)
        how: dict[str, Any] = {"precision": session.precision, "device": place, "processes": group}
        trainer = make(out, cache, sizes, config, data=known, **how)
        _train(trainer, names, session, wanted=talks, speaks=group.first)
        if group.first:
            _say_result(trainer, result, session)
            if trainer.cache.skipped or source.dead:
                raise typer.Exit(1)


def _images_of(
    source: ImageSource,
    out: Path,
    session: Session,
    size: int,
    teacher: GridTeacher | None,
    grid_size: int | None,
    *,
    wanted: bool,
    speaks: bool,
) -> GridCache:
    """Compute what training needs of every image, or find it in the cache, showing progress; see `build_cache`."""
    from apm.images.load import MAX_PIXELS
    from apm.pretrain.cache import build_cache

    def far() -> str:
        return f"interrupted: {progress.done:,} of {len(source):,} images are read; the same command goes on from there"

    with (
        TrainingProgress(len(source), "images" if teacher is None else "grids", wanted=wanted) as progress,
        told_when_interrupted(far, speaks=speaks),
    ):
        return build_cache(
            source,
            teacher,
            session.cache or out.with_name(out.name + ".cache"),
            size=size,
            grid_size=grid_size,
            max_pixels=session.max_pixels or MAX_PIXELS,
            on_image=progress.image,
        )


def _train(trainer: Trainer, names: Mapping[str, str], session: Session, *, wanted: bool, speaks: bool) -> None:
    """Train to the end, showing progress.

    Args:
        trainer: continues from its checkpoint.
        names: its losses → what they are called; the first one is shown at every step.
        session: how often it measures and saves.
        wanted: False shows no progress.
        speaks: False says nothing of Ctrl-C: another process does.
    """
    if wanted and trainer.step > 0:
        state = "finished: nothing left to train" if trainer.finished else f"goes on from step {trainer.step:,}"
        notice(f"{printable(trainer.path)} {state}.")
    steps, every = trainer.config.steps, session.evaluate_every
    with (
        told_when_interrupted("interrupted; the same command goes on from the last checkpoint", speaks=speaks),
        TrainingProgress(steps, "train", wanted=wanted, done=trainer.step, names=names) as progress,
    ):
        trainer.run(evaluate_every=every, save_every=session.save_every, on_step=progress.step)


def _say_result(trainer: Trainer, text: str, session: Session) -> None:
    """Say what was reached, and which images were skipped.

    Args:
        trainer: has finished.
        text: with the names of its held-out losses in braces, and ``held_out`` for the number of those images.
        session: whether it is said in JSON, see schemas/training.json.
    """
    skipped, losses, held_out = trainer.cache.skipped, trainer.held_out_losses(), len(trainer.held_out)
    for _, error in skipped:
        failure(f"{error}: skipped")
    if session.as_json:
        record = {"checkpoint": str(trainer.path), "steps": trainer.step, "images": len(trainer.train)}
        record |= {"held_out": held_out, "losses": losses, "skipped": [name for name, _ in skipped]}
        say_json(json.dumps(record, ensure_ascii=False, allow_nan=False))
    else:
        reached = f"{trainer.path}: {trainer.step:,} steps on {len(trainer.train):,} images; "
        say(reached + text.format(held_out=held_out, **losses))


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
        """Count an image."""
        self._advance(self.done + 1, f"{self.done + 1:,} of {self.total:,} images")

    def step(self, step: int, losses: dict[str, float]) -> None:
        """Report a step, or a measurement on held-out images."""
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
        elif time.monotonic() - self._said > LINE_EVERY:
            self._say(text)

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        if self._rich is not None:
            self._rich.console.print(printable(text), markup=False)
        elif self.wanted:
            progress_line(f"{self.doing}: {text}")
