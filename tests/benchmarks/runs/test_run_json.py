"""A damaged run.json is one line of error, or does no harm; changed configurations are told in words."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from apm.benchmarks.report.page import Options, render
from apm.benchmarks.runs.records import Records
from apm.benchmarks.runs.run_json import changed_configuration, read_run
from apm.benchmarks.tables.build import make_tables
from apm.benchmarks.tables.compare import Limits, compare
from apm.benchmarks.tables.formats import FORMATS
from apm.errors import UsageError
from tests.places import ROOT

HUB = ROOT / "tests" / "golden" / "tables" / "hub"
VALUES: tuple[Any, ...] = (None, [], {}, "x", "\x1b[31m\x00", -1, 1.5, 10**400, True, [[1]], {"a": {}})
MUTATIONS = 150


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of everything below a JSON value; of long lists the first two entries."""
    inside = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, one in inside:
        yield (*path, key)
        yield from places(one, (*path, key))


def mutations() -> Iterator[tuple[str, Any]]:
    """Yield records of which one value is gone, or is another."""
    whole = json.loads((HUB / "run.json").read_text())
    everywhere = [(path, number) for path in places(whole) for number in range(len(VALUES) + 1)]
    for path, number in random.Random(0).sample(everywhere, MUTATIONS):
        record = deepcopy(whole)
        holder = record
        for key in path[:-1]:
            holder = holder[key]
        if number == len(VALUES):
            del holder[path[-1]]
        else:
            holder[path[-1]] = VALUES[number]
        yield f"{path} {number}", record


def use(folder: Path) -> None:
    """All that reads a run: tables in every form, the report, a comparison."""
    records = Records.open(folder)
    tables = make_tables([records], oracle=True)
    for form in FORMATS.values():
        form(tables)
    render([records], tables, Options(pictures=False))
    compare(records, records, Limits())


@pytest.mark.slow
def test_a_damaged_record_is_one_line_of_error_or_does_no_harm(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(HUB, folder)
    refused = 0
    for name, record in mutations():
        (folder / "run.json").write_text(json.dumps(record))
        try:
            use(folder)
        except UsageError as error:
            assert "run.json" in str(error) or "finish it" in str(error).lower(), (name, error)
            assert str(error).isprintable(), (name, error)
            assert len(str(error)) < 400, (name, error)
            refused += 1
        except Exception as error:
            raise AssertionError(f"{name}: {error!r}") from error
    assert refused > 0.7 * MUTATIONS  # texts such as a title may be any text


@pytest.mark.slow
def test_damaged_bytes_are_one_line_of_error_or_do_no_harm(tmp_path: Path) -> None:
    folder, draw = tmp_path / "run", random.Random(0)
    shutil.copytree(HUB, folder)
    whole = (HUB / "run.json").read_bytes()
    damaged = [whole[: draw.randrange(len(whole))] for _ in range(15)]
    for _ in range(30):
        content = bytearray(whole)
        content[draw.randrange(len(whole))] = draw.randrange(256)
        damaged.append(bytes(content))
    damaged += [b"[" * 200_000, whole.replace(b'"seed": 0', b'"seed": NaN'), b"", b"\xff\xfe", b"null"]
    for content in damaged:
        (folder / "run.json").write_bytes(content)
        try:
            use(folder)
        except UsageError as error:
            assert str(error).isprintable() and len(str(error)) < 400, error


def test_the_records_of_this_repository_are_whole() -> None:
    found = [*ROOT.glob("benchmarks/results/**/run.json"), *ROOT.glob("tests/**/run.json")]
    assert len(found) > 5
    for path in found:
        assert read_run(path) is not None


def test_changed_prompts_and_class_names_are_shown_themselves() -> None:
    old = json.loads((HUB / "run.json").read_text())
    new = deepcopy(old)
    assert changed_configuration(old, new) == ""
    (cell,) = new["config"]["cells"].values()
    cell["prompt_set"], cell["label_set"] = "q", "m"
    new["prompt_sets"] = {"q": ["a photo of a {}.", "a sketch of a {}."]}
    (names,) = old["label_sets"].values()
    new["label_sets"] = {"m": [*names[1:], names[0]]}
    assert changed_configuration(old, new) == (
        'class names in another order, from place 0 on: "class 0", "class 1", "class 2" and 97 more before, '
        '"class 1", "class 2", "class 3" and 97 more now (cells: caltech101); '
        'prompts: nothing before, "a sketch of a {}." now (cells: caltech101)'
    )
    new["config"] = {**old["config"], "cells": {}, "seed": 3}
    assert changed_configuration(old, new) == "seed: 0 before, 3 now; cells only before: caltech101"
