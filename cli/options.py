"""Options that several commands share."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from apm.test_time.options import StudentOptions, settings_of, text_type

DEBUG_KEY = "apm.debug"


def _remember(context: typer.Context, value: bool) -> bool:
    context.meta[DEBUG_KEY] = value  # seen by the group, which is what reports errors
    return value


Debug = Annotated[
    bool, typer.Option("--debug", callback=_remember, help="Show the traceback of an error.", show_default=False)
]
MaxPixelsOfImage = Annotated[
    int | None, typer.Option(help="Refuse a larger image (width × height). Default: 89478485.")
]


def student_options(
    panel: str,
    *,
    prefix: str = "",
    defaults: Mapping[str, Any] | None = None,
    notes: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each setting of `StudentOptions` in place of its parameter ``student``.

    The command gets a mapping of the settings that were given, by field. A setting that it has an option of its own for
    is left to it.

    Args:
        panel: of the help, for these options.
        prefix: put before each help text.
        defaults: of this command, where they are not those of `StudentOptions`; they count as given.
        notes: what else is to be said of a setting's default.
    """
    other = defaults or {}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        settings = {
            name: one
            for name, one in settings_of(StudentOptions).items()
            if one.option and name not in signature.parameters
        }
        hints = typing.get_type_hints(StudentOptions)
        made = []
        for name, one in settings.items():
            default = other.get(name, one.default_words or getattr(StudentOptions, name))
            text = f"{prefix}{one.help} Default: {default}{(notes or {}).get(name, '')}."
            kind = text_type(hints[name]) if one.parse is None else str
            annotation: Any = Annotated[kind | None, typer.Option(help=text, rich_help_panel=panel)]
            made.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))

        @functools.wraps(command)
        def run(**values: Any) -> None:
            given = dict(other)
            for name, one in settings.items():
                value = values.pop(name)
                if value is not None:
                    given[name] = value if one.parse is None else one.parse(value)
            command(**values, student=given)

        parameters = []
        for parameter in signature.parameters.values():
            new = made if parameter.name == "student" else [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
            parameters.extend(new)
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate
