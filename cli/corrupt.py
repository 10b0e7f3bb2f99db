"""`apm corrupt`: write corrupted copies of a folder of images, in ImageNet-C's tree."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Debug
from .progress import counted
from .render import failure, say, told_when_interrupted


def corrupt(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Folder with one folder per class: SRC/<class>/<image>.")
    ],
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="Where to write: DST/<corruption>/<level>/<class>/<image>.")
    ],
    corruption: Annotated[
        list[str] | None,
        typer.Option(help="A corruption of ImageNet-C, or all (the 15). Repeat for several. Default: all."),
    ] = None,
    level: Annotated[
        list[int] | None, typer.Option(help="Severity, 1 to 5. Repeat for several. Default: all five.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the random draws, which also depend on each image's path below SRC.")
    ] = 0,
    resize: Annotated[
        int,
        typer.Option(
            help="Length of the short side before the central 224×224 is cut out; 224 keeps the whole short side."
        ),
    ] = 256,
    format: Annotated[str, typer.Option(help="jpeg (quality 85, as in ImageNet-C) or png (lossless).")] = "jpeg",
    jobs: Annotated[int, typer.Option(help="Number of processes.")] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")] = False,
    debug: Debug = False,
) -> None:
    """Write corrupted copies of your images: the 15 corruptions of ImageNet-C, each at 5 levels.

    Copies that already exist are kept, so the same command continues an interrupted run. Results on these copies cannot
    be compared with results on the official ImageNet-C files: the random draws and the frost pictures differ.

    Images that cannot be read are named on stderr, and the exit code is then 1.
    """
    from apm.benchmarks.datasets.corrupted_tree import TreeSettings, TreeWriter

    settings = TreeSettings(seed=seed, resize=resize, format=format)
    named = () if corruption is None or "all" in corruption else corruption  # none named: all 15
    writer = TreeWriter(source, target, corruptions=named, levels=level or (), settings=settings)
    written = skipped = failed = done = 0
    with (
        told_when_interrupted(
            lambda: f"interrupted: {done:,} of {len(writer.ids):,} images are done; the same command goes on"
        ),
        counted("corrupt", wanted=not quiet) as far,
    ):
        for report in writer.run(jobs=jobs):
            written, skipped = written + report.written, skipped + report.skipped
            if report.error is not None:
                failed += 1
                failure(report.error)
            done += 1
            far(done, len(writer.ids))
    if not quiet:
        say(f"{written:,} pictures written, {skipped:,} existed already, {failed:,} images unreadable: {target}")
    if failed:
        raise typer.Exit(1)
