"""Groups of commands."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from apm.errors import unknown


class Group(TyperGroup):
    """A group that names the nearest commands to an unknown one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        if args[0] not in self.commands and not args[0].startswith("-") and not ctx.resilient_parsing:
            raise unknown("command", args[0], self.commands)
        return super().resolve_command(ctx, args)


def command_group(text: str) -> typer.Typer:
    """Make the app of a command that has commands of its own; `text` is the first line of its help."""
    return typer.Typer(cls=Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=text)
