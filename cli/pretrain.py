"""`apm pretrain`: train one student on many images, against the grids of a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apm.errors import unknown
from apm.pretrain.config import PretrainConfig
from apm.student.config import PRESETS

from .options import Debug, options_of
from .training import TRAINING, Out, Session, check_checkpoint, place_of, session_options, train_network

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
    from apm.pretrain.images import open_images
    from apm.pretrain.trainer import Pretrainer
    from apm.student.config import APMConfig
    from apm.teachers import load_grid_teacher

    source = open_images(folder)
    teacher = load_grid_teacher(teacher_grid, device=place_of(session.device))
    side = teacher.grid_size if grid_size is None else grid_size
    train_network(
        Pretrainer,
        Pretrainer.network,
        source,
        out,
        APMConfig.preset(preset, dim=teacher.dim, readout="mean"),
        config,
        session,
        names={"grid": "grid", "rgb": "colours"},
        result="held-out mean squared error on {held_out:,}: grid {grid:.5f}, colours {rgb:.5f}",
        data={"teacher": teacher.identity, "grid_size": side},
        teacher=teacher,
        grid_size=side,
    )
