"""The study of islands: conditions that differ as they should, and a page made from its records."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from apm.benchmarks.studies import islands as study
from apm.benchmarks.studies import study as documents
from apm.cli.main import app
from tests.apm.test_time.test_island_fields import ADAPT, IMAGES
from tests.benchmarks.studies.test_pointing import TINY, ColourTeacher


@pytest.mark.slow
def test_a_student_of_the_grid_follows_the_image_and_one_of_the_token_does_not() -> None:
    found = study.study(IMAGES, ColourTeacher(), TINY, ADAPT, parts=4, grid_lr=1e-2)  # type: ignore[arg-type]
    grid = found["conditions"]["grid"]
    assert grid["image"]["AMI image"][0] > 0.6
    assert grid["image"]["contrast image"][0] > grid["image"]["contrast other image"][0] + 0.2  # cut elsewhere
    assert grid["other target"]["contrast other image"][0] > grid["other target"]["contrast image"][0] + 0.2
    for control in ("random target", "other target", "no steps"):
        assert found["differences"]["grid"][control]["contrast image"][0] > 0.2
    for measure in ("AMI", "contrast"):
        against = {target: found["image_against_other"][target][measure][0] for target in study.TARGETS}
        assert against["grid"] > 0.2 > abs(against["cls"]), measure
    assert found["same_regions"]["grid"][0] < found["same_regions"]["cls"][0]
    assert found["references"]["teacher's grid"][0] > 0.9
    json.dumps(found, allow_nan=False)


def test_the_page_names_the_command_of_its_pictures() -> None:
    for path in documents.RESULTS.glob(study.STUDY.results):
        assert json.loads(path.read_text())["settings"]["precision"] == "fp32"
    page = study.STUDY.document
    assert page is not None
    text = " ".join(page.read_text().split())
    assert f"`apm {' '.join(study.COMMAND)}`" in text
    for name in study.PICTURES.values():
        assert f"]({name})" in text and (page.parent / name).is_file()
    said = CliRunner().invoke(app, [*study.COMMAND[:-2], "--out", ".", "--steps", "0"])
    assert said.exit_code == 2 and "steps must be 1" in said.stderr  # every option is known: only this value is not
