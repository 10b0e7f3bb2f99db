"""Errors that are meant for people: each message says what, the value, and what to do.

The command line maps them to exit codes: `UsageError` to 2, `ImageError` to 1 at the end of a run (the other inputs are
still answered), any other `ApmError` to 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

_LIST_AT_MOST = 24


class ApmError(Exception):
    """Base of all errors this package raises on purpose; its text is one sentence or a few, for people."""


class UsageError(ApmError):
    """Wrong usage, an unknown name or missing data: nothing was computed."""


class TeacherError(UsageError):
    """A teacher cannot be had: unknown name, weights not on this machine and not reachable, damaged or unsafe file."""


class ImageError(ApmError):
    """One input cannot be read as an image; the others are not touched by it."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``' Did you mean "x" or "y"?'`` for the names nearest to `name`, or an empty string."""
    by_folded = {candidate.casefold(): candidate for candidate in known if candidate != name}
    near = [by_folded[hit] for hit in difflib.get_close_matches(name.casefold(), by_folded, n=3, cutoff=0.6)]
    if not near:
        return ""
    return " Did you mean " + " or ".join(f'"{candidate}"' for candidate in near) + "?"


def few(names: Sequence[str], count: int = 3) -> str:
    """The first few of some names, for a sentence: ``a, b, c, …``."""
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """Build the error for an unknown `name` of some `kind`: the nearest names, and the whole list when it is short.

    Args:
        kind: what the name stands for, for people: "label set", "preset".
        name: what the user gave.
        known: the names that would have been right.
    """
    names = sorted(set(known))
    listing = f" Known: {', '.join(names)}." if 0 < len(names) <= _LIST_AT_MOST else ""
    return UsageError(f'Unknown {kind} "{name}".{did_you_mean(name, names)}{listing}')
