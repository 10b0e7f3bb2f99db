"""`apm corrupt`: write corrupted copies of a folder of images, in ImageNet-C's tree."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Debug
from .render import failure, progress_on_terminal


def corrupt(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of class folders: SRC/<class>/<image>.")],
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="Folder to write DST/<corruption>/<level>/<class>/<image> to.")
    ],
    corruption: Annotated[
        list[str] | None, typer.Option(help="A corruption of ImageNet-C; repeatable. Default: all 15.")
    ] = None,
    level: Annotated[list[int] | None, typer.Option(help="A severity, 1 to 5; repeatable. Default: all.")] = None,
    seed: Annotated[int, typer.Option(help="Fixes all random draws, with each image's path below SRC.")] = 0,
    resize: Annotated[
        int, typer.Option(help="Short side before the central 224×224 is cut. 224 keeps the whole short side.")
    ] = 256,
    format: Annotated[
        str, typer.Option(help="jpeg (quality 85, as ImageNet-C's own files) or png (keeps the pixels).")
    ] = "jpeg",
    jobs: Annotated[int, typer.Option(help="Number of processes.")] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")] = False,
    debug: Debug = False,
) -> None:
    """Write the corruptions of ImageNet-C for your own images.

    Running again continues: pictures that are there are left alone. They are generated, and not comparable with the
    official ImageNet-C files. Images that cannot be read are named; the exit code is 1 then.
    """
    from apm.benchmarks.corruptions.tree import TreeSettings, TreeWriter

    settings = TreeSettings(seed=seed, resize=resize, format=format)
    writer = TreeWriter(source, target, corruptions=corruption or (), levels=level or (), settings=settings)
    written = skipped = failed = 0
    with progress_on_terminal(len(writer.ids), wanted=not quiet) as progress:
        if progress is not None:
            progress.update(progress.task_ids[0], description="corrupt")
        for report in writer.run(jobs=jobs):
            written, skipped = written + report.written, skipped + report.skipped
            if report.error is not None:
                failed += 1
                failure(report.error)
            if progress is not None:
                progress.advance(progress.task_ids[0])
    if not quiet:
        typer.echo(f"{written:,} pictures written, {skipped:,} were there, {failed:,} images unreadable: {target}")
    if failed:
        raise typer.Exit(1)
