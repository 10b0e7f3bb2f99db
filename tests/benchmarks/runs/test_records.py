"""The run folder: what is written is whole or not there."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from apm.benchmarks.runs.records import Records, RunFolder
from apm.benchmarks.runs.rows import ROW_SCHEMA, Row
from apm.benchmarks.runs.run_json import describe_differences, differences
from apm.errors import ApmError, UsageError
from apm.images import files


def rows(start: int = 0, n: int = 3) -> list[Row]:
    return [
        Row(id=f"ä/{i}", position=i, label=1, method="m", prediction=2, probability=0.5, nll=1.5, rank=2, seconds=0.1)
        for i in range(start, start + n)
    ]


def minimal_run(**changes: object) -> dict[str, object]:
    identity = {"fingerprint": "f", "label_set": "l", "prompt_set": "p", "generated": None}
    about = {"dataset": "digits", "title": "digits", "corruption": None, "level": None, "layout": "", "source": ""}
    counted = {"split": "", "prompts": "digits", "classes": 3, "images": 3, "total": 3, "notes": []}
    return {
        "schema": 1,
        "config": {
            "teacher": "t@1",
            "methods": {"m": {"stream": False}},
            "cells": {"digits": identity},
            "seed": 0,
            "limit": None,
            "prompts": None,
            "record_steps": False,
        },
        "teacher": {"name": "t", "identity": "t@1", "notes": []},
        "stream_order": {"generator": "numpy PCG64 permutation", "seed": 0},
        "cells": {"digits": {**identity, **about, **counted, "generated": False}},
        "label_sets": {"l": ["a", "b", "c"]},
        "prompt_sets": {"p": ["a {}."]},
        "sessions": [],
        "counts": {},
        "wall_seconds": 0.0,
        **changes,
    }


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    whole = Row(
        id="a b\n.png",
        position=7,
        label=3,
        method="apm[mta,64]",
        prediction=3,
        probability=0.25,
        nll=0.125,
        rank=1,
        teacher_prediction=2,
        loss=0.5,
        cosine=0.75,
        steps=9,
        seconds=1.5,
        shared_seconds=0.5,
        step_predictions=(0, 3),
        logits=(0.5, -1.0),
        extras=(("entropy_first", 0.5), ("entropy_last", 0.25)),
    )
    failed = Row(id="c", position=8, label=0, method="m", error="cut off")
    path = folder.append("imagenet-c/fog/5", [whole, failed])
    assert path.parent == tmp_path / "shards" / "imagenet-c--fog--5"
    found = folder.read("imagenet-c/fog/5").to_pylist()
    assert found[0] == {name: getattr(whole, name) for name in ROW_SCHEMA.names} | {
        "step_predictions": [0, 3],
        "logits": [0.5, -1.0],
        "extras": [("entropy_first", 0.5), ("entropy_last", 0.25)],
    }
    assert found[1] == {name: getattr(failed, name) for name in ROW_SCHEMA.names}
    assert pq.read_schema(path).metadata[b"apm.schema"] == b"1"


def test_shards_are_added_and_never_touched(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    first = folder.append("digits", rows())
    before = (first.stat().st_mtime_ns, first.read_bytes())
    folder.append("digits", rows(3))
    assert (first.stat().st_mtime_ns, first.read_bytes()) == before
    assert sorted(folder.read("digits", ["position"])["position"].to_pylist()) == list(range(6))


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_whole_rows_and_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    folder = RunFolder(tmp_path)
    folder.append("digits", rows())

    def full(*arguments: object, **settings: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if step == "write":
        monkeypatch.setattr(files, "open", _open_full, raising=False)
    else:
        monkeypatch.setattr(os, step, full)
    with pytest.raises(ApmError, match=r"disk is full.*What was written before is whole: free some space and run"):
        folder.append("digits", rows(3))
    monkeypatch.undo()
    assert [p.suffix for p in (tmp_path / "shards" / "digits").iterdir()] == [".parquet"]
    assert folder.read("digits")["position"].to_pylist() == [0, 1, 2]


class _open_full:
    """A file that takes some bytes and then no more."""

    def __init__(self, path: Path, mode: str, opener: object = None) -> None:
        self.file = open(path, mode)  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> _open_full:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> None:
        self.file.write(data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_leftovers_of_a_dead_run_are_removed_and_not_read(tmp_path: Path) -> None:
    dead = RunFolder(tmp_path)
    dead.begin()
    dead.append("digits", rows())
    assert dead.staging is not None
    leftover = dead.staging / ".00000003-0123456789ab.parquet-0123456789ab.part"
    others = [tmp_path / "film.part", tmp_path / ".writing-mine" / "a"]  # a download of the user's
    others[1].parent.mkdir()
    for path in (leftover, *others):
        path.write_bytes(b"half a shard")
    folder = RunFolder(tmp_path)
    folder.begin()
    assert len(folder.read("digits")) == 3
    assert [path.exists() for path in (leftover, dead.staging, *others)] == [False, False, True, True]
    folder.end()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".writing-mine", "film.part", "shards"]


def test_a_new_session_fences_off_the_writers_of_earlier_ones(tmp_path: Path) -> None:
    orphan, heir, partner = RunFolder(tmp_path), RunFolder(tmp_path), RunFolder(tmp_path)
    orphan.begin()
    orphan.write_run(minimal_run(wall_seconds=1.0))
    orphan.append("digits", rows())
    partner.join(heir.begin())
    for write in (lambda: orphan.append("digits", rows(3)), lambda: orphan.write_run(minimal_run(wall_seconds=2.0))):
        with pytest.raises(ApmError, match=r"Another process has taken over .*: this one stops"):
            write()
    heir.append("digits", rows(3))
    partner.append("digits", rows(6))
    assert sorted(heir.read("digits")["position"].to_pylist()) == list(range(9))
    assert json.loads((tmp_path / "run.json").read_text())["wall_seconds"] == 1.0


def test_a_file_that_an_orphan_is_about_to_rename_does_not_arrive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new session begins, and looks what is there, between the orphan's last byte and its rename."""
    orphan, heir = RunFolder(tmp_path), RunFolder(tmp_path)
    orphan.begin()
    real = os.replace

    def overtaken(source: Path, target: Path) -> None:
        heir.begin()
        assert len(heir.read("digits")) == 0
        real(source, target)

    monkeypatch.setattr(os, "replace", overtaken)
    with pytest.raises(ApmError, match="taken over"):
        orphan.append("digits", rows())
    assert len(heir.read("digits")) == 0


def test_a_folder_that_has_gone_is_not_made_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.begin()
    folder.append("digits", rows())
    folder.path.rename(tmp_path / "elsewhere")
    for write in (lambda: folder.append("digits", rows(3)), lambda: folder.write_run(minimal_run())):
        with pytest.raises(ApmError, match=r"run was removed or moved while .* writing to it\. Put it back and run"):
            write()
    assert not folder.path.exists()


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    path = folder.append("digits", rows())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UsageError, match=f"{path.name} is damaged"):
        folder.read("digits")


def test_a_flipped_bit_in_a_column_is_found(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    path = folder.append("digits", rows(n=50))
    content = path.read_bytes()
    group = pq.read_metadata(path).row_group(0)
    for column in map(group.column, range(group.num_columns)):
        first = column.data_page_offset if column.dictionary_page_offset is None else column.dictionary_page_offset
        place = first + column.total_compressed_size - 2  # near the end of the column's last page
        path.write_bytes(content[:place] + bytes([content[place] ^ 8]) + content[place + 1 :])
        with pytest.raises(UsageError, match="is damaged"):
            folder.read("digits")


@pytest.mark.slow
def test_the_lock_is_for_one_process_and_dies_with_it(tmp_path: Path) -> None:
    code = (
        "import sys, time; from apm.benchmarks.runs.records import RunFolder;"
        f"lock = RunFolder({str(tmp_path)!r}).lock(); print('locked', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(UsageError, match="Another run is writing to"):
            RunFolder(tmp_path).lock()
    finally:
        other.kill()
        other.communicate()
    RunFolder(tmp_path).lock().release()


def test_clear_removes_the_run_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_run(minimal_run())
    folder.append("digits", rows())
    (tmp_path / "shards" / "digits" / "notes.txt").write_text("mine")
    (tmp_path / "table.md").write_text("mine")
    data = tmp_path / "shards" / "train" / "0000.parquet"  # a data set's own, in a folder of the same name
    data.parent.mkdir()
    data.write_bytes(b"mine")
    folder.clear()
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["0000.parquet", "notes.txt", "table.md"]


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"no": "schema"}', b"7", b'{"schema": "\xff"}'])
def test_a_damaged_run_file_is_named(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "run.json").write_bytes(text)
    with pytest.raises(UsageError, match=r"run\.json is not a run record"):
        Records.open(tmp_path)


def test_a_run_file_of_which_parts_are_gone_is_named(tmp_path: Path) -> None:
    record = minimal_run()
    del record["teacher"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match=r"run\.json is damaged: the record: 'teacher' is a required property"):
        Records.open(tmp_path)


def test_a_folder_that_cannot_be_locked_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*arguments: object, **settings: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(UsageError, match=r"Cannot lock .*Permission denied.*--out"):
        RunFolder(tmp_path).lock()


def test_a_file_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="No run at"):
        Records.open(tmp_path / "file")
    with pytest.raises(UsageError, match="Cannot write to"):
        RunFolder(tmp_path / "file").lock()


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(UsageError, match="schema 99"):
        Records.open(tmp_path)


def test_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No run at"):
        Records.open(tmp_path / "absent")


def test_differences_name_fields_and_both_values() -> None:
    old = {"limit": 5, "methods": {"apm": {"steps": 9, "lr": 0.1}}, "same": [1]}
    new = {"limit": None, "methods": {"apm": {"steps": 9, "lr": 0.2}, "mta": {}}, "same": [1]}
    found = differences(old, new)
    assert found == [("limit", 5, None), ("methods.apm.lr", 0.1, 0.2), ("methods.mta", None, {})]
    assert describe_differences(found).startswith("limit: 5 before, null now; methods.apm.lr: 0.1 before, 0.2 now")


def test_method_rows_are_in_stream_order_and_failures_are_marked(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_run(minimal_run())
    folder.append("digits", rows(1, 2))
    folder.append("digits", [Row(id="first", position=0, label=2, method="m", error="cut off")])
    ((method, found),) = Records.open(tmp_path).rows("digits")
    assert method == "m"
    assert list(found.id) == ["first", "ä/1", "ä/2"]
    assert list(found.error) == ["cut off", None, None]
    assert list(found.prediction) == [-1, 2, 2]
    assert np.isnan(found.nll[0])
    assert found.seconds[1] == pytest.approx(0.1)
    assert found.step_predictions is None


def test_the_same_answer_twice_is_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_run(minimal_run())
    folder.append("digits", rows())
    again = [replace(row, seconds=9.0, probability=0.50001) for row in rows(1, 3)]  # time and rounding are others
    folder.append("digits", again)
    assert sorted(folder.read("digits")["position"].to_pylist()) == [0, 1, 2, 3]
    assert sorted(folder.read("digits", ["id"])["id"].to_pylist()) == ["ä/0", "ä/1", "ä/2", "ä/3"]
    ((_, found),) = Records.open(tmp_path).rows("digits")
    assert len(found) == 4


@pytest.mark.parametrize(
    "change", [{"prediction": 1}, {"label": 0}, {"nll": 1.6}, {"extras": (("a", 2.0),)}, {"error": "cut off"}]
)
def test_two_answers_that_differ_are_named_with_their_files(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = RunFolder(tmp_path)
    folder.write_run(minimal_run())
    first = folder.append("digits", rows())
    second = folder.append("digits", [replace(rows(2, 1)[0], **change)])
    (field,) = change
    with pytest.raises(
        UsageError, match=f"digits: two answers to ä/2 by m differ in {field}: .*Remove the file"
    ) as told:
        list(Records.open(tmp_path).rows("digits"))
    assert str(first) in str(told.value) and str(second) in str(told.value)
    second.unlink()
    assert len(folder.read("digits")) == 3
