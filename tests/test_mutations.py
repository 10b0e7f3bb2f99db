"""The regression check fails, and names what moved, when the code computes something else than it should.

Each mutation runs a part of the recorded baseline (tests/baseline: digits, one cell) with one thing made wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import apm.student.engine
import apm.teachers
import apm.test_time.views
from apm.benchmarks.datasets import DATASETS, readers
from apm.benchmarks.datasets.dataset import Sample
from apm.benchmarks.methods.base import Prediction
from apm.benchmarks.runs import session
from apm.benchmarks.runs.decoding import Readable
from apm.benchmarks.runs.records import Records
from apm.benchmarks.runs.rows import Row
from apm.benchmarks.studies import baseline
from apm.benchmarks.tables.compare import Comparison, compare
from apm.cli.main import app
from apm.errors import UsageError
from apm.images.load import central_square, normalised
from apm.student.config import APMConfig
from apm.student.engine import Engine
from apm.teachers import load_teacher
from apm.teachers.base import Teacher
from apm.test_time import inputs
from apm.text.zeroshot import ZeroShotHead

pytestmark = pytest.mark.slow

_load_once = cache(load_teacher)
_METHODS = ("tpt", "apm")
Patch = pytest.MonkeyPatch


def part_of(records: Records) -> Records:
    """The record of the cell and the methods that are run again here, with the limits of the baseline's own check."""
    run = deepcopy(records.run)
    run["config"]["cells"] = {"digits": run["config"]["cells"]["digits"]}
    run["cells"] = {"digits": run["cells"]["digits"]}
    methods = run["config"]["methods"]
    run["config"]["methods"] = {name: methods[name] for name in methods if name.partition("[")[0] in _METHODS}
    return Records(records.path, run)


@pytest.fixture
def check(tmp_path: Path, monkeypatch: Patch) -> Callable[[], dict[str, Comparison]]:
    """Run the part again, as the code is now, and compare; by method."""

    def run_again() -> dict[str, Comparison]:
        methods = [f"--method={name}" for name in _METHODS]
        with monkeypatch.context() as patch:
            patch.setattr(apm.teachers, "load_teacher", _load_once)
            done = CliRunner().invoke(
                app, ["bench", "digits", *methods, *baseline.SETTINGS, "--out", str(tmp_path / "new"), "-q"]
            )
        assert done.exit_code == 0, done.stderr
        results = compare(Records.open(tmp_path / "new"), part_of(Records.open(baseline.FOLDER)), baseline.LIMITS)
        return {result.method: result for result in results}

    return run_again


def moved(result: Comparison) -> set[str]:
    """First words of what a comparison complains of."""
    return {failure.split(" ")[0] for failure in result.failures}


def test_the_code_as_it_is_passes(check: Callable[[], dict[str, Comparison]]) -> None:
    results = check()
    assert list(results) == ["tpt", "apm", "apm[mta,8]"]
    assert all(result.passed for result in results.values()), results


def slower(patch: Patch) -> None:
    make = Engine.__init__

    def wrong(self: Engine, *arguments: object, lr: float, **settings: object) -> None:
        make(self, *arguments, lr=0.7 * lr, **settings)  # type: ignore[arg-type]

    patch.setattr(Engine, "__init__", wrong)


def moments_kept(patch: Patch) -> None:
    reset = Engine.reset

    def wrong(self: Engine) -> None:
        stepped = bool(self.rows.updates.any())  # before the first step there is nothing to keep
        kept = self.rows.first_moment.clone(), self.rows.second_moment.clone()
        reset(self)
        if stepped:
            self.rows.first_moment.copy_(kept[0])
            self.rows.second_moment.copy_(kept[1])

    patch.setattr(Engine, "reset", wrong)


def bias_dropped(patch: Patch) -> None:
    right, width = apm.student.engine.affine, APMConfig.preset("small", dim=512).hidden[1]

    def wrong(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> Tensor:
        return right(x, weight, torch.zeros_like(bias) if bias.shape[1] == width else bias, out)

    patch.setattr(apm.student.engine, "affine", wrong)


def teachers_normalisation(patch: Patch) -> None:
    # CLIP's, since the embedded teacher has the student's own
    mean, std = OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    def wrong(image: Image.Image, size: int) -> Tensor:
        return normalised(central_square(image, size), mean, std)

    patch.setattr(inputs, "student_input", wrong)


def other_views(patch: Patch) -> None:
    right = apm.test_time.views.view_generator
    patch.setattr(apm.test_time.views, "view_generator", lambda seed, name, index: right(seed + 1, name, index))


def shifted(sample: Sample) -> Sample:
    return replace(sample, label=(sample.label + 1) % 10)


def labels_shifted_when_scored(patch: Patch) -> None:
    right = session.score

    def wrong(method: str, prediction: Prediction, items: list[Readable], *rest: Any, **settings: Any) -> list[Row]:
        return right(method, prediction, [replace(i, sample=shifted(i.sample)) for i in items], *rest, **settings)

    patch.setattr(session, "score", wrong)


def texts_shifted(patch: Patch) -> None:
    right = ZeroShotHead.build

    def build(teacher: Teacher, names: Sequence[str], *rest: Any, **more: Any) -> ZeroShotHead:
        return right(teacher, [*names[1:], names[0]], *rest, **more)

    patch.setattr(ZeroShotHead, "build", build)


@pytest.mark.parametrize(
    ("mutation", "expected"),
    [
        (slower, {"apm": {"loss", "cosine", "logits"}}),
        (moments_kept, {"apm": {"loss", "cosine", "logits"}}),
        (bias_dropped, {"apm": {"loss", "cosine", "logits"}}),
        (teachers_normalisation, {"apm": {"loss", "cosine", "logits"}}),
        (other_views, {"tpt": {"nll", "logits"}, "apm[mta,8]": {"loss", "logits"}}),
        (labels_shifted_when_scored, {"tpt": {"10", "accuracy", "nll"}, "apm": {"10", "accuracy", "nll"}}),
        (texts_shifted, {"tpt": {"accuracy", "nll", "logits"}, "apm": {"accuracy", "nll", "logits"}}),
    ],
)
def test_a_mutation_is_caught(
    mutation: Callable[[Patch], None],
    expected: dict[str, set[str]],
    check: Callable[[], dict[str, Comparison]],
    monkeypatch: Patch,
) -> None:
    mutation(monkeypatch)
    results = check()
    for method, names in expected.items():
        assert names <= moved(results[method]), (method, results[method])


def one_template(patch: Patch) -> None:
    patch.setitem(DATASETS, "digits", replace(DATASETS["digits"], template="a drawing of a {}."))


def labels_shifted_when_read(patch: Patch) -> None:
    right = readers.read_digits
    patch.setattr(
        readers,
        "read_digits",
        lambda: replace(listing := right(), samples=[shifted(sample) for sample in listing.samples]),
    )


@pytest.mark.parametrize(
    ("mutation", "message"),
    [
        (one_template, 'prompts: "a handwritten {}." before, "a drawing of a {}." now'),
        (labels_shifted_when_read, "the images, their order or their labels (fingerprint): "),
    ],
)
def test_other_prompts_and_labels_are_another_configuration(
    mutation: Callable[[Patch], None], message: str, check: Callable[[], dict[str, Comparison]], monkeypatch: Patch
) -> None:
    mutation(monkeypatch)
    with pytest.raises(UsageError, match=re.escape(message)):
        check()
