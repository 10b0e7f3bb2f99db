"""`apm report`: one HTML page from run folders, for people to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Debug
from .render import say


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run folders of apm bench.")],
    out: Annotated[Path, typer.Option(help="Folder for index.html; an earlier report in it is replaced.")],
    flips: Annotated[int, typer.Option(min=0, help="Flipped images shown for each cell; the others are counted.")] = 12,
    images: Annotated[
        bool, typer.Option("--images/--no-images", help="Show the flipped images, if their data set is found.")
    ] = True,
    published: Annotated[
        bool, typer.Option("--published/--no-published", help="Include the published rows, marked as such.")
    ] = True,
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Include the best step, chosen with the test labels and marked as such.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Write one self-contained HTML page from the records of runs.

    Shows first what can be trusted, with a chart of gain against cost; then the tables of apm table, accuracy by
    corruption and level, flips with the images that flipped, adaptation, calibration, speed, and the settings of each
    run. The page loads nothing from the network, so it can be opened from disk, sent, or archived. It contains the
    paths and commands of the runs and (unless --no-images) small pictures.

    Prints the page's path.
    """
    from apm.benchmarks.report import Options, write_report

    from .table import warn

    options = Options(published=published, oracle=oracle, flips=flips, pictures=images)
    page, tables = write_report(runs, out, options)
    warn(tables)
    say(str(page))
