"""How many views of an image make the target of its field: the values of ``--grid-views``; no heavy imports."""

from __future__ import annotations

from apm.errors import UsageError

TOKENS = "tokens"
CROPS = 64
"""Views of ``tokens`` without a number."""


def parse_grid_views(text: str) -> int | str:
    """Read a number of views, ``tokens``, or ``tokens:N``.

    Raises:
        UsageError: it is none of them.
    """
    value = int(text) if text.isdecimal() else text
    check_grid_views("grid_views", value)
    return value


def check_grid_views(_: str, value: int | str) -> None:
    """Refuse what is not a number of views.

    Raises:
        UsageError: with the value.
    """
    count = value if isinstance(value, int) else _tokens(value)
    if count is None or count < 1:
        raise UsageError(f'grid_views is "{value}"; it must be a number of 1 or more, tokens, or tokens:N.')


def number_of(value: int | str) -> tuple[int, bool]:
    """How many views there are, the image itself included, and whether their tokens are the targets."""
    if isinstance(value, int):
        return value, False
    count = _tokens(value)
    assert count is not None
    return count, True


def _tokens(value: str) -> int | None:
    word, _, number = value.partition(":")
    if word != TOKENS or (number and not number.isdecimal()) or (":" in value and not number):
        return None
    return int(number) if number else CROPS
