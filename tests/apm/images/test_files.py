"""The one writer of files: what is at a name is whole."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import BinaryIO

import pytest

from apm.errors import UsageError
from apm.images.files import WriteError, make_folder, write_atomically
from tests.places import ROOT


def test_bytes_and_functions_are_written_and_the_umask_holds(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    before = os.umask(0o027)
    try:
        assert write_atomically(path, b"one") == path
        assert path.stat().st_mode & 0o777 == 0o640
        write_atomically(path, lambda file: file.write(b"two"))
    finally:
        os.umask(before)
    assert path.read_bytes() == b"two"
    assert [one.name for one in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
@pytest.mark.parametrize("staged", [False, True])
def test_a_full_disk_keeps_the_old_file_and_leaves_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, staged: bool
) -> None:
    path = write_atomically(tmp_path / "file", b"old")
    staging = tmp_path / "staging" if staged else None
    if staging:
        staging.mkdir()

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def content(file: BinaryIO) -> None:
        file.write(b"half")
        if step == "write":
            full()

    if step != "write":
        monkeypatch.setattr(os, step, full)
    with pytest.raises(WriteError, match=r"Cannot write .*file: the disk is full\. .* free some space and run"):
        write_atomically(path, content, staging=staging)
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.rglob("*") if one.is_file()] == ["file"]


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(file: BinaryIO) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", interrupted)
    assert not list(tmp_path.iterdir())


def test_a_staging_folder_that_has_gone_stops_the_writing(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"Cannot write .*file: No such file"):
        write_atomically(tmp_path / "away" / "file", b"", staging=tmp_path / "gone")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="Not a directory"):
        write_atomically(tmp_path / "file" / "below" / "file", b"")
    with pytest.raises(UsageError, match=r"Cannot write to .*: .* Give another folder with --out\."):
        make_folder(tmp_path / "file")


def test_nobody_else_renames_files_into_place() -> None:
    sources = [path for folder in ("apm", "benchmarks", "cli") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 100
    found = {
        path.relative_to(ROOT).as_posix()
        for path in sources
        if re.search(r"\bos\.(replace|rename)\(|mkstemp|\.write_(text|bytes)\(", path.read_text(encoding="utf-8"))
    }
    assert found == {"apm/images/files.py"}
