"""Groups of commands."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

from apm.errors import unknown


class Group(TyperGroup):
    """A group that names the nearest commands to an unknown one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        if args[0] not in self.commands and not args[0].startswith("-") and not ctx.resilient_parsing:
            raise unknown("command", args[0], self.commands)
        return super().resolve_command(ctx, args)
