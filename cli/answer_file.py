"""Answers in a file that grows line by line, JSON lines or CSV, and is continued by the same command.

``NAME.settings.json`` beside it records what the answers depend on: those of different settings are never mixed.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from apm.errors import UsageError
from apm.images.files import alone_with, write_atomically, writing
from apm.images.paths import printable
from apm.test_time.queries import ALL

if TYPE_CHECKING:
    from apm.classifier import Classifier

SUFFIXES = (".jsonl", ".csv")
COLUMNS = (
    "path",
    "label",
    "probability",
    "unsure",
    "teacher_label",
    "teacher_probability",
    "agree",
    "steps",
    "cosine",
    "seconds",
    "bytes",
    "modified_ns",
    "error",
)
Fingerprint = tuple[int, int]
"""A file's size in bytes and the time of its last change in nanoseconds."""


def fingerprint(path: str | os.PathLike[str]) -> Fingerprint | None:
    """Size and modification time of a file, None if there is none: an answer is valid as long as both stay the same."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def check_out(path: Path) -> None:
    """Refuse, before anything is loaded, a file that answers cannot be written to.

    Raises:
        UsageError: the suffix is unknown, it is a folder, or the file was not written by this command.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"--out {printable(path)}: the name must end in {' or '.join(SUFFIXES)}, which sets the format."
        )
    if path.is_dir():
        raise UsageError(f"--out {printable(path)} is a folder; name a file in it.")
    if path.exists() and path.stat().st_size and not _sidecar(path).is_file():
        raise UsageError(
            f"--out {printable(path)} exists already, and there is no {_sidecar(path).name} beside it to say how it "
            "was made: name another file, or remove it."
        )


def answer_settings(classifier: Classifier, *, steps_detail: bool) -> dict[str, Any]:
    """Everything that a classifier's answers and their lines depend on, by the option that sets it."""
    student = classifier.student.record(classifier.device)
    if student["queries"] is None:
        student["queries"] = ALL
    return {
        "teacher": classifier.teacher.identity,
        "labels": list(classifier.head.labels),
        "prompts": list(classifier.head.templates),
        **{name.replace("_", "-"): value for name, value in student.items()},
        "top-k": classifier.top_k,
        "min-probability": classifier.min_probability,
        "steps-detail": steps_detail,
    }


class AnswerFile:
    """A file of answers to which more can be added.

    Answers that it holds already are kept if their image has not changed; failures, answers to images that have changed
    since, and a last line that was cut off are dropped, so that they are tried again.

    Args:
        path: ends in ``.jsonl`` or ``.csv``. Its folder is made if it is not there.
        settings: from `answer_settings`.

    Raises:
        UsageError: as `check_out`; another process writes the file; the answers there were made with other settings,
            which are named; or a line before the last is no answer.
        WriteError: the file cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        check_out(path)
        self.path = path
        self._csv = path.suffix.lower() == ".csv"
        self._answered: set[str] = set()
        with ExitStack() as held:
            held.enter_context(alone_with(path, "writing answers to"))
            if path.exists() and path.stat().st_size:
                _check_settings(path, settings)
                self._continue()
            else:
                text = json.dumps(settings, indent=1) + "\n"
                write_atomically(_sidecar(path), lambda file: file.write(text.encode()))
                write_atomically(path, lambda file: file.write(_csv_line(COLUMNS) if self._csv else b""))
            self.earlier = len(self._answered)
            with writing(path):
                self._file: BinaryIO = path.open("ab")
            self._held = held.pop_all()

    def holds(self, path: Path) -> bool:
        """Whether an answer to the image at `path`, as it is now, is in the file."""
        return str(path) in self._answered

    def write(self, record: Mapping[str, Any]) -> None:
        """Add one record of ``schemas/classify.json``; it is with the system before this returns.

        Raises:
            WriteError: the disk is full, for example.
        """
        line = _csv_line(_row(record)) if self._csv else json.dumps(record, allow_nan=False).encode() + b"\n"
        with writing(self.path):
            self._file.write(line)
            self._file.flush()
        if record["error"] is None:
            self._answered.add(record["path"])

    def close(self) -> None:
        """Close the file, and let other processes have it."""
        with suppress(OSError):  # `write` has told of what could not be written
            self._file.close()
        self._held.close()

    def _continue(self) -> None:
        """Read the existing answers; rewrite the file, atomically, if any of them must go."""
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        lines = _csv_rows(whole, self.path) if self._csv else _json_rows(whole, self.path)
        kept: list[bytes] = [_csv_line(COLUMNS)] if self._csv else []
        for line, name, found in lines:
            if found is not None and fingerprint(name) == found and name not in self._answered:
                self._answered.add(name)
                kept.append(line)
        if b"".join(kept) != content:
            write_atomically(self.path, lambda file: file.writelines(kept))


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.settings.json")


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    try:
        earlier = json.loads(_sidecar(path).read_bytes())
        if not isinstance(earlier, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise UsageError(f"{printable(_sidecar(path))} is damaged ({error}): remove it and {path.name}.") from error
    differing = [name for name in {**earlier, **settings} if earlier.get(name) != settings.get(name)]
    if differing:
        listing = "; ".join(
            f"{name}: {_short(earlier.get(name))}, now {_short(settings.get(name))}" for name in differing
        )
        raise UsageError(
            f"The answers in {printable(path)} were made with other settings ({listing}): name another file, or remove"
            " it."
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _json_rows(content: bytes, path: Path) -> list[tuple[bytes, str, Fingerprint | None]]:
    """The lines of a JSON file, each with its image and, for an answer, the image's fingerprint at the time."""
    rows: list[tuple[bytes, str, Fingerprint | None]] = []
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        try:
            record = json.loads(line)
            file = record["file"] if record["error"] is None else None
            rows.append((line, record["path"], None if file is None else (file["bytes"], file["modified_ns"])))
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(path, number) from error
    return rows


def _csv_rows(content: bytes, path: Path) -> list[tuple[bytes, str, Fingerprint | None]]:
    """The same for a CSV file. Cut inside a quoted name that contains a line break, its last row is too short."""
    reader = csv.reader(io.StringIO(content.decode("utf-8", "surrogateescape"), newline=""))
    try:
        table = list(reader)
    except csv.Error as error:
        raise _damaged(path, reader.line_num) from error
    if table and len(table[-1]) != len(COLUMNS):
        table.pop()
    rows: list[tuple[bytes, str, Fingerprint | None]] = []
    for number, cells in enumerate(table, 1):
        if number == 1 and tuple(cells) == COLUMNS:
            continue
        try:
            record = dict(zip(COLUMNS, cells, strict=True))
            found = None if record["error"] else (int(record["bytes"]), int(record["modified_ns"]))
        except ValueError as error:
            raise _damaged(path, number) from error
        rows.append((_csv_line(cells), record["path"], found))
    return rows


def _damaged(path: Path, number: int) -> UsageError:
    return UsageError(f"Row {number} of {printable(path)} is not an answer of apm classify: name another file.")


def _row(record: Mapping[str, Any]) -> list[str]:
    best, theirs = (record[name][0] if record[name] else {} for name in ("top", "teacher_top"))
    adaptation, file = record["adaptation"] or {}, record["file"] or {}
    values = (
        record["path"],
        best.get("label"),
        best.get("probability"),
        record["unsure"],
        theirs.get("label"),
        theirs.get("probability"),
        record["agree"],
        *(adaptation.get(name) for name in ("steps", "cosine", "seconds")),
        *(file.get(name) for name in ("bytes", "modified_ns")),
        record["error"],
    )
    return ["" if value is None else str(value).lower() if isinstance(value, bool) else str(value) for value in values]


def _csv_line(cells: list[str] | tuple[str, ...]) -> bytes:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue().encode("utf-8", "surrogateescape")
