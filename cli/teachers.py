"""`apm teachers`: what teachers there are, and which are on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Debug

if TYPE_CHECKING:
    from rich.table import Table

    from apm.teachers import TeacherInfo


_WIDTH = 200  # wider than any row: a cut name could not be copied


def teachers(
    everything: Annotated[
        bool, typer.Option("--all", help="List every teacher that open_clip knows, not just the well-known ones.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line per teacher and nothing else.")] = False,
    debug: Debug = False,
) -> None:
    """List teachers: width, input, size, and whether the weights are on this machine."""
    from apm.teachers import list_teachers

    rows = list_teachers(everything=everything)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(asdict(row)))
        return
    typer.echo(as_text(table(rows)))
    typer.echo(
        "--teacher also takes NAME/PATH-TO-CHECKPOINT, hf-hub:ORG/REPO and local-dir:PATH."
        + ("" if everything else " `apm teachers --all` lists every name.")
    )


def table(rows: tuple[TeacherInfo, ...]) -> Table:
    """Lay the teachers out: the number of weights in millions, and the size of those on this machine in megabytes."""
    from rich.table import Table

    view = Table(box=None, pad_edge=False)
    view.add_column("teacher", no_wrap=True)
    for title in ("dim", "image", "parameters", "here"):
        view.add_column(title, justify="right", no_wrap=True)
    view.add_column("from", no_wrap=True)
    for row in rows:
        view.add_row(
            row.name + (" (default)" if row.default else ""),
            _or_dash(row.dim),
            _or_dash(row.image_size),
            "–" if row.parameters is None else f"{row.parameters / 1e6:.1f} M",
            "no" if row.size is None else f"{row.size / 1e6:.1f} MB",
            row.source,
        )
    return view


def as_text(view: Table) -> str:
    """Render for stdout, whole lines however narrow it is; printed by the caller, who knows about closed pipes."""
    from rich.console import Console

    console = Console(width=_WIDTH, highlight=False)
    with console.capture() as captured:
        console.print(view)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _or_dash(value: int | None) -> str:
    return "–" if value is None else str(value)
