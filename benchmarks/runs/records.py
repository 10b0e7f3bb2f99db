"""What a run writes: a folder with `run.json` and immutable Parquet shards of rows, one row per image and method.

    RUN/run.json                      what was run, with what, and by whom it was continued (schemas/run.schema.json)
    RUN/shards/<cell>/<shard>.parquet
    RUN/files/<cell>.parquet          what the data set's files were when the run began (`file_state`)
    RUN/.lock                         held while a process writes
    RUN/.writing-<session>/           files that a session is writing

A *cell* is one cell of a table: a data set, or one corruption of it at one level (``digits``, ``imagenet-c/fog/5``).
A shard is written into the session's own folder, flushed to the disk, renamed into its place, and never touched again
until the run is complete, when the shards of each cell are merged into one: a process that dies, or a disk that fills
up, leaves whole shards and perhaps a temporary file.

A session begins by removing the folders of earlier sessions. A process of theirs that is still alive (its launcher was
killed, or the lock does not reach from one machine to another) cannot write from then on: it stops, and no row comes
after the new session has looked at what is there.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from apm.errors import ApmError, UsageError
from apm.images.files import WriteError, write_atomically, writing

from .locks import lock_folder
from .rows import ROW_SCHEMA, MethodRows, Row, row_table
from .run_json import read_run

_STAGING = ".writing-"
_HEX = "[0-9a-f]"
_SHARD = f"{'[0-9]' * 8}-{_HEX * 12}"
"""Form of the names of shards: position of the first row, and a random part."""
_MERGED_AT_MOST = 2**28
"""Bytes of shards that are merged: they pass through memory."""
_KEY = ["position", "method"]
_TIMES = ("seconds", "shared_seconds")


class RunFolder:
    """A run's folder on disk: reads and writes its files; knows nothing of data sets and methods."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.staging: Path | None = None
        """Where this session writes its files before they get their names; None outside of a session."""

    @property
    def run_file(self) -> Path:
        return self.path / "run.json"

    def shard_folder(self, cell: str) -> Path:
        return self.path / "shards" / cell.replace("/", "--")

    def lock(self, timeout: float = 0) -> filelock.BaseFileLock:
        """Take the folder for writing; the system gives it back when the process ends, however it ends.

        Args:
            timeout: seconds to wait for another process to let go.

        Raises:
            UsageError: another run has the folder.
        """
        return lock_folder(self.path, timeout, busy="Another run")

    def read_run(self) -> dict[str, Any] | None:
        """Read run.json; None where there is none.

        Raises:
            UsageError: the file cannot be read, is damaged or of another schema version.
        """
        return read_run(self.run_file)

    def write_run(self, run: Mapping[str, Any]) -> None:
        """Replace run.json in one move."""
        text = json.dumps(run, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        # a path that is not UTF-8 becomes a JSON escape, and the same path when read back
        self._write(self.run_file, text.encode("utf-8", "backslashreplace"))

    def append(self, cell: str, rows: Sequence[Row]) -> Path:
        """Write `rows` as one new shard of `cell`; when this returns they are on the disk.

        Raises:
            ApmError: the disk is full or cannot be written, the folder has gone, or another session has taken it over.
                No part of these rows is kept, all earlier ones are.
        """
        name = f"{rows[0].position:08d}-{uuid.uuid4().hex[:12]}.parquet"
        return self._write(self.shard_folder(cell) / name, encoded(row_table(rows)))

    def _write(self, path: Path, data: bytes) -> Path:
        try:
            return write_atomically(path, data, staging=self.staging)
        except WriteError as error:
            if self.staging is None or self.staging.is_dir():
                raise
            if self.path.is_dir():
                raise ApmError(
                    f"Another process has taken over {self.path}: this one stops and leaves the rest to it."
                ) from error
            raise ApmError(
                f"{self.path} was removed or moved while the run was writing to it. Put it back and run the same "
                "command again to continue; without it, the run starts over."
            ) from error

    def files_file(self, cell: str) -> Path:
        return self.path / "files" / f"{cell.replace('/', '--')}.parquet"

    def write_files(self, cell: str, table: pa.Table) -> None:
        """Keep what the files of `cell` are now."""
        self._write(self.files_file(cell), encoded(table))

    def read_files(self, cell: str) -> pa.Table | None:
        """Read what the files of `cell` were when the run began; None where they were not looked at.

        Raises:
            UsageError: the file is damaged.
        """
        try:
            return pq.read_table(self.files_file(cell), partitioning=None, page_checksum_verification=True)
        except FileNotFoundError:
            return None
        except (pa.ArrowException, OSError) as error:
            raise UsageError(
                f"{self.files_file(cell)} is damaged ({error}). Remove this file if the images are the same as before."
            ) from None

    def shards(self, cell: str) -> list[Path]:
        """All shards of `cell`, by name."""
        return sorted(self.shard_folder(cell).glob(f"{_SHARD}.parquet"))

    def all_shards(self) -> list[Path]:
        """The shards of all cells; a user's own Parquet files in folders of the same name are none."""
        return sorted(self.path.glob(f"shards/*/{_SHARD}.parquet"))

    def read(self, cell: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Read the rows of `cell`, in no particular order.

        A row that is there twice (shards of two copies of a run were put together) is read once.

        Raises:
            UsageError: a shard is damaged (not by a run that died: shards are renamed only when whole), or two answers
                to one image differ.
        """
        wanted = None if columns is None else list(dict.fromkeys([*columns, *_KEY]))
        shards = self.shards(cell)
        try:
            tables = [_read_shard(shard, wanted) for shard in shards]
        except UsageError:
            if all(shard.exists() for shard in shards):
                raise
            return self.read(cell, columns)  # they were merged in this moment
        table = pa.concat_tables(tables) if tables else ROW_SCHEMA.empty_table()
        first = _first_rows(table)
        if len(first) < table.num_rows:
            _check_same_answers(cell, shards)
            table = table.take(first)
        return table if columns is None else table.select(columns)

    def merge(self, cell: str) -> None:
        """Put the rows of a cell that is complete into one shard, in their order, in place of many.

        The new shard is on the disk before the first old one goes: a process that dies in between leaves rows twice,
        which are read once, and the next session that ends merges them.

        Raises:
            ApmError: as `append`; UsageError: as `read`. All rows are there all the same.
        """
        old = self.shards(cell)
        if len(old) < 2 or sum(shard.stat().st_size for shard in old) > _MERGED_AT_MOST:
            return
        rows = self.read(cell).sort_by([("position", "ascending"), ("method", "ascending")])
        name = f"{rows['position'][0].as_py():08d}-{uuid.uuid4().hex[:12]}.parquet"
        self._write(self.shard_folder(cell) / name, encoded(rows))
        with writing(self.path):
            for shard in old:
                shard.unlink(missing_ok=True)

    def begin(self) -> str:
        """Begin a session: fence off all earlier ones. Returns its name, for `join` in the other processes.

        Only for the process that holds the lock.

        Raises:
            WriteError: the folder cannot be written.
        """
        with writing(self.path):
            for earlier in self.path.glob(f"{_STAGING}{_HEX * 12}"):
                for _ in range(100):  # an orphan may put a file in while it is being emptied
                    shutil.rmtree(earlier, ignore_errors=True)
                    if not earlier.exists():
                        break
                else:
                    shutil.rmtree(earlier)  # says why it cannot
            name = uuid.uuid4().hex[:12]
            self.join(name)
            assert self.staging is not None
            self.staging.mkdir()
        return name

    def join(self, session: str) -> None:
        """Write as part of a session that another process began."""
        self.staging = self.path / f"{_STAGING}{session}"

    def end(self) -> None:
        """End the session, when none of its processes writes any more."""
        if self.staging is not None:
            shutil.rmtree(self.staging, ignore_errors=True)
            self.staging = None

    def clear(self) -> None:
        """Remove run.json and all shards, and nothing else that may lie in the folder."""
        with writing(self.path):
            self.run_file.unlink(missing_ok=True)
            files = [file for file in self.path.glob("files/*.parquet") if _is_file_state(file)]
            folders = [*self.path.glob("shards/*"), self.path / "shards", self.path / "files"]
            for path in [*self.all_shards(), *files]:
                path.unlink()
            for folder in folders:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()


def encoded(table: pa.Table) -> bytes:
    """A table as the bytes of a Parquet file, with a checksum for each page."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return bytes(sink.getvalue().to_pybytes())


def _read_shard(shard: Path, columns: Sequence[str] | None = None) -> pa.Table:
    try:
        return pq.read_table(
            shard, schema=ROW_SCHEMA, columns=columns, partitioning=None, page_checksum_verification=True
        )
    except (pa.ArrowException, OSError) as error:
        raise UsageError(
            f"{shard} is damaged ({error}). Remove this file and run again: its images will be computed again."
        ) from None


def _is_file_state(path: Path) -> bool:
    """Whether a Parquet file is one of ours; a user's own may lie in a folder of the same name."""
    try:
        return b"apm.images.files" in (pq.read_schema(path).metadata or {})
    except (pa.ArrowException, OSError):
        return False


def _first_rows(table: pa.Table) -> NDArray[np.int64]:
    """Numbers of the rows that are the first of their image and method."""
    numbered = table.select(_KEY).append_column("row", pa.array(np.arange(table.num_rows)))
    return np.sort(numbered.group_by(_KEY).aggregate([("row", "min")])["row_min"].to_numpy())


def _check_same_answers(cell: str, shards: Sequence[Path]) -> None:
    """Check that rows which are there twice say the same, but for time and rounding.

    Raises:
        UsageError: some do not; image, method and the two files are named.
    """
    compared = [name for name in ROW_SCHEMA.names if name not in _TIMES]
    seen: dict[tuple[int, str], tuple[dict[str, Any], Path]] = {}
    for shard in shards:
        for row in _read_shard(shard).to_pylist():
            earlier, place = seen.setdefault((row["position"], row["method"]), (row, shard))
            name = next((name for name in compared if not _same(earlier[name], row[name])), None)
            if name is not None:
                raise UsageError(
                    f"{cell}: two answers to {row['id']} by {row['method']} differ in {name}: {earlier[name]} in "
                    f"{place}, {row[name]} in {shard}. Remove the file that does not belong to this run and run again: "
                    "what is missing will be computed again."
                )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):  # logits, extras
        return all(map(_same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-2, abs_tol=1e-3)  # rounding of other batches, other machines
    return bool(one == other)


@dataclass(frozen=True)
class Records:
    """A run read back for tables and comparisons."""

    path: Path
    run: dict[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Records:
        """Open a run folder for reading.

        Raises:
            UsageError: there is no run, or it cannot be read.
        """
        folder = RunFolder(path)
        run = folder.read_run()
        if run is None:
            raise UsageError(f'No run at "{path}": a run folder holds run.json. Make one with apm bench … --out {path}')
        return cls(Path(path), run)

    @property
    def cells(self) -> dict[str, dict[str, Any]]:
        """What run.json says of each cell, by key, in the order of the run."""
        return self.run["cells"]

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        """The settings of each method, by name, in the order of the run."""
        return self.run["config"]["methods"]

    def rows(self, cell: str) -> Iterator[tuple[str, MethodRows]]:
        """Yield the rows of each method in `cell` that has any, in the run's order of methods.

        Raises:
            UsageError: two answers to one image differ (files of two runs were copied together).
        """
        table = RunFolder(self.path).read(cell)
        names = np.asarray(table["method"].to_numpy(zero_copy_only=False), dtype=object)
        for method in self.methods:
            part = table.filter(pa.array(names == method)).sort_by("position")
            if part.num_rows == 0:
                continue
            yield method, MethodRows.of(part)
