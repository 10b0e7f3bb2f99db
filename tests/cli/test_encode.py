"""`apm encode`, and `apm bench` with what it wrote: what they print, where, and with which exit code."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from apm.benchmarks.runs.records import RunFolder
from apm.benchmarks.store import encode as encoding
from apm.processes import Group
from tests.cli.test_bench import animals, apm_, bench, fake_teacher
from tests.fakes import FakeTeacher

__all__ = ["animals", "fake_teacher"]  # fixtures

DIGITS = ("digits", "--limit", "12")
METHODS = ("--method", "zero-shot", "--method", "mta", "--method", "onzeta", "--views", "5")


def encode(*arguments: object):  # type: ignore[no-untyped-def]
    return apm_("encode", "--teacher", "fake", "--device", "cpu", "--views", 5, *arguments)


def test_of_several_processes_one_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(failed=1, images=1, path="runs/x")
    monkeypatch.setattr("apm.processes.join", lambda: nullcontext(Group(rank=1, world=2)))
    monkeypatch.setattr("apm.cli.encode.fill_store", lambda *_, **__: failed)
    monkeypatch.setattr("apm.cli.bench._run", lambda *_, **__: [failed])
    for done in (encode(*DIGITS, "--out", "store"), bench(*DIGITS)):
        assert (done.exit_code, done.stderr) == (1, "")


def test_encoded_once_read_by_every_run(fake_teacher: FakeTeacher) -> None:
    done = encode(*DIGITS, "--out", "store")
    assert (done.exit_code, done.stdout) == (0, ""), done.output
    assert "note: store: 12 images × 5 views × 16 numbers in fp16, 1.9 kB in all; none is there yet." in done.stderr
    assert "12/12 digits (1/1) · " in done.stderr
    assert "note: store holds 12 images. To use it: apm bench … --features store" in done.stderr
    plain = bench(*DIGITS, *METHODS, "--out", "plain")
    before = fake_teacher.image_calls
    for run in ("one", "another"):
        read = bench(*DIGITS, *METHODS, "--out", run, "--features", "store")
        assert read.exit_code == 0, read.output
    assert fake_teacher.image_calls == before
    answers = [
        sorted((row["position"], row["method"], row["prediction"]) for row in RunFolder(run).read("digits").to_pylist())
        for run in ("plain", "one", "another")
    ]
    assert answers[0] == answers[1] == answers[2]
    assert apm_("compare", "one", "plain", "--tolerance", "100").exit_code == 0
    assert plain.stdout.splitlines()[1] == read.stdout.splitlines()[1]


def test_bench_fills_a_store_as_far_as_it_is_needed(fake_teacher: FakeTeacher) -> None:
    first = bench(*DIGITS, *METHODS, "--out", "one", "--store", "store")
    assert first.exit_code == 0, first.output
    assert fake_teacher.image_calls == 12 * 5
    again = bench(*DIGITS, "--method", "zero-shot", "--method", "zero:views=3", "--out", "two", "--store", "store")
    assert again.exit_code == 0, again.output
    assert fake_teacher.image_calls == 12 * 5


def test_what_cannot_be_decoded_is_named_and_the_rest_encoded(animals: Path) -> None:
    (animals / "cat" / "1.png").write_bytes(b"no picture")
    done = encode("folder", "--root", animals, "--out", "store")
    assert done.exit_code == 1
    assert "folder: cat/1.png: " in done.stderr
    assert "1 image(s) cannot be decoded" in done.stderr
    read = bench("folder", "--root", animals, "--method", "zero-shot", "--out", "run", "--features", "store")
    assert read.exit_code == 1
    assert "folder: cat/1.png: " in read.stderr
    assert "images: n=5 in " in read.stdout


def test_interrupting_says_how_to_continue(fake_teacher: FakeTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(encoding.Filling, "fill", interrupted)
    result = encode(*DIGITS, "--out", "store")
    assert result.exit_code == 130
    assert "interrupted: what was encoded is in store. To continue: apm" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digit"], 'Unknown data set "digit". Did you mean "digits"?'),
        ([], "No data set is named."),
        (["digits", "--precision", "bf16"], 'precision is "bf16"; features are stored in fp16 or fp32.'),
        (["digits", "--views", "0"], "0 views"),
        (["digits", "--workers", "0"], "--workers must be 1 or more, not 0"),
        (["digits", "--limit", "0"], "--limit must be 1 or more, not 0"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_2(arguments: list[str], message: str) -> None:
    result = encode(*arguments, "--out", "store")
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert message in result.stderr
    assert not (Path("store") / "store.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--features", "nowhere"], 'No store at "nowhere"'),
        (["--features", "store", "--store", "store"], "--features and --store exclude each other"),
        (["--features", "store", "--seed", "3"], "seed: 0 in the store, 3 asked for"),
        (["--features", "store", "--method", "mta"], "mta needs 64 views of each image, but store holds 5"),
        (["--features", "store", "--corruption", "fog"], "store has no features of digits/fog/5; it has digits."),
    ],
)
def test_a_store_that_does_not_suit_is_refused(arguments: list[str], message: str) -> None:
    assert encode(*DIGITS, "--out", "store").exit_code == 0
    result = bench(*DIGITS, "--method", "zero-shot", *arguments, "--out", "run")
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert message in result.stderr
    assert not (Path("run") / "run.json").exists()
