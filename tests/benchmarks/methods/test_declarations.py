"""What methods declare of themselves holds: whether they need gradients, whether they learned from labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from apm.benchmarks.methods import REGISTRY, create_method
from apm.student.engine import Engine
from tests.benchmarks.methods.made import HEADS, full_spec
from tests.benchmarks.methods.test_bad_input import SMALL, GivenFeatures, features, open_teacher


@pytest.mark.parametrize("name", [*REGISTRY])
def test_a_method_that_needs_gradients_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def watched(holder: Any, function: str) -> None:
        original = getattr(holder, function)

        def call(*args: Any, **options: Any) -> Any:
            calls.append(function)
            return original(*args, **options)

        monkeypatch.setattr(holder, function, call)

    monkeypatch.setattr("apm.benchmarks.methods.rlcf.load_teacher", lambda name, device: open_teacher())
    watched(torch.autograd, "grad")
    watched(torch.Tensor, "backward")
    watched(Engine, "backward")  # the student's own, which autograd has no part in
    method = create_method(full_spec(name, neighbours=2), SMALL)
    method.predict(GivenFeatures(features()))
    assert bool(calls) is method.gradients


@pytest.mark.parametrize("name", [*REGISTRY])
def test_a_method_that_learned_from_labels_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apm.benchmarks.methods.rlcf.load_teacher", lambda name, device: open_teacher())
    learned = {"coop", "cocoop", "tpt+coop", "tpt+cocoop", *HEADS}
    told = create_method(full_spec(name, neighbours=2), SMALL).settings.get("uses_training_data", "no")
    assert told == ("yes" if name in learned else "no")
