"""`apm encode`: the teacher's features of images and their views, in a store that any number of runs can read."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from .data import fill_store, load_chosen_teacher, say_notes
from .options import Debug, options_of
from .render import failure, notice, told_when_interrupted
from .run_options import DATA, RUN, TEACHER_HELP, Cells, DataSets, Quiet, Work

FEATURES = "Features"


@options_of(Cells, "cells", DATA)
@options_of(Work, "work", RUN)
def encode(
    out: Annotated[Path, typer.Option(metavar="STORE", help="The store. Run again to continue, or to add images.")],
    datasets: DataSets = None,
    *,
    cells: Cells,
    teacher: Annotated[str | None, typer.Option(help=TEACHER_HELP, rich_help_panel=FEATURES)] = None,
    views: Annotated[
        int, typer.Option(help="Views of each image, the image itself among them.", rich_help_panel=FEATURES)
    ] = 64,
    precision: Annotated[
        str, typer.Option(help="Number format on disk: fp16 or fp32.", rich_help_panel=FEATURES)
    ] = "fp16",
    work: Work,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Encode images and their augmented views once, for runs that read them with apm bench --features STORE.

    Prints the size of the store before it starts. Damaged files are found by their checksums and encoded again. Under
    torchrun the processes share the work: torchrun --nproc-per-node 4 -m apm encode …

    Examples:

    apm encode imagenet --root DATA --teacher ViT-B-16/openai --out stores/imagenet

    apm bench imagenet --root DATA --teacher ViT-B-16/openai --method mta --method tda --features stores/imagenet

    Exit code: 0 done, 1 some images cannot be decoded (each is named on stderr), 2 wrong usage, 130 interrupted.
    """
    planned = cells.plan(datasets or [], work.seed)

    from apm.benchmarks.store.filling import EncodeOptions
    from apm.processes import join

    with join() as group:
        loaded = load_chosen_teacher(teacher, work.device)
        say_notes(loaded, group, quiet=quiet)
        options = EncodeOptions(
            views=views,
            seed=work.seed,
            precision=precision,
            batch_size=work.images_at_a_time(loaded),
            workers=work.workers,
            command=("apm", *sys.argv[1:]),
        )
        stopped = f"interrupted: what was encoded is in {out}. To continue: {shlex.join(options.command)}"
        with told_when_interrupted(stopped, speaks=group.first):
            done = fill_store(out, planned, loaded, options, group, quiet=quiet)
    if group.first and not quiet:
        notice(f"{out} holds {done.images:,} images. To use it: apm bench … --features {shlex.quote(str(out))}")
    if group.first and done.failed:
        failure(f"{done.failed} image(s) cannot be decoded; runs that read {out} will say so of each.")
    if done.failed:
        raise typer.Exit(1)
