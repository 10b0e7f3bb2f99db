"""The recorded baseline is reproduced, and the example of a user's CI is a command that exists."""

from __future__ import annotations

import shlex

import pytest
import yaml

from apm.benchmarks.runs.records import Records
from apm.benchmarks.studies import baseline
from apm.cli.main import load_command
from tests.places import ROOT

FOLDER = ROOT / "tests" / "baseline"
EXAMPLE = ROOT / "benchmarks" / "examples" / "imagenet_c_regression.yml"


@pytest.mark.slow
def test_the_recorded_baseline_is_reproduced(capfd: pytest.CaptureFixture[str]) -> None:
    if not (FOLDER / "run.json").is_file():
        pytest.skip("no baseline recorded: python -m apm.benchmarks.studies.baseline record tests/baseline")
    assert baseline.check(FOLDER) == 0, capfd.readouterr().err


def test_the_recorded_baseline_holds_every_method_that_it_runs() -> None:
    if not (FOLDER / "run.json").is_file():
        pytest.skip("no baseline recorded: python -m apm.benchmarks.studies.baseline record tests/baseline")
    records = Records.open(FOLDER)
    assert {name.partition("[")[0] for name in records.methods} == {
        option.removeprefix("--method=") for option in baseline.METHODS
    }
    assert {cell["corruption"] for cell in records.cells.values()} == {None, "gaussian_noise", "contrast", "pixelate"}
    for cell, header in records.cells.items():
        assert {method: len(rows) for method, rows in records.rows(cell)} == dict.fromkeys(
            records.methods, header["images"]
        )


def parses(line: str) -> None:
    """Let the command line read the arguments, without doing anything."""
    program, name, *arguments = shlex.split(line.partition(">>")[0])
    assert program == "apm"
    load_command(name).make_context(name, arguments)


def test_the_baseline_command_and_the_example_workflow_are_understood() -> None:
    parses(shlex.join(["apm", "bench", *baseline.BENCH]))
    parses(shlex.join(["apm", "compare", "new", "old", *baseline.COMPARE]))
    steps = yaml.safe_load(EXAMPLE.read_text())["jobs"]["compare"]["steps"]
    lines = [step["run"] for step in steps if step.get("run", "").startswith("apm")]
    assert [line.split()[1] for line in lines] == ["bench", "compare", "table"]
    assert "imagenet-c --level 5 --limit 500" in lines[0]
    for line in lines:
        parses(line)
