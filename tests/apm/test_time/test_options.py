"""`StudentOptions`: what is declared there once is an option, a setting, an entry of records and a part of names."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import apm
from apm.cli.main import load_command
from apm.errors import UsageError
from apm.settings import settings_of
from apm.test_time.options import AdaptConfig, StudentOptions
from apm.test_time.queries import FEWER
from apm.test_time.targets import TARGETS, TargetPolicy

CPU = torch.device("cpu")

ONE_MORE = """
import sys
from dataclasses import dataclass
import apm.test_time.options as options

@dataclass(frozen=True, kw_only=True)
class OneMore(options.StudentOptions):
    haste: float = options.setting(0.5, "How hasty the student is.", check=options.at_least(0))

options.StudentOptions = OneMore
from apm.cli.main import main
sys.argv = ["apm", *sys.argv[1:]]
main()
"""


def with_one_more(folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command line of a program whose students have one more option, ``haste``, declared in one place."""
    done = subprocess.run(
        [sys.executable, "-c", ONE_MORE, *arguments], capture_output=True, text=True, cwd=folder, check=False
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.slow
def test_an_option_declared_once_is_in_both_commands_in_records_and_in_names(tmp_path: Path) -> None:
    for command in ("classify", "bench"):
        shown = " ".join(with_one_more(tmp_path, command, "--help").stdout.replace("│", " ").split())
        assert "--haste <float>" in shown and "How hasty the student is. Default: 0.5." in shown

    fast = ("--teacher", "embedded", "--device", "cpu", "--preset", "small", "--steps", "1", "--precision", "fp32")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    said = with_one_more(tmp_path, "classify", *fast, "--haste", "2", "--json", "--out", "answers.jsonl", "red.png")
    assert json.loads(said.stdout)["adaptation"]["haste"] == 2.0
    assert json.loads((tmp_path / "answers.jsonl.settings.json").read_text())["haste"] == 2.0

    variants = ("--method", "apm", "--method", "apm:haste=4")
    with_one_more(tmp_path, "bench", "digits", *fast, *variants, "--haste", "3", "--limit", "1", "--out", "run")
    methods = json.loads((tmp_path / "run" / "run.json").read_text())["config"]["methods"]
    assert {name: one["haste"] for name, one in methods.items()} == {"apm": 3.0, "apm[haste=4]": 4.0}

    wrong = with_one_more(tmp_path, "bench", "digits", *fast, "--method", "apm:haste=-1", "--out", "run2", code=2)
    assert "haste must be 0 or more, not -1" in wrong.stderr


def test_both_commands_say_the_same_of_every_option() -> None:
    helps = {
        name: {parameter.name: parameter.help for parameter in load_command(name).params if hasattr(parameter, "help")}
        for name in ("classify", "bench")
    }
    options = {name for name, one in settings_of(StudentOptions).items() if one.option}
    own = {"seed", "views"}  # in `apm bench` of the whole run, and of every method
    assert options <= set(helps["classify"]) and options <= set(helps["bench"])
    for name in options - own:
        text = settings_of(StudentOptions)[name].help
        assert str(helps["classify"][name]).startswith(text)
        assert str(helps["bench"][name]).startswith(f"apm: {text}")
    assert str(helps["classify"]["queries"]).endswith("Default: auto.")
    assert str(helps["bench"]["queries"]).endswith("Default: all.")


def test_words_for_defaults_are_true() -> None:
    settings = settings_of(StudentOptions)
    named = {policy.views for name, policy in TARGETS.items() if name not in ("cls", "best")}
    (views,), best = named, TARGETS["best"].views
    assert settings["views"].default_words == f"{views}; {best} with --target best"
    assert f"best is the best one found ({TARGETS['best'].kind} of {best} views)" in settings["target"].help
    assert settings["readout"].default_words == "query; mean with --distil grid"
    assert StudentOptions().chosen_readout == "query" and StudentOptions(distil="grid").chosen_readout == "mean"


def test_every_setting_of_a_target_can_be_chosen() -> None:
    fields = {field.name for field in dataclasses.fields(TargetPolicy)}
    assert fields - set(settings_of(StudentOptions)) == {"kind"}
    chosen = StudentOptions(target="confident", views=7, min_area=0.25, keep=0.5, cls_weight=0.75)
    expected = TargetPolicy(kind="confident", views=7, min_area=0.25, keep=0.5, cls_weight=0.75)
    assert chosen.policy() == expected and chosen.record(CPU).items() >= {"views": 7, "min_area": 0.25}.items()


def test_the_record_holds_what_is_used() -> None:
    record = StudentOptions(target="mta").record(CPU)
    assert record["queries"] == FEWER["paper"] and record["readout"] == "query" and record["views"] == 16
    assert set(record) == {field.name for field in dataclasses.fields(StudentOptions)}
    assert json.loads(json.dumps(record)) == record
    assert StudentOptions(queries="all").record(CPU)["queries"] is None


def test_the_trainer_gets_every_setting_it_shares() -> None:
    changed = {"steps": 3, "lr": 0.5, "distil": "both", "rgb_weight": 0.1, "agree": 0.3, "precision": "fp32", "seed": 4}
    changed |= {"loss": "soft", "temperature": 3.0, "tolerance": 0.2, "queries": 5}
    assert set(changed) == {field.name for field in dataclasses.fields(AdaptConfig)}
    assert StudentOptions(**changed).training(CPU) == AdaptConfig(**changed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"views": 8}, 'views with the target "cls"'),
        ({"readout": "mode"}, "add distil=both"),
        ({"agree": -1.0}, "agree must be 0 or a positive number, not -1.0"),
        ({"loss": "hard"}, 'Unknown loss "hard"'),
        ({"loss": "soft", "distil": "grid"}, 'use distil="both"'),
        ({"loss": "soft", "temperature": 0.0}, "temperature must be from 0.01 to 1000, not 0.0"),
        ({"loss": "soft", "temperature": float("nan")}, "temperature must be from 0.01 to 1000, not nan"),
        ({"loss": "soft", "temperature": 1e30}, "to 1000, not 1e\\+30: float32 has too few digits"),
        ({"temperature": 2.5}, "temperature=2.5 but loss=mse uses no temperature; add loss=soft"),
        ({"target": "mat"}, 'Did you mean "mta"'),
        ({"target": "mta", "distil": "grid"}, "uses no token; write distil=both"),
        ({"target": "mta", "views": 0}, "0 views"),
        ({"preset": "papr"}, 'Did you mean "paper"'),
        ({"queries": "few"}, 'queries is "few"'),
        ({"lr": float("inf")}, "lr must be a positive number, not inf"),
        ({"seed": -1}, "seed must be from 0 to 9223372036854775807, not -1"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_said(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        apm.StudentOptions(**changes)  # type: ignore[arg-type]
