"""A run is not continued on other pictures of the same names."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from apm.benchmarks.datasets import open_dataset
from apm.benchmarks.runs import file_state
from apm.benchmarks.runs.file_state import FileState
from apm.benchmarks.runs.records import RunFolder
from apm.errors import UsageError
from tests.benchmarks.made_runs import Interrupting, Plain, make_run, picture


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve pictures of one size in bytes."""
    for number in range(12):
        path = tmp_path / "data" / ("cat", "dog", "newt")[number % 3] / f"{number:02d}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    return tmp_path / "data"


def interrupted(run: Path, data: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make_run(run, [Interrupting(3)], open_dataset("folder", data))


def replaced(path: Path, *, keep_time: bool) -> None:
    before = path.stat()
    picture(99).save(path)
    assert path.stat().st_size == before.st_size
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def shortened(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda path: replaced(path, keep_time=True), "other content"),
        (shortened, "1782 bytes before, 1781 bytes now"),
        (Path.unlink, "1782 bytes before, absent now"),
    ],
)
def test_changed_pictures_are_named_and_nothing_is_lost(
    tmp_path: Path, data: Path, change: Callable[[Path], None], what: str
) -> None:
    run = tmp_path / "run"
    dataset = open_dataset("folder", data)
    interrupted(run, data)
    kept = RunFolder(run).read("folder").num_rows
    shutil.copytree(data, tmp_path / "copy", copy_function=shutil.copy2)
    change(data / "dog" / "04.bmp")
    with pytest.raises(UsageError) as told:
        make_run(run, dataset=dataset)
    assert "1 of the 12 images of folder have changed" in str(told.value) and f"dog/04.bmp ({what})" in str(told.value)
    assert RunFolder(run).read("folder").num_rows == kept
    shutil.copytree(tmp_path / "copy", data, dirs_exist_ok=True)  # as it was, but for the times
    make_run(run, dataset=dataset)
    assert RunFolder(run).read("folder").num_rows == 12


def test_of_a_large_set_content_is_sampled_and_times_tell_the_rest(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_state, "READ_ALL_BELOW", 10)
    monkeypatch.setattr(file_state, "SAMPLED", 3)
    samples = open_dataset("folder", data).samples
    before = FileState.of(samples)
    assert [digest is not None for digest in before.digests] == [number % 4 == 0 for number in range(12)]
    again = FileState.from_table(before.to_table())
    assert (list(again.sizes), list(again.times), list(again.digests)) == (before.sizes, before.times, before.digests)
    assert before.changes(FileState.of(samples)) == {}

    def path(number: int) -> Path:
        return Path(samples[number].path or "")

    for number, status in ((number, path(number).stat()) for number in range(12)):
        os.utime(path(number), ns=(status.st_atime_ns, status.st_mtime_ns - 10**13))
    before = FileState.of(samples)
    replaced(path(5), keep_time=False)
    assert before.changes(FileState.of(samples)) == {5: "changed since, content not known"}
    replaced(path(4), keep_time=True)
    assert before.changes(FileState.of(samples)) == {4: "other content", 5: "changed since, content not known"}
    for number in range(12):  # a copy: all times are others, and what was looked at decides
        os.utime(path(number))
    assert before.changes(FileState.of(samples)) == {4: "other content"}
    shortened(path(7))  # says nothing of the others
    now = FileState.of(samples)
    assert before.changes(now) == {4: "other content", 7: "1782 bytes before, 1781 bytes now"}
    monkeypatch.setattr(file_state, "READ_ALL_BELOW", 10**6)
    every = FileState.of(samples)
    os.utime(path(0), ns=(0, 0))
    assert every.changes(now) == now.changes(every) == {}  # content that is known of one time only
    for number in range(12):
        os.utime(path(number), ns=(0, 0))
    monkeypatch.setattr(file_state, "READ_ALL_BELOW", 10)
    copied = FileState.of(samples)
    assert every.changes(copied) == copied.changes(every) == {}
    assert copied.part([3, 4]).digests == [None, copied.digests[4]]


def test_what_a_run_keeps_of_the_files_goes_with_it(tmp_path: Path, data: Path) -> None:
    run = tmp_path / "run"
    make_run(run, [Plain()], open_dataset("folder", data))
    table = pq.read_table(run / "files" / "folder.parquet")
    assert table["size"].to_pylist() == [1782] * 12
    mine = run / "files" / "mine.parquet"
    pq.write_table(table.replace_schema_metadata(None), mine)
    replaced(data / "dog" / "04.bmp", keep_time=True)
    make_run(run, [Plain()], open_dataset("folder", data), fresh=True)
    assert mine.exists()
    assert pq.read_table(run / "files" / "folder.parquet")["digest"].to_pylist() != table["digest"].to_pylist()
    (run / "files" / "folder.parquet").write_bytes(b"damaged")
    with pytest.raises(UsageError, match=r"folder\.parquet is damaged .*Remove this file if"):
        make_run(run, [Plain()], open_dataset("folder", data))


def test_corrupted_samples_know_their_files(data: Path) -> None:
    clean = open_dataset("folder", data)
    foggy = open_dataset("folder", data, corruption="fog")
    assert [sample.path for sample in foggy.samples] == [sample.path for sample in clean.samples]
    assert all(Path(sample.path or "").is_file() for sample in clean.samples)
