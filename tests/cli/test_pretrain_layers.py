"""`apm pretrain --target-layer` as a command: what is trained, and wrong layers told in a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from apm.pretrain.checkpoint import read_network
from apm.pretrain.stand_in import STAND_IN, ShortTower
from apm.teachers.cut_towers import Layers
from tests.apm.teachers.test_cut_towers import tiny_timm
from tests.cli.test_pretrain import FAST, run
from tests.pretraining import GridTeacher, make_folder


def test_a_student_in_place_of_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_timm()
    monkeypatch.setattr("apm.teachers.load_grid_teacher", lambda spec, device: teacher)
    folder, out = make_folder(tmp_path / "images", 8), tmp_path / "student.safetensors"
    command = (folder, "--teacher-grid", "timm:tiny", "--out", out, *FAST)
    code, said, told = run(*command, "--from-layer", "1", "--target-layer", "2", "--local")
    assert code == 0 and "layer 2 held out" in told
    assert said.startswith(f"{out}: 2 steps on 7 images; held-out mean squared error on 1, of the variance: layer 2 ")
    found = read_network(out, STAND_IN)
    assert (found.settings["from_layer"], found.settings["target_layer"], found.settings["rgb_weight"]) == (1, 2, 0)
    assert found.finished and found.settings["teacher"] == teacher.identity
    assert (found.student.local, found.student.image, found.student.prefix) == (True, False, 2)
    assert ShortTower.load(out, Layers(teacher)).last == 2
    assert run(*command, "--from-layer", "1", "--target-layer", "2", "--local")[:2] == (0, said)
    other = run(*command, "--target-layer", "2")
    assert other[:2] == (2, "") and "from_layer: 1 there, 0 here" in other[2] and "local: True there" in other[2]
    plain = run(*command)
    assert plain[:2] == (2, "") and "but of another network, made by `apm pretrain --target-layer`" in plain[2]


def test_wrong_layers_are_told_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = make_folder(tmp_path / "images", 3), tmp_path / "s.safetensors"
    teachers = {"vit": tiny_timm(), "grids": GridTeacher()}
    monkeypatch.setattr("apm.teachers.load_grid_teacher", lambda spec, device: teachers[spec])
    named, last = ("--teacher-grid", "vit"), Layers(teachers["vit"]).count  # type: ignore[arg-type]
    for arguments, message in (
        (("--target-layer", "2"), "--teacher-grid NAME is missing: it names the teacher whose layers are replaced"),
        ((*named, "--target-layer", "0"), "--target-layer must be 1 or more, not 0"),
        ((*named, "--target-layer", f"{last + 1}"), f"has layers 1 to {last}; there is no {last + 1}"),
        ((*named, "--target-layer", "2", "--from-layer", "2"), "does not lie after --from-layer 2"),
        ((*named, "--from-layer", "2"), "need --target-layer, which is missing"),
        ((*named, "--local"), "need --target-layer, which is missing"),
        ((*named, "--target-layer", "2", "--grid-size", "64"), "cannot be combined with --target-layer"),
        ((*named, "--target-layer", "2", "--patch-size", "7"), "cannot be combined with --target-layer"),
        ((*named, "--target-layer", "2", "--grey-input"), "cannot be combined with --target-layer"),
        ((*named, "--target-layer", "2", "--rgb-weight", "2"), "cannot be combined with --target-layer"),
        (("--teacher-grid", "grids", "--target-layer", "2"), '"fake" has no numbered layers'),
    ):
        code, said, told = run(folder, "--out", out, *arguments, *FAST)
        assert said == "" and message in " ".join(told.split()), (arguments, told)
        assert code == 2 and "Traceback" not in told
    assert not list(tmp_path.glob("s.safetensors*"))
