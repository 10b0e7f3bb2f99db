"""Options that several commands share."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer

from apm.settings import at_least, check_value, settings_of, text_type
from apm.test_time.options import StudentOptions

DEBUG_KEY = "apm.debug"


def _remember(context: typer.Context, value: bool) -> bool:
    context.meta[DEBUG_KEY] = value  # seen by the group, which is what reports errors
    return value


Debug = Annotated[
    bool, typer.Option("--debug", callback=_remember, help="Show the traceback of an error.", show_default=False)
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print one JSON line per image and nothing else.")]
LinesOnly = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the lines and errors.")]


def pixel_limit(value: int | None) -> int | None:
    """Refuse a limit that lets no image pass."""
    if value is not None:
        at_least(1)("--max-pixels", value)
    return value


MaxPixels = Annotated[
    int | None, typer.Option(help="Refuse larger images (width × height). Default: 89478485.", callback=pixel_limit)
]


def student_options(
    panel: str,
    *,
    prefix: str = "",
    defaults: Mapping[str, Any] | None = None,
    notes: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each setting of `StudentOptions` in place of its parameter ``student``.

    The command gets a mapping of the settings that were given, by field. A setting for which it has an option of its
    own is left out.

    Args:
        panel: of the help, for these options.
        prefix: put before each help text.
        defaults: of this command, where they are not those of `StudentOptions`; they count as given.
        notes: by field, additions to the text on its default.
    """
    other = defaults or {}
    hints = typing.get_type_hints(StudentOptions)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        taken = inspect.signature(command).parameters
        settings = {n: one for n, one in settings_of(StudentOptions).items() if one.option and n not in taken}
        made = []
        for name, one in settings.items():
            default = other.get(name, one.default_words or getattr(StudentOptions, name))
            text = f"{prefix}{one.help} Default: {default}{(notes or {}).get(name, '')}."
            kind = text_type(hints[name]) if one.parse is None else str
            made.append(_parameter(name, kind | None, None, text, panel))

        def given(values: dict[str, Any]) -> dict[str, Any]:
            found = dict(other)
            for name, one in settings.items():
                value = values.pop(name)
                if value is not None:
                    found[name] = value if one.parse is None else one.parse(value)
                    check_value(name, one, found[name], flag)  # now, and not once a teacher is loaded
            return found

        return _replaced(command, "student", made, given)

    return decorate


def options_of(
    kind: type, parameter: str, panel: str | None = None, *, spelled: Mapping[str, str] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for each setting of a dataclass in place of one of its parameters.

    The command gets an instance of the dataclass.

    Args:
        kind: the dataclass.
        parameter: name of the parameter.
        panel: of the help, for these options; None: that of the command's own options.
        spelled: by field, the option's names where they differ from the field's, and the placeholder for its value:
            ``--quiet -q``, ``FILE``.
    """
    hints = typing.get_type_hints(kind)
    settings = {name: one for name, one in settings_of(kind).items() if one.option}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        made = []
        for name, one in settings.items():
            default, hint = getattr(kind, name), text_type(hints[name])
            if one.parse is not None:
                default, hint = None if default is None else str(default), str
            text = f"{one.help} Default: {one.default_words}." if one.default_words else one.help
            words = (spelled or {}).get(name, "").split()
            made.append(_parameter(name, hint | None if default is None else hint, default, text, panel, words))

        def gathered(values: dict[str, Any]) -> Any:
            given = {name: values.pop(name) for name in settings}
            parsed = {
                name: one.parse(given[name]) for name, one in settings.items() if one.parse and given[name] is not None
            }
            return kind(**{**given, **parsed})

        return _replaced(command, parameter, made, gathered)

    return decorate


def flag(name: str) -> str:
    """What the option of a setting is called."""
    return "--" + name.replace("_", "-")


def _parameter(
    name: str, kind: Any, default: Any, text: str, panel: str | None, spelled: Sequence[str] = ()
) -> inspect.Parameter:
    names = [word for word in spelled if word.startswith("-")]
    if kind is bool and not default and not names:  # without its opposite, --no-NAME
        names = [flag(name)]
    metavar = next((word for word in spelled if not word.startswith("-")), None)
    option = typer.Option(*names, help=text, rich_help_panel=panel, metavar=metavar)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _replaced(
    command: Callable[..., None],
    parameter: str,
    made: Sequence[inspect.Parameter],
    gather: Callable[[dict[str, Any]], Any],
) -> Callable[..., None]:
    """Replace one parameter of a command by several; in its place it gets what `gather` takes out of their values."""
    signature = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def run(**values: Any) -> None:
        gathered = gather(values)
        command(**values, **{parameter: gathered})

    parameters: list[inspect.Parameter] = []
    for one in signature.parameters.values():
        parameters += made if one.name == parameter else [one.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run
