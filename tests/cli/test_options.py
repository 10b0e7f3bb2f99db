"""Options that are made of a dataclass's settings."""

# No `from __future__ import annotations`: the command below is declared inside of a function.

from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from apm.cli.options import options_of
from apm.errors import UsageError
from apm.settings import at_least, check_values, setting


@dataclass(frozen=True, kw_only=True)
class Walk:
    """Settings of a walk."""

    steps: int = setting(3, "How many.", check=at_least(1))
    pace: str = setting("slow", "How fast.", choices=("slow", "fast"))
    to: Path | None = setting(None, "Where to.", default_words="home")  # noqa: RUF009  (`setting` makes fields)
    hurry: bool = setting(False, "Be quick.")
    by_night: bool = setting(False, "Go in the dark.")
    back: bool = setting(True, "And back again.")
    shoes: str = setting("boots", "Not an option.", option=False)

    def __post_init__(self) -> None:
        """Check each value."""
        check_values(self)


Called = list[tuple[str, Walk, int]]


@pytest.fixture
def app() -> tuple[typer.Typer, Called]:
    """A command that takes a walk between two parameters of its own, and what it was called with."""
    called: Called = []
    made = typer.Typer()

    @made.command()
    @options_of(Walk, "walk", "The walk", spelled={"hurry": "--hurry -h", "to": "DIR"})
    def go(who: str, walk: Walk, times: int = 1) -> None:
        called.append((who, walk, times))

    return made, called


def test_a_command_gets_the_dataclass_that_its_options_say(
    app: tuple[typer.Typer, Called],
) -> None:
    made, called = app
    given = ["--steps", "7", "--pace", "fast", "--to", "x/y", "-h", "--by-night", "--no-back", "--times", "2"]
    for arguments in (["me"], ["me", *given]):
        assert CliRunner().invoke(made, arguments, catch_exceptions=False).exit_code == 0
    assert called == [
        ("me", Walk(), 1),
        ("me", Walk(steps=7, pace="fast", to=Path("x/y"), hurry=True, by_night=True, back=False), 2),
    ]


def test_help_holds_text_default_and_what_stands_for_a_value(
    app: tuple[typer.Typer, Called],
) -> None:
    shown = CliRunner().invoke(app[0], ["--help"], env={"COLUMNS": "120"}).stdout
    for text in ("The walk", "How many. [default: 3]", "Where to. Default: home.", "DIR", "--hurry"):
        assert text in shown
    assert "--no-back" in shown and "--no-by-night" not in shown  # what is off has no opposite
    assert "--shoes" not in shown and "--walk" not in shown


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--steps", "0"], "steps must be 1 or more, not 0"), (["--pace", "fats"], 'Did you mean "fast"')],
)
def test_a_value_that_cannot_work_is_refused_before_the_command_is_called(
    arguments: list[str], told: str, app: tuple[typer.Typer, Called]
) -> None:
    made, called = app
    with pytest.raises(UsageError, match=told):
        CliRunner().invoke(made, ["me", *arguments], catch_exceptions=False)
    assert not called
