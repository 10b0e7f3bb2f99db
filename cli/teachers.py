"""`apm teachers`: what teachers there are, and which are on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from .options import Debug
from .render import say, say_json
from .table import print_table


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
            say_json(json.dumps(asdict(row)))
        return
    lines = [
        [
            row.name + (" (default)" if row.default else ""),
            str(row.dim or "–"),
            str(row.image_size or "–"),
            f"{row.parameters / 1e6:.1f} M" if row.parameters else "–",
            f"{row.size / 1e6:.1f} MB" if row.size else "no",
            row.source,
        ]
        for row in rows
    ]
    print_table(["teacher", "dim", "image", "parameters", "here", "from"], lines)
    say(
        "--teacher also takes NAME/PATH-TO-CHECKPOINT, hf-hub:ORG/REPO and local-dir:PATH."
        + ("" if everything else " `apm teachers --all` lists every name.")
    )
