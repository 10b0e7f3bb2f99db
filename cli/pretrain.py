"""`apm pretrain`: train one student on many images, against the grids of a teacher."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from apm.errors import unknown

from . import training as shared
from .options import Debug
from .render import failure, notice, notice_if_slow, say
from .training import FILES, TRAINING, TrainingProgress, check_training, train

STUDENT = "The student"


def pretrain(
    folder: Annotated[
        Path,
        typer.Argument(help="Images in and below it, or Parquet files with a column image.", metavar="FOLDER"),
    ],
    teacher_grid: Annotated[
        str, typer.Option(help="Teacher that gives the grids: any of `apm teachers`, or timm:NAME.", metavar="NAME")
    ],
    out: shared.Out,
    preset: Annotated[str, typer.Option(help="The student's size: paper or small.", rich_help_panel=STUDENT)] = "small",
    grid_size: Annotated[
        int | None,
        typer.Option(
            help="Side of the teacher's input in pixels. Default: its own.",
            rich_help_panel=STUDENT,
            show_default=False,
        ),
    ] = None,
    steps: shared.Steps = 3000,
    batch_size: Annotated[int, typer.Option(help="Images a step, over all processes.", rich_help_panel=TRAINING)] = 32,
    lr: shared.LearningRate = 2e-3,
    warmup: shared.Warmup = 100,
    weight_decay: shared.WeightDecay = 0.01,
    locations: Annotated[
        int | None,
        typer.Option(help="Random locations to train at in each step. Default: all.", rich_help_panel=TRAINING),
    ] = None,
    rgb_weight: Annotated[float, typer.Option(help="Weight of the colours' loss.", rich_help_panel=TRAINING)] = 1.0,
    held_out: shared.HeldOut = 0.05,
    seed: Annotated[int, typer.Option(help="Seed of weights, split and order.", rich_help_panel=TRAINING)] = 0,
    precision: Annotated[
        str, typer.Option(help="Number format of the middle layers: auto, fp32 or bf16.", rich_help_panel=TRAINING)
    ] = "auto",
    device: shared.Device = "auto",
    evaluate_every: shared.EvaluateEvery = 100,
    save_every: shared.SaveEvery = 200,
    cache: Annotated[
        Path | None,
        typer.Option(help="Where inputs and grids are kept. Default: CKPT.cache.", rich_help_panel=FILES),
    ] = None,
    max_pixels: shared.MaxPixels = None,
    quiet: shared.Quiet = False,
    debug: Debug = False,
) -> None:
    """Train one student on a folder of images: its field against a teacher's grid, its colours against the image.

    No labels. Progress goes to stderr, the curves to CKPT.log.jsonl. The same command after a kill goes on exactly
    where the last checkpoint was. Started by torchrun, the processes share each batch.

    Exit code: 0 done, 1 done but some images were skipped (each is named on stderr), 2 wrong usage.
    """
    check_training(out, evaluate_every, save_every, max_pixels)
    from dataclasses import asdict
    from typing import get_args

    from apm.student.config import PRESETS, Precision

    for kind, name, known in (("preset", preset, PRESETS), ("precision", precision, get_args(Precision))):
        if name not in known:
            raise unknown(kind, name, known)
    from apm.pretrain.config import PretrainConfig
    from apm.pretrain.images import open_images
    from apm.processes import join, local_rank

    config = PretrainConfig(
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        warmup=warmup,
        weight_decay=weight_decay,
        locations=locations,
        rgb_weight=rgb_weight,
        held_out=held_out,
        seed=seed,
    )
    source = open_images(folder)
    from apm.classifier import pick_device
    from apm.images.load import MAX_PIXELS
    from apm.pretrain.cache import build_cache
    from apm.pretrain.checkpoint import check_settings, read_checkpoint
    from apm.pretrain.trainer import Pretrainer
    from apm.student.config import APMConfig
    from apm.teachers import load_grid_teacher

    place = pick_device(device)
    if place.type == "cuda" and place.index is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        place = pick_device(f"cuda:{local_rank()}")  # under torchrun: a GPU for each process
    teacher = load_grid_teacher(teacher_grid, device=place)
    student = APMConfig.preset(preset, dim=teacher.dim, readout="mean")
    size = teacher.grid_size if grid_size is None else grid_size
    data = {"data": source.fingerprint, "teacher": teacher.identity, "grid_size": size}
    if out.exists():  # told now, and not after the grids of many images
        check_settings(out, read_checkpoint(out), student, {**data, **asdict(config)})
    with join() as group:
        talks = group.first and not quiet
        if group.first:
            for note in teacher.notes:
                notice(note)
            notice_if_slow(precision, place)

        def cached(count: int, wanted: bool) -> Any:
            with TrainingProgress(count, "grids", wanted=wanted) as progress:
                return build_cache(
                    source,
                    teacher,
                    cache or out.with_name(out.name + ".cache"),
                    size=student.image_size,
                    grid_size=size,
                    max_pixels=MAX_PIXELS if max_pixels is None else max_pixels,
                    on_image=progress.image,
                )

        # the first process computes the grids; the others find them there
        if group.first:
            images = cached(len(source), talks)
        group.barrier()
        if not group.first:
            images = cached(len(source), False)
        trainer = Pretrainer(
            out,
            images,
            student,
            config,
            data=data,
            precision=precision,  # type: ignore[arg-type]
            device=place,
            processes=group,
        )
        names = {"grid": "grid", "rgb": "colours"}
        train(trainer, names, evaluate_every, save_every, wanted=talks, speaks=group.first)
        if group.first:
            for _, error in images.skipped:
                failure(f"{error}: skipped")
            _summary(trainer, out)
        if images.skipped and group.first:
            raise typer.Exit(1)


def _summary(trainer: Any, out: Path) -> None:
    grid, rgb = trainer.held_out_losses()
    say(
        f"{out}: {trainer.step:,} steps on {len(trainer.train):,} images; held-out mean squared error on "
        f"{len(trainer.held_out):,}: grid {grid:.5f}, colours {rgb:.5f}"
    )
