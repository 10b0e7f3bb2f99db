"""The code blocks of README.md and CONTRIBUTING.md run, and do what is said there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import apm
from apm.benchmarks.studies import steps
from apm.text.zeroshot import ZeroShotHead
from tests.fakes import FakeTeacher
from tests.places import ROOT

WEIGHTS = ROOT / "apm" / "teachers" / "embedded_weights" / "open_clip_model.safetensors"
FAST = ["--preset", "small", "--steps", "2", "--device", "cpu"]

# Stands for the installed command: fewer steps, and no teacher that would have to be fetched.
APM = f"""#!{sys.executable}
import sys
sys.path.insert(0, {str(ROOT)!r})
import apm.classifier
import apm.cli.progress
from tests.fakes import FakeTeacher
apm.cli.progress.LINE_EVERY = 3600.0
apm.classifier.load_default_teacher = lambda **_: FakeTeacher(name="ViT-B-16/openai")
if not {WEIGHTS.exists()}:
    apm.classifier.load_teacher = lambda name, **_: FakeTeacher(name=name)
from apm.cli.main import main
if sys.argv[1:2] == ["classify"]:
    sys.argv += {FAST}
elif "bench" in sys.argv and "apm" in sys.argv:
    sys.argv += ["--steps", "2"]
main()
"""


def blocks(file: str, language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / file).read_text(), flags=re.MULTILINE | re.DOTALL)
    assert found
    return found


@pytest.fixture
def place(tmp_path: Path, photographs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder that holds the files the README speaks of, and an `apm` command."""
    shutil.copy(photographs["rocket"], tmp_path / "photo.jpg")
    for folder in ("photos", "scans"):
        (tmp_path / folder).mkdir()
        shutil.copy(photographs["cat"], tmp_path / folder / "cat.png")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "apm").write_text(APM)
    (tmp_path / "bin" / "apm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for block in blocks("README.md", "sh") for line in block.splitlines()])
def test_readme_commands(line: str, place: Path) -> None:
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    shown = done.stdout + (place / "answers.jsonl").read_text() if "answers.jsonl" in line else done.stdout
    assert shown.strip()


@pytest.mark.slow
def test_readme_benchmark_commands(place: Path) -> None:
    """The block builds on its own earlier lines, so it runs as a whole; progress and notes go to stderr."""
    (block,) = blocks("README.md", "bash")
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", block], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "error:" not in done.stderr
    assert "imagenet-sketch" in done.stdout  # the list
    assert done.stdout.count("images: n=20 in ") >= 3  # clean, with fog, and both again in the last table


def test_readme_table_of_steps_is_made_from_the_records() -> None:
    records = [ROOT / "benchmarks" / "results" / f"steps-{preset}.json" for preset in ("paper", "small")]
    shown = (
        (ROOT / "README.md").read_text().partition("<!-- steps")[2].partition("-->\n")[2].partition("<!-- end -->")[0]
    )
    assert shown.strip() == steps.table([json.loads(record.read_text()) for record in records])


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(blocks("README.md", "python"))))
def test_readme_python(number: int, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not WEIGHTS.exists():
        monkeypatch.setattr("apm.classifier.load_teacher", lambda name, **_: FakeTeacher(name=name))
    small = apm.APMConfig.preset
    monkeypatch.setattr(apm.APMConfig, "preset", lambda name, **sizes: small("small", **sizes))
    names: dict[str, Any] = {}
    exec(compile(blocks("README.md", "python")[number], "README.md", "exec"), names)
    if "result" in names:
        assert names["result"].tokens.shape == (2, 512) and names["result"].losses.shape == (2, 20)
    else:
        assert str(names["answer"].path) == "no-such-file.jpg" and "no such file" in names["answer"].error


def test_readme_make_targets_exist() -> None:
    targets = {"demo", "gallery", "test", "lint", "types", "fix", "clean", "all", "bench-speed", "quick", "gpu"}
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    assert {
        name
        for name in re.findall(r"^make ([\w-]+)|`make ([\w-]+)`", text, flags=re.MULTILINE)
        for name in name
        if name
    } <= targets
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_readme_names_only_options_that_exist() -> None:
    from typer.testing import CliRunner

    from apm.cli.main import app

    shown = "".join(CliRunner().invoke(app, [name, "--help"]).stdout for name in ("classify", "bench"))
    for option in set(re.findall(r"`(--[a-z-]+)", (ROOT / "README.md").read_text())):
        assert option in shown, option


def test_contributing_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method is one file and one line, as CONTRIBUTING.md shows it."""
    from apm.benchmarks.methods import REGISTRY, Batch, create_method, create_methods

    method_block = next(block for block in blocks("CONTRIBUTING.md", "python") if "class Mirror:" in block)
    assert len(method_block.splitlines()) <= 40
    names: dict[str, Any] = {"__package__": "apm.benchmarks.methods", "__name__": "apm.benchmarks.methods.mirror"}
    monkeypatch.setitem(sys.modules, "apm.benchmarks.methods.mirror", type(sys)("apm.benchmarks.methods.mirror"))
    exec(compile(method_block, "mirror.py", "exec"), names)
    monkeypatch.setitem(REGISTRY, "mirror", names["Mirror"])

    teacher = FakeTeacher()
    head = ZeroShotHead.build(teacher, ("cat", "dog", "owl"), ("{}",))
    image = Image.radial_gradient("L").convert("RGB").crop((0, 40, 200, 256))
    batch = Batch(["a"], [image], teacher, head)
    plain, mirrored = (create_method(f"mirror:weight={weight}").predict(batch).logits for weight in (0, 0.5))
    torch.testing.assert_close(plain, head.logits(batch.tokens()))
    assert not torch.allclose(plain, mirrored)
    assert create_method("mirror").settings == {"weight": 0.5}
    assert [one.name for one in create_methods(["mirror", "mirror:weight=0.2"])] == ["mirror", "mirror[weight=0.2]"]


def test_contributing_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set is one entry of the table, as CONTRIBUTING.md shows it."""
    from apm.benchmarks.datasets import DATASETS, DatasetSpec, open_dataset

    block = next(block for block in blocks("CONTRIBUTING.md", "python") if block.startswith("DatasetSpec("))
    spec = eval(compile(block, "specs.py", "eval"), {"DatasetSpec": DatasetSpec})
    monkeypatch.setitem(DATASETS, spec.name, spec)  # type: ignore[index]
    images = tmp_path / "birds" / "images"
    images.mkdir(parents=True)
    rows = []
    for label, name in enumerate(("robin", "wren")):
        Image.new("RGB", (8, 8), "brown").save(images / f"{name}.png")
        rows.append([f"{name}.png", label, name])
    (tmp_path / "birds" / "split_birds.json").write_text(json.dumps({"train": [], "val": [], "test": rows}))
    dataset = open_dataset("birds", tmp_path)
    assert dataset.class_names == ("robin", "wren") and [sample.label for sample in dataset.samples] == [0, 1]
    assert dataset.templates == ("a photo of a {}, a type of bird.",)


@pytest.mark.slow
def test_contributing_teacher() -> None:
    """A teacher is any object with the protocol's attributes, as CONTRIBUTING.md shows it."""
    names: dict[str, Any] = {}
    exec(compile(next(b for b in blocks("CONTRIBUTING.md", "python") if "ColourTeacher" in b), "t.py", "exec"), names)
    teacher = names["ColourTeacher"]()
    assert isinstance(teacher, apm.teachers.Teacher)
    student = apm.StudentOptions(preset="small", steps=60, lr=1e-3)
    answer = apm.Classifier(teacher, student=student, device="cpu")(Image.new("RGB", (30, 20), "blue"))
    assert answer.teacher_top[0].label == answer.top[0].label == "blue"
    gridded = apm.Classifier(teacher, student=replace(student, distil="grid"), device="cpu")
    assert gridded(Image.new("RGB", (30, 20), "red")).top[0].label == "red"
