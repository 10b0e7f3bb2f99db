"""LLM descriptors: the file and its faults, names that are written otherwise, and the features made of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from apm.errors import UsageError
from apm.text.descriptors import described_head, read_descriptors
from tests.fakes import FakeTeacher

LABELS = ("cat", "coffee mug", "space_rocket")
SENTENCES = {
    "Cat": ["A cat has whiskers.", "Cats have {} fur.", "A small animal that purrs."],
    "Coffee_Mug": ["A cup with a handle."],
    "space rocket": ["A tall vehicle with fins.", "It leaves\n\nthe ground."],
    "unicorn": ["A horse with a horn."],
}
TEMPLATES = ("a photo of a {}.", "art of the {}.")


def written(path: Path, content: Any = SENTENCES) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"are not JSON \(Expecting value"),
        ('{"cat": ["a"', "are not JSON"),
        ("[" * 100_000, "cannot be read"),
        ('["cat", "dog"]', "holds no object of class names"),
        ('"cat"', "holds no object of class names"),
        ("{}", "names no class"),
        ({"cat": "has whiskers"}, 'the class "cat" has no list of sentences'),
        ({"cat": {"1": "has whiskers"}}, 'the class "cat" has no list of sentences'),
        ({"cat": ["whiskers"], "dog": []}, 'the class "dog" has an empty list'),
        ({"cat": ["whiskers", 3]}, 'the class "cat" has 3 among its sentences'),
        ({"cat": ["whiskers", None]}, "has null among its sentences"),
        ({"cat": [["whiskers"]]}, r'has \["whiskers"\] among its sentences'),
        ({"cat": ["whiskers", " \n"]}, r'has " \\n" among its sentences'),
        ({"space rocket": ["fins"], "Space_Rocket": ["tall"]}, 'the class "Space_Rocket" is there twice'),
        ('{"cat": ["a"], "cat": ["b"]}', 'the class "cat" is there twice'),
        ('{"cat": ["\\ud800"]}', "characters that are no text"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_its_fault(tmp_path: Path, content: Any, message: str) -> None:
    path = written(tmp_path / "cupl.json", content)
    with pytest.raises(UsageError, match=message) as error:
        read_descriptors(path)
    assert str(path) in str(error.value)


def test_what_is_no_file_is_said_to_be_unreadable(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r'none.json" cannot be read: No such file'):
        read_descriptors(tmp_path / "none.json")
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        read_descriptors(tmp_path)
    (tmp_path / "latin").write_bytes('{"caf\xe9": ["coffee"]}'.encode("latin-1"))
    with pytest.raises(UsageError, match="are not JSON"):
        read_descriptors(tmp_path / "latin")


def test_names_are_found_however_they_are_written_and_missing_ones_are_named(tmp_path: Path) -> None:
    path = written(tmp_path / "cupl.json")
    found = read_descriptors(path)
    assert (found.name, found.digest) == ("cupl.json", hashlib.sha256(path.read_bytes()).hexdigest())
    assert found.of(LABELS) == [tuple(SENTENCES[name]) for name in ("Cat", "Coffee_Mug", "space rocket")]
    assert found.of(("Space  Rocket", "CAT")) == [tuple(SENTENCES[name]) for name in ("space rocket", "Cat")]
    with pytest.raises(
        UsageError,
        match=r'describes 4 classes, but not 2 of the 3 asked for: "cofee_mug", "dog"\. Did you mean "coffee',
    ):
        found.of(("cat", "cofee_mug", "dog"))


def test_descriptors_join_the_prompts_as_published(tmp_path: Path) -> None:
    teacher = FakeTeacher(dim=16)
    descriptors = read_descriptors(written(tmp_path / "cupl.json"))

    def unit(text: str) -> np.ndarray:
        vector = teacher.encode_text([text])[0].double().numpy()
        return vector / np.linalg.norm(vector)

    for combination in ("together", "apart"):
        done: list[int] = []
        totals: list[int] = []

        def progress(labels: int, total: int, done: list[int] = done, totals: list[int] = totals) -> None:
            done.append(labels)
            totals.append(total)

        head = described_head(teacher, LABELS, TEMPLATES, descriptors, combination, batch_size=4, progress=progress)
        for label, own, feature in zip(LABELS, descriptors.of(LABELS), head.features, strict=True):
            prompts = [unit(template.replace("{}", label)) for template in TEMPLATES]
            sentences = [unit(sentence) for sentence in own]
            if combination == "together":
                expected = np.mean([*prompts, *sentences], axis=0)
            else:
                expected = (np.mean(prompts, axis=0) + np.mean(sentences, axis=0)) / 2
            np.testing.assert_allclose(feature, expected / np.linalg.norm(expected), atol=1e-6)
        assert (head.labels, head.templates, head.logit_scale) == (LABELS, TEMPLATES, teacher.logit_scale)
        assert done == [0, 0, 2, 3] and set(totals) == {3}
        before = teacher.text_calls
        again = described_head(teacher, LABELS, TEMPLATES, descriptors, combination)
        assert torch.equal(again.features, head.features) and teacher.text_calls == before  # kept on disk
        torch.testing.assert_close(normalize(head.features, dim=1), head.features)
    other = written(tmp_path / "other.json", {**SENTENCES, "Cat": ["Another sentence."]})
    changed = described_head(teacher, LABELS, TEMPLATES, read_descriptors(other), "apart")
    assert not torch.equal(changed.features[0], head.features[0])
