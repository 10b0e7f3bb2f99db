"""`apm pretrain`: train one student on many images, against the grids of a teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apm.errors import UsageError, unknown
from apm.pretrain.config import PretrainConfig
from apm.student.config import PRESETS, APMConfig

from .data import place_of
from .early import check_data
from .options import Debug, options_of
from .pretrain_layers import LayerOptions, pretrain_layers
from .training import TRAINING, Out, Session, check_checkpoint, session_options, train_network

if TYPE_CHECKING:
    from apm.pretrain.images import ImageSource

STUDENT, LAYERS = "The student", "In place of layers"


@options_of(PretrainConfig, "config", TRAINING)
@options_of(LayerOptions, "layers", LAYERS)
@session_options
def pretrain(
    folder: Annotated[
        Path,
        typer.Argument(help="Images in and below it, or Parquet files with a column image.", metavar="FOLDER"),
    ],
    out: Out,
    config: PretrainConfig,
    layers: LayerOptions,
    session: Session,
    teacher_grid: Annotated[
        str | None,
        typer.Option(
            help="Teacher for the grids: any of `apm teachers`, or timm:NAME. Optional with --grey-input, which then "
            "learns only the colours.",
            metavar="NAME",
        ),
    ] = None,
    preset: Annotated[str, typer.Option(help="The student's size: paper or small.", rich_help_panel=STUDENT)] = "small",
    patch_size: Annotated[
        int,
        typer.Option(help="Side of a grid cell in pixels; choose fewer for small images.", rich_help_panel=STUDENT),
    ] = APMConfig.patch_size,
    grid_size: Annotated[
        int | None,
        typer.Option(
            help="Input size of the teacher in pixels. Default: its own.",
            rich_help_panel=STUDENT,
            show_default=False,
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Train one student on a folder of images: its field against a teacher's grid, its colours against the image.

    With --grey-input the student sees the images in grey, for use with `apm colourise`. With --target-layer it learns
    the output of one of the teacher's layers, to replace the layers up to that one.

    Labels are not used. Progress goes to stderr, the curves to CKPT.log.jsonl. After a kill the same command continues
    exactly from the last checkpoint. Under torchrun the processes share each batch.

    Exit code: 0 done, 1 done but some images were skipped (each is named on stderr), 2 wrong usage.
    """
    check_checkpoint(out)
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    if layers.target_layer is None:
        _check_field(teacher_grid, config, grid_size, patch_size)
    check_data(folder)
    from apm.pretrain.images import open_images

    source = open_images(folder)
    if layers.target_layer is None:
        _pretrain_field(source, out, teacher_grid, config, session, preset, grid_size=grid_size, patch_size=patch_size)
    else:
        sized = grid_size is not None or patch_size != APMConfig.patch_size
        pretrain_layers(source, out, teacher_grid, config, session, layers, preset=preset, sized=sized)


def _check_field(teacher_grid: str | None, config: PretrainConfig, grid_size: int | None, patch_size: int) -> None:
    """Refuse, by a `UsageError`, options that do not go together, before anything is read."""
    if teacher_grid is None and not config.grey_input:
        raise UsageError(
            "--teacher-grid NAME is missing: it names the teacher whose grids are learned. Only --grey-input needs "
            "none."
        )
    if teacher_grid is None and grid_size is not None:
        raise UsageError("--grid-size applies to the teacher's grids, but there is no --teacher-grid.")
    if not 1 <= patch_size <= 64:
        raise UsageError(f"--patch-size must be from 1 to 64 pixels, not {patch_size}.")


def _pretrain_field(
    source: ImageSource,
    out: Path,
    teacher_grid: str | None,
    config: PretrainConfig,
    session: Session,
    preset: str,
    *,
    grid_size: int | None,
    patch_size: int,
) -> None:
    """Train against a teacher's grids and the images' colours, or against the colours alone."""
    from apm.pretrain.trainer import Pretrainer
    from apm.teachers import load_grid_teacher

    teacher = None if teacher_grid is None else load_grid_teacher(teacher_grid, device=place_of(session.device))
    sizes = APMConfig.preset(preset, dim=APMConfig.dim if teacher is None else teacher.dim, readout="mean")
    side = teacher.grid_size if teacher is not None and grid_size is None else grid_size
    names = {"rgb": "colours"} if teacher is None else {"grid": "grid", "rgb": "colours"}
    reached = ", ".join(f"{word} {{{name}:.5f}}" for name, word in names.items())
    train_network(
        Pretrainer,
        Pretrainer.network,
        source,
        out,
        replace(sizes, patch_size=patch_size, image_size=sizes.grid * patch_size),
        config,
        session,
        names=names,
        result="held-out mean squared error on {held_out:,}: " + reached,
        data={"teacher": teacher and teacher.identity, "grid_size": side},
        teacher=teacher,
        grid_size=side,
    )
