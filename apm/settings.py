"""Settings that are declared once, as fields of a dataclass: commands, methods and records read them from there."""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apm.errors import UsageError, unknown
from apm.images.paths import printable

Check = Callable[[str, Any], None]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a field has besides its type and default."""

    help: str
    default_words: str | None = None
    """The default in words, where the field's own says too little."""
    choices: Sequence[str] = ()
    """The words allowed; none: any value that `check` lets pass."""
    check: Check | None = None
    """Raises a `UsageError` for the field's name and a value that cannot work. None is never checked."""
    parse: Callable[[str], Any] | None = None
    """Reads the value from text, where its type does not say how."""
    option: bool = True
    """Whether commands have an option for it."""


def setting(default: Any, text: str, **details: Any) -> Any:
    """Make a field with a default and a help text; `details` are the other attributes of `Setting`."""
    return dataclasses.field(default=default, metadata={"setting": Setting(help=text, **details)})


def settings_of(kind: type) -> dict[str, Setting]:
    """The settings that a dataclass declares, by field, in order."""
    return {field.name: field.metadata["setting"] for field in dataclasses.fields(kind)}


def text_type(hint: Any) -> Any:
    """The type that a value of a field is read from text as: a Literal's words are str, and None is left out."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    first = next(kind for kind in kinds if kind is not type(None))
    return str if typing.get_origin(first) is typing.Literal else first


_BOOLEANS: dict[str, bool] = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def parse_value(what: str, text: str, hint: Any, setting: Setting | None) -> Any:
    """Read a field's value as its `setting` says, or as its type `hint`; `what` is what an error calls it.

    Raises:
        UsageError: the text is no value of that type, or a number that is not finite.
    """
    if setting is not None and setting.parse is not None:
        return setting.parse(text)
    if text.lower() == "none" and type(None) in typing.get_args(hint):
        return None
    wanted = text_type(hint)
    try:
        value = _BOOLEANS[text.lower()] if wanted is bool else wanted(text)
        if wanted is float and not math.isfinite(value):
            raise ValueError(text)
        return value
    except (ValueError, KeyError):
        kind = {int: "a whole number", float: "a finite number", bool: "true or false"}[wanted]
        raise UsageError(f'{what} is "{text}", which is not {kind}.') from None


def at_least(minimum: int, because: str = "") -> Check:
    """Refuse smaller numbers."""

    def check(name: str, value: int) -> None:
        if value < minimum:
            raise UsageError(f"{name} must be {minimum} or more, not {value}{because}.")

    return check


def positive(name: str, value: float) -> None:
    """Refuse anything but a number above 0."""
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"{name} must be a positive number, not {value}.")


def not_negative(name: str, value: float) -> None:
    """Refuse anything but 0 and numbers above it."""
    if not (math.isfinite(value) and value >= 0):
        raise UsageError(f"{name} must be 0 or a positive number, not {value}.")


def between(lowest: float, highest: float, because: str = "") -> Check:
    """Refuse other numbers than these and those between them."""

    def check(name: str, value: float) -> None:
        if not lowest <= value <= highest:
            raise UsageError(f"{name} must be from {lowest} to {highest}, not {value}{because}.")

    return check


def cosine(name: str, value: float) -> None:
    """Refuse anything but a cosine."""
    if not -1 <= value <= 1:
        raise UsageError(f"{name} is a cosine, from -1 to 1, not {value}.")


def share_of(what: str) -> Check:
    """Refuse anything but a number between 0 and 1, neither of them."""

    def check(name: str, value: float) -> None:
        if not 0 < value < 1:
            raise UsageError(f"{name} is a share of {what}, above 0 and below 1, not {value}.")

    return check


def check_values(settings: Any, shown: Callable[[str], str] = str) -> None:
    """Check every value of a dataclass of settings; None is always right.

    Args:
        settings: an instance.
        shown: how its fields are called in messages.

    Raises:
        UsageError: a value that cannot work; the message holds it.
    """
    for name, one in settings_of(type(settings)).items():
        check_value(name, one, getattr(settings, name), shown)


def check_value(name: str, one: Setting, value: Any, shown: Callable[[str], str] = str) -> None:
    """Check the value of one field, as `check_values` does."""
    if value is None:
        return
    if one.choices and value not in one.choices:
        raise unknown(name, value, one.choices)
    if one.check is not None:
        one.check(shown(name), value)


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Name the settings of `here` that have other values `there`, with both values."""
    return [
        f"{name}: {there.get(name)} there, {value} here" for name, value in here.items() if there.get(name) != value
    ]


def refuse_other(path: str | os.PathLike[str], found: Sequence[str]) -> None:
    """Refuse to continue a file that was made with other settings.

    Raises:
        UsageError: `found` names a difference.
    """
    if found:
        raise UsageError(
            f"{printable(path)} was made with other settings. {'; '.join(found)}. Continue it with those, or give "
            "another --out."
        )
