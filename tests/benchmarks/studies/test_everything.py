"""The one page of the whole: made from the code, of every published row, with commands that are there."""

from __future__ import annotations

import itertools
import re
import shlex
from importlib import import_module
from typing import Any

import pytest

from apm.benchmarks.methods import REGISTRY, parse_method
from apm.benchmarks.reproduce.recipes import PAPER
from apm.benchmarks.studies import everything
from apm.benchmarks.studies.study import block
from apm.benchmarks.tables.build import published_rows
from apm.cli.main import load_command

COMMANDS = sorted(set(re.findall(r"`((?:apm|python -m) [^`]+)`", everything.DOCUMENT.read_text(encoding="utf-8"))))


def test_the_page_is_what_the_code_makes() -> None:
    for name, text in everything.parts():
        assert block(everything.DOCUMENT, name) == text, "run python -m apm.benchmarks.studies.everything"


@pytest.mark.parametrize("number", PAPER)
def test_every_published_row_is_there_once(number: int) -> None:
    lines = block(everything.DOCUMENT, f"table {number}").splitlines()
    shown = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")][1:]
    rows = published_rows(PAPER[number].published)
    names = [row["method"] if row["teacher"] == "none" else f"{row['method']} · {row['teacher']}" for row in rows]
    assert shown == names
    assert {recipe.row for recipe in PAPER[number].recipes} <= {row["method"] for row in rows}


MENTIONED = {"apm reproduce", "apm pretrain --grey-input"}
"""Said in passing, without all that they need."""


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_can_be_given_as_they_stand(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "python":
        import_module(words[2])
        return
    found: Any = load_command(words[1])
    rest = words[2:]
    while hasattr(found, "commands"):
        found = found.commands[rest.pop(0)]
    options = {flag for parameter in found.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in rest if word.startswith("--")} <= options
    if command not in MENTIONED:
        found.make_context(words[1], list(rest))  # raises where something is missing or too much
    for flag, value in itertools.pairwise(rest):
        if flag == "--method":
            assert parse_method(value)[0] in REGISTRY
