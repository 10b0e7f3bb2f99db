"""The zero-shot head against its definition, and its cache against damage, races and folders it may not write to."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from apm.errors import UsageError
from apm.labels import PROMPT_NAMES, prompt_templates
from apm.teachers import Teacher
from apm.text.zeroshot import ZeroShotHead, _checksum, default_cache_dir
from tests.fakes import FakeTeacher

LABELS = ("cat", "dog", "a {} of braces", "missile", "missile")
TEMPLATES = ("a photo of a {}.", "the {} and the {}", "{}")


def entries(folder: Path) -> list[Path]:
    return sorted((folder / "text-features").iterdir())


def test_the_fake_is_a_teacher() -> None:
    assert isinstance(FakeTeacher(), Teacher)
    assert not isinstance(object(), Teacher)


def test_features_are_the_normalised_mean_of_normalised_prompts() -> None:
    teacher = FakeTeacher()
    head = ZeroShotHead.build(teacher, LABELS, TEMPLATES)
    for label, feature in zip(LABELS, head.features, strict=True):
        rows = [teacher.encode_text([template.replace("{}", label)])[0] for template in TEMPLATES]
        mean = sum((row / row.norm() for row in rows), torch.zeros(teacher.dim)) / len(rows)
        torch.testing.assert_close(feature, mean / mean.norm(), rtol=0, atol=1e-6)
    assert head.labels == LABELS
    assert head.templates == TEMPLATES


def test_logits_are_scaled_cosines() -> None:
    teacher = FakeTeacher()
    head = ZeroShotHead.build(teacher, LABELS, TEMPLATES)
    tokens = torch.randn(4, teacher.dim, generator=torch.Generator().manual_seed(0)) * 7
    expected = 20 * functional.cosine_similarity(tokens[:, None], head.features[None], dim=-1)
    torch.testing.assert_close(head.logits(tokens), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(head.probabilities(tokens), expected.softmax(-1), rtol=0, atol=1e-6)


def test_prompt_sets_are_there_by_name() -> None:
    assert {name: len(prompt_templates(name)) for name in PROMPT_NAMES} == {"single": 1, "simple": 7, "openai": 80}


@pytest.mark.parametrize("labels", [(), ("cat",), ("cat", " ")])
def test_too_few_or_empty_labels_are_refused(labels: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=r"at least two|empty"):
        ZeroShotHead.build(FakeTeacher(), labels, TEMPLATES)


def test_a_template_without_a_place_is_refused() -> None:
    with pytest.raises(UsageError, match=r"has no {}"):
        ZeroShotHead.build(FakeTeacher(), LABELS, ["a photo"])


def test_a_second_head_comes_from_the_cache(tmp_path: Path) -> None:
    teacher = FakeTeacher()
    first = ZeroShotHead.build(teacher, LABELS, TEMPLATES, cache_dir=tmp_path)
    calls = teacher.text_calls
    second = ZeroShotHead.build(teacher, LABELS, TEMPLATES, cache_dir=tmp_path)
    assert teacher.text_calls == calls == len(LABELS) * len(TEMPLATES)
    assert torch.equal(first.features, second.features)
    assert [path.suffix for path in entries(tmp_path)] == [".safetensors"]


def test_the_cache_knows_teacher_names_and_templates_apart(tmp_path: Path) -> None:
    builds = [
        (FakeTeacher(), LABELS, TEMPLATES),
        (FakeTeacher(seed=1), LABELS, TEMPLATES),
        (FakeTeacher(name="other"), LABELS, TEMPLATES),
        (FakeTeacher(), LABELS[::-1], TEMPLATES),
        (FakeTeacher(), LABELS, TEMPLATES[:2]),
        (FakeTeacher(), ("a", "b,c"), TEMPLATES),
        (FakeTeacher(), ("a,b", "c"), TEMPLATES),
    ]
    for teacher, labels, templates in builds:
        head = ZeroShotHead.build(teacher, labels, templates, cache_dir=tmp_path)
        fresh = ZeroShotHead.build(teacher, labels, templates, cache=False)
        assert torch.equal(head.features, fresh.features)
    assert len(entries(tmp_path)) == len(builds)


def test_without_a_cache_nothing_is_written(private_cache: Path) -> None:
    ZeroShotHead.build(FakeTeacher(), LABELS, TEMPLATES, cache=False)
    assert list(private_cache.iterdir()) == []
    ZeroShotHead.build(FakeTeacher(), LABELS, TEMPLATES)
    assert len(entries(private_cache)) == 1


def test_the_cache_is_where_the_variable_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("APM_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("APM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir().name == "apm"


def flip(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "text", "other"])
def test_a_damaged_entry_is_rebuilt(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    teacher = FakeTeacher()
    expected = ZeroShotHead.build(teacher, LABELS, TEMPLATES, cache_dir=tmp_path).features
    (path,) = entries(tmp_path)
    good = path.read_bytes()
    if damage == "other":  # a sound entry of other labels under this name
        ZeroShotHead.build(teacher, LABELS[::-1], TEMPLATES, cache_dir=tmp_path)
        (other,) = set(entries(tmp_path)) - {path}
        path.write_bytes(other.read_bytes())
        other.unlink()
    else:
        bad = {"flipped": flip(good, len(good) - 3), "truncated": good[:-9], "empty": b"", "text": b"not a tensor" * 9}
        path.write_bytes(bad[damage])
    with caplog.at_level(logging.WARNING, logger="apm"):
        again = ZeroShotHead.build(teacher, LABELS, TEMPLATES, cache_dir=tmp_path).features
    assert torch.equal(again, expected)
    assert "computing them again" in caplog.text
    assert path.read_bytes() == good


@pytest.mark.slow
def test_every_flipped_bit_is_noticed_or_harmless(tmp_path: Path) -> None:
    teacher = FakeTeacher(dim=4)
    expected = ZeroShotHead.build(teacher, LABELS[:2], TEMPLATES, cache_dir=tmp_path).features
    (path,) = entries(tmp_path)
    good = path.read_bytes()
    for position in range(len(good)):
        path.write_bytes(flip(good, position))
        again = ZeroShotHead.build(teacher, LABELS[:2], TEMPLATES, cache_dir=tmp_path).features
        assert torch.equal(again, expected), position


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with caplog.at_level(logging.WARNING, logger="apm"):
        head = ZeroShotHead.build(FakeTeacher(), LABELS, TEMPLATES, cache_dir=blocked)
    assert torch.equal(head.features, ZeroShotHead.build(FakeTeacher(), LABELS, TEMPLATES, cache=False).features)
    assert "not kept" in caplog.text


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*paths: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    ZeroShotHead.build(FakeTeacher(), LABELS, TEMPLATES, cache_dir=tmp_path)
    assert entries(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    for templates in (TEMPLATES, TEMPLATES[:1], TEMPLATES[:2]):
        ZeroShotHead.build(FakeTeacher(), LABELS, templates, cache_dir=blocked)
    assert len(caplog.records) == 1


def test_what_others_may_write_is_not_believed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = FakeTeacher()
    expected = ZeroShotHead.build(teacher, LABELS, TEMPLATES, cache_dir=tmp_path).features
    (path,) = entries(tmp_path)
    forged = torch.zeros_like(expected)
    content = save({"features": forged}, metadata={"sha256": _checksum(path, forged)})
    path.write_bytes(content)  # what this user wrote himself is taken: the forgery below is a good one
    assert torch.equal(ZeroShotHead.build(teacher, LABELS, TEMPLATES, cache_dir=tmp_path).features, forged)
    for mode in (0o620, 0o602):
        path.write_bytes(content)
        path.chmod(mode)
        assert torch.equal(ZeroShotHead.build(teacher, LABELS, TEMPLATES, cache_dir=tmp_path).features, expected)
        assert path.stat().st_mode & 0o777 == 0o600  # written anew
    path.write_bytes(content)
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)  # the file is another user's then, unless he is root
    if owner:
        assert torch.equal(ZeroShotHead.build(teacher, LABELS, TEMPLATES, cache_dir=tmp_path).features, expected)
    else:
        os.chown(path, 54321, 54321)
        assert torch.equal(ZeroShotHead.build(teacher, LABELS, TEMPLATES, cache_dir=tmp_path).features, expected)
    assert [record for record in caplog.records if "another user" in record.getMessage()] == caplog.records[:1]


def build_many(folder: Path, rounds: int, queue: multiprocessing.Queue[list[Tensor] | None]) -> None:
    """Build the same entries again and again, removing them in between, and report what came out."""
    try:
        features = []
        for _ in range(rounds):
            features.append(ZeroShotHead.build(FakeTeacher(), LABELS, TEMPLATES, cache_dir=folder).features.tolist())
            for path in entries(folder):
                if path.suffix == ".safetensors":
                    path.unlink(missing_ok=True)
        queue.put(features)
    except BaseException:
        queue.put(None)
        raise


@pytest.mark.slow
def test_two_processes_may_build_the_same_entry(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=build_many, args=(tmp_path, 25, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    expected = ZeroShotHead.build(FakeTeacher(), LABELS, TEMPLATES, cache=False).features.tolist()
    assert [result is not None and all(features == expected for features in result) for result in results] == [True] * 2
    assert [path.suffix for path in entries(tmp_path) if path.suffix == ".tmp"] == []


class CountingTeacher(FakeTeacher):
    """Remembers the largest number of texts it was handed at a time."""

    largest = 0

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        self.largest = max(self.largest, len(texts))
        return super().encode_text(texts)


def test_ten_thousand_labels_are_encoded_a_few_at_a_time() -> None:
    teacher = CountingTeacher(dim=4)
    labels = [f"thing {number}" for number in range(10_000)]
    done: list[int] = []
    head = ZeroShotHead.build(
        teacher, labels, TEMPLATES, cache=False, batch_size=300, progress=lambda count, _: done.append(count)
    )
    assert head.features.shape == (10_000, 4)
    assert teacher.largest <= 300
    assert done == [*range(0, 10_000, 100), 10_000]
    single = ZeroShotHead.build(teacher, labels[7777:7779], TEMPLATES, cache=False).features
    torch.testing.assert_close(head.features[7777:7779], single, rtol=0, atol=1e-6)
