"""What tests of commands share."""

from __future__ import annotations

import pytest

from tests.fakes import FakeTeacher


@pytest.fixture
def fake_teacher(monkeypatch: pytest.MonkeyPatch) -> FakeTeacher:
    """Return the teacher that `Classifier` gets, whatever it asks for."""
    teacher = FakeTeacher()
    monkeypatch.setattr("apm.classifier.load_teacher", lambda name, **_: teacher)
    monkeypatch.setattr("apm.teachers.check_teacher", lambda name: None)
    return teacher
