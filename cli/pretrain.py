"""`apm pretrain`: train one student on many images, against the grids of a teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apm.errors import unknown
from apm.pretrain.config import PretrainConfig
from apm.student.config import PRESETS

from .options import Debug, options_of
from .render import notice, notice_if_slow
from .training import (
    TRAINING,
    Out,
    Session,
    check_checkpoint,
    images_of,
    place_of,
    say_result,
    session_options,
    train,
)

if TYPE_CHECKING:
    import torch

    from apm.pretrain.cache import GridCache
    from apm.student.config import APMConfig

STUDENT = "The student"


@options_of(PretrainConfig, "config", TRAINING)
@session_options
def pretrain(
    folder: Annotated[
        Path,
        typer.Argument(help="Images in and below it, or Parquet files with a column image.", metavar="FOLDER"),
    ],
    teacher_grid: Annotated[
        str, typer.Option(help="Teacher that gives the grids: any of `apm teachers`, or timm:NAME.", metavar="NAME")
    ],
    out: Out,
    config: PretrainConfig,
    session: Session,
    preset: Annotated[str, typer.Option(help="The student's size: paper or small.", rich_help_panel=STUDENT)] = "small",
    grid_size: Annotated[
        int | None,
        typer.Option(
            help="Side of the teacher's input in pixels. Default: its own.",
            rich_help_panel=STUDENT,
            show_default=False,
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Train one student on a folder of images: its field against a teacher's grid, its colours against the image.

    No labels. Progress goes to stderr, the curves to CKPT.log.jsonl. The same command after a kill goes on exactly
    where the last checkpoint was. Started by torchrun, the processes share each batch.

    Exit code: 0 done, 1 done but some images were skipped (each is named on stderr), 2 wrong usage.
    """
    check_checkpoint(out)
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    from apm.pretrain.checkpoint import check_settings, read_checkpoint
    from apm.pretrain.images import open_images
    from apm.student.config import APMConfig
    from apm.teachers import load_grid_teacher

    source = open_images(folder)
    place = place_of(session.device)
    teacher = load_grid_teacher(teacher_grid, device=place)
    student = APMConfig.preset(preset, dim=teacher.dim, readout="mean")
    side = teacher.grid_size if grid_size is None else grid_size
    data = {"data": source.fingerprint, "teacher": teacher.identity, "grid_size": side}
    if out.exists():  # told now, and not after the grids of many images
        check_settings(out, read_checkpoint(out), student, {**data, **asdict(config)})

    def images(wanted: bool) -> GridCache:
        size = student.image_size
        return images_of(source, out, session, size=size, teacher=teacher, grid_size=side, wanted=wanted)

    _train(images, out, student, config, session, data=data, place=place, notes=teacher.notes)


def _train(
    images: Callable[[bool], GridCache],
    out: Path,
    student: APMConfig,
    config: PretrainConfig,
    session: Session,
    *,
    data: dict[str, Any],
    place: torch.device,
    notes: Sequence[str],
) -> None:
    """Train in one process, or in each of several; the first of them talks."""
    from apm.pretrain.trainer import Pretrainer
    from apm.processes import join

    with join() as group:
        talks = group.first and not session.quiet
        if group.first:
            for note in notes:
                notice(note)
            notice_if_slow(session.precision, place)
            cache = images(talks)  # the first process computes the grids; the others find them there
        group.barrier()
        if not group.first:
            cache = images(False)
        precision = session.precision
        trainer = Pretrainer(out, cache, student, config, data=data, precision=precision, device=place, processes=group)
        train(trainer, {"grid": "grid", "rgb": "colours"}, session, wanted=talks, speaks=group.first)
        if group.first:
            result = "held-out mean squared error on {held_out:,}: grid {grid:.5f}, colours {rgb:.5f}"
            say_result(trainer, result, session)
