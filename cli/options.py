"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

DEBUG_KEY = "apm.debug"


def _remember(context: typer.Context, value: bool) -> bool:
    context.meta[DEBUG_KEY] = value  # seen by the group, which is what reports errors
    return value


Debug = Annotated[
    bool, typer.Option("--debug", callback=_remember, help="Show the traceback of an error.", show_default=False)
]
