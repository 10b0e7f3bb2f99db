"""The wheel: everything in it, nothing beside it, and it works in an environment outside the clone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.places import ROOT

FOLDERS = {"apm": "apm", "cli": "apm/cli", "benchmarks": "apm/benchmarks"}
RECORDS = ROOT / "benchmarks" / "results"  # evidence for the repository's own figures: of no use to an installation
WEIGHTS = ROOT / "apm" / "teachers" / "embedded_weights" / "open_clip_model.safetensors"

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_REQUIRE"))}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy: what an earlier build left in the clone must not hide a missing file."""
    copy = tmp_path_factory.mktemp("source") / "apm"
    copy.mkdir()
    for name in (*FOLDERS, "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy)
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, cwd=copy)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bin folder of a fresh environment: the wheel, and the dependencies that the tests run with."""
    folder = tmp_path_factory.mktemp("elsewhere")
    run(sys.executable, "-m", "venv", "env", cwd=folder)
    scripts = folder / "env" / "bin"
    run(scripts / "python", "-m", "pip", "install", "--no-index", "--no-deps", wheel, cwd=folder)
    site = run(scripts / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    # A folder named in a .pth file is searched, but its own .pth files (the editable install) are not obeyed.
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(site, "dependencies.pth").write_text("\n".join(sorted(dependencies)))
    return scripts


def test_the_wheel_holds_every_file_and_no_other_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    assert {name.split("/")[0] for name in inside} == {"apm", wheel.name.rsplit("-", 3)[0] + ".dist-info"}
    expected = {
        f"{target}/{path.relative_to(ROOT / source).as_posix()}"
        for source, target in FOLDERS.items()
        for path in (ROOT / source).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and RECORDS not in path.parents
    }
    assert expected - inside == set()
    assert {name for name in inside if not name.split("/")[0].endswith(".dist-info")} - expected == set()
    assert any(name.endswith("licenses/LICENSE") for name in inside)


def test_it_is_imported_from_its_own_place(environment: Path, tmp_path: Path) -> None:
    code = (
        "import apm, apm.cli, apm.benchmarks; print(apm.__file__, apm.cli.__file__, apm.benchmarks.__file__, sep='\\n')"
    )
    for line in run(environment / "python", "-c", code, cwd=tmp_path).splitlines():
        assert Path(line).is_relative_to(environment.parent)
    code = "import importlib.util as u; print(u.find_spec('cli'), u.find_spec('benchmarks'))"
    assert run(environment / "python", "-c", code, cwd=tmp_path) == "None None\n"


@pytest.mark.skipif(not WEIGHTS.exists(), reason="the embedded teacher's weights are not in this tree")
def test_it_classifies_a_photograph(environment: Path, tmp_path: Path, photographs: dict[str, Path]) -> None:
    shutil.copy(photographs["cat"], tmp_path / "a photo.png")
    out = run(
        *(environment / "apm", "classify", "a photo.png", "--json", "--teacher", "embedded"),
        *("--labels", "cat,rocket,coffee,castle", "--preset", "small", "--device", "cpu"),
        cwd=tmp_path,
    )
    record = json.loads(out)
    assert record["path"] == "a photo.png" and record["teacher_top"][0]["label"] == "cat"
    assert run(environment / "apm", "--help", cwd=tmp_path) == run(
        environment / "python", "-m", "apm", "--help", cwd=tmp_path
    )
