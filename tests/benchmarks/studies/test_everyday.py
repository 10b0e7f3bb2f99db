"""The study of everyday words: what falls, what is right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from apm.benchmarks.studies import everyday
from apm.labels import label_set
from tests.fakes import FakeTeacher

COLOURS = {"dog": (255, 0, 0), "house": (0, 255, 0), "church": (0, 0, 255)}


class Colours(FakeTeacher):
    """Red is a dog, green a house, blue a church."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        return torch.cat([pixels.mean((2, 3)) + 1, torch.zeros(len(pixels), self.dim - 3)], -1)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        rows = torch.zeros(len(texts), self.dim)
        for row, text in enumerate(texts):
            colours = [number for number, word in enumerate(COLOURS) if f" {word}." in text]
            rows[row, colours or [3]] = 1
        return rows


def test_photographs_that_fall_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "church" in label_set("imagenette")
    shown = {"dog": ["dog", "dog", "church", "house"], "house": ["house", "church"]}
    for word, colours in shown.items():
        (tmp_path / word).mkdir()
        for number, colour in enumerate(colours):
            Image.new("RGB", (40, 40), COLOURS[colour]).save(tmp_path / word / f"{number}.png")
    monkeypatch.setattr(everyday, "load_teacher", lambda *_, **__: Colours())
    found = everyday.measure(everyday.STUDY.read(["--root", str(tmp_path)]))
    assert found["words"] == ["dog", "house"]
    dogs, houses = found["counts"]["dog"], found["counts"]["house"]
    assert (dogs["photographs"], dogs["fallen"], dogs["correct"]) == (4, 1, 2)
    assert (houses["photographs"], houses["fallen"], houses["correct"]) == (2, 1, 1)
    assert found["counts"]["all"]["fallen"] == 2 and found["counts"]["all"]["correct"] == 3
    assert "| house | 2 | 1 | 1 |" in everyday.table(found)
