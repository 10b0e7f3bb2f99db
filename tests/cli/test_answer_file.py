"""`--out`: a file of answers that grows line by line, and is continued."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from apm.cli.answer_file import COLUMNS, AnswerFile, fingerprint
from apm.errors import UsageError
from apm.images.files import WriteError

SETTINGS = {"teacher": "fake@1", "steps": 50, "labels": ["cat", "dog"]}
FORMS = pytest.mark.parametrize("suffix", [".jsonl", ".csv"])


def record(path: Path, *, error: str | None = None, label: str = "cat") -> dict[str, Any]:
    found = fingerprint(path)
    ranking = [] if error else [{"label": label, "probability": 0.75}, {"label": "dog", "probability": 0.25}]
    return {
        "path": str(path),
        "file": None if found is None else {"bytes": found[0], "modified_ns": found[1]},
        "top": ranking,
        "teacher_top": ranking,
        "agree": None if error else True,
        "unsure": None if error else False,
        "adaptation": None if error else {"steps": 50, "cosine": 0.999, "seconds": 1.5},
        "error": error,
    }


def paths_in(file: Path) -> list[str]:
    if file.suffix == ".jsonl":
        return [json.loads(line)["path"] for line in file.read_text().splitlines()]
    with file.open(newline="", encoding="utf-8", errors="surrogateescape") as opened:
        return [row["path"] for row in csv.DictReader(opened)]


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Three files, one with a name that CSV must quote."""
    paths = [tmp_path / name for name in ("a.jpg", 'comma, "quote"\nand line.jpg', "c.jpg")]
    for path in paths:
        path.write_bytes(b"x" * 10)
    return paths


@FORMS
def test_it_is_continued_where_it_stopped(suffix: str, tmp_path: Path, photos: list[Path]) -> None:
    file = AnswerFile(tmp_path / "sub" / f"out{suffix}", SETTINGS)
    for path in photos[:2]:
        file.write(record(path))
    assert paths_in(file.path) == [str(path) for path in photos[:2]], "on disk before it is closed"
    file.close()
    again = AnswerFile(file.path, SETTINGS)
    assert again.earlier == 2
    assert [again.holds(path) for path in photos] == [True, True, False]
    again.write(record(photos[2]))
    again.close()
    assert paths_in(file.path) == [str(path) for path in photos]


@FORMS
def test_a_cut_line_a_changed_image_and_a_failure_are_tried_again(
    suffix: str, tmp_path: Path, photos: list[Path]
) -> None:
    for cut in (1, 5, 40):
        out = tmp_path / f"cut{cut}{suffix}"
        file = AnswerFile(out, SETTINGS)
        file.write(record(photos[0]))
        file.write(record(photos[2], error="c.jpg: truncated"))
        whole = out.read_bytes()
        file.write(record(photos[1]))
        file.close()
        out.write_bytes(out.read_bytes()[:-cut])
        assert out.read_bytes() != whole
        again = AnswerFile(out, SETTINGS)
        again.close()
        assert [again.holds(path) for path in photos] == [True, False, False]
        assert paths_in(out) == [str(photos[0])]
    photos[0].write_bytes(b"another")
    changed = AnswerFile(out, SETTINGS)
    changed.close()
    assert not changed.holds(photos[0]) and paths_in(out) == []


@FORMS
def test_other_settings_are_refused_by_name(suffix: str, tmp_path: Path, photos: list[Path]) -> None:
    file = AnswerFile(tmp_path / f"out{suffix}", SETTINGS)
    file.write(record(photos[0]))
    file.close()
    before = file.path.read_bytes()
    with pytest.raises(UsageError, match=r"other settings \(steps: 50, now 20\)"):
        AnswerFile(file.path, {**SETTINGS, "steps": 20})
    with pytest.raises(UsageError, match=r'labels: \["cat", "dog"\], now \["cat", "cow"\]; seed: null, now 1'):
        AnswerFile(file.path, {**SETTINGS, "labels": ["cat", "cow"], "seed": 1})
    assert file.path.read_bytes() == before


def test_what_is_not_ours_is_left_alone(tmp_path: Path, photos: list[Path]) -> None:
    for name, content, words in (
        ("notes.txt", "mine", "must end in .jsonl or .csv"),
        ("mine.csv", "a,b\n", "no mine.csv.settings.json beside it"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(UsageError, match=words):
            AnswerFile(tmp_path / name, SETTINGS)
        assert (tmp_path / name).read_text() == content
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        AnswerFile(tmp_path / "folder.csv", SETTINGS)


@FORMS
def test_damage_before_the_last_line_is_told_not_repaired(suffix: str, tmp_path: Path, photos: list[Path]) -> None:
    file = AnswerFile(tmp_path / f"out{suffix}", SETTINGS)
    file.write(record(photos[0]))
    file.close()
    line = file.path.read_bytes().splitlines(keepends=True)[-1]
    file.path.write_bytes(b"nonsense\n" + line)
    with pytest.raises(UsageError, match=r"Row 1 of .* is not an answer"):
        AnswerFile(file.path, SETTINGS)
    file.path.with_name(f"out{suffix}.settings.json").write_text("[")
    with pytest.raises(UsageError, match="is damaged"):
        AnswerFile(file.path, SETTINGS)


def test_a_cell_that_no_reader_takes_is_damage(tmp_path: Path, photos: list[Path]) -> None:
    file = AnswerFile(tmp_path / "out.csv", SETTINGS)
    file.write({**record(photos[0]), "path": "x" * 200_000})
    file.close()
    with pytest.raises(UsageError, match="is not an answer"):
        AnswerFile(file.path, SETTINGS)


def test_columns(tmp_path: Path, photos: list[Path]) -> None:
    file = AnswerFile(tmp_path / "out.csv", SETTINGS)
    file.write(record(photos[0]))
    file.write(record(tmp_path / "missing.jpg", error="missing.jpg: no such file"))
    file.close()
    with file.path.open(newline="") as opened:
        good, bad = csv.DictReader(opened)
    assert tuple(good) == COLUMNS
    assert (good["label"], good["probability"], good["agree"], good["unsure"]) == ("cat", "0.75", "true", "false")
    assert (good["steps"], good["bytes"], good["error"]) == ("50", "10", "")
    assert (bad["label"], bad["agree"], bad["bytes"]) == ("", "", "") and "no such file" in bad["error"]


def test_names_that_are_no_text_come_back_to_the_byte(tmp_path: Path) -> None:
    path = Path(f"{tmp_path}/caf\udce9.png")
    path.write_bytes(b"x")
    for suffix in (".jsonl", ".csv"):
        for _ in range(2):
            file = AnswerFile(tmp_path / f"out{suffix}", SETTINGS)
            if not file.holds(path):
                file.write(record(path))
            file.close()
        assert paths_in(file.path) == [str(path)]


@FORMS
def test_two_processes_do_not_write_one_file(suffix: str, tmp_path: Path, photos: list[Path]) -> None:
    file = AnswerFile(tmp_path / f"out{suffix}", SETTINGS)
    file.write(record(photos[0], error="a.jpg: truncated"))  # the second process would write the file anew without it
    with pytest.raises(UsageError, match=r"Another process is writing answers to .*out"):
        AnswerFile(file.path, SETTINGS)
    file.write(record(photos[1]))
    file.close()
    again = AnswerFile(file.path, SETTINGS)
    again.close()
    assert paths_in(file.path) == [str(photos[1])]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_told(tmp_path: Path, photos: list[Path]) -> None:
    file = AnswerFile(tmp_path / "out.jsonl", SETTINGS)
    file.write(record(photos[0]))
    file._file.close()
    file._file = Path("/dev/full").open("ab")  # noqa: SIM115
    with pytest.raises(WriteError, match=r"Cannot write .*out.jsonl: the disk is full. .* run the same command again"):
        file.write(record(photos[1]))
    file.close()
    assert not file.holds(photos[1]) and paths_in(file.path) == [str(photos[0])]
