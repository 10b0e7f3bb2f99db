"""What the files of a data set were when a run began: so that a run is not continued on other pictures.

The fingerprint of a data set covers ids and labels. Here are the size and time of every file, and a hash of its content
for all files of a small set, or for a sample spread over a larger one. They lie in the run folder,
``RUN/files/<cell>.parquet``, a row for each sample in the data set's order.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from apm.errors import UsageError, few

from .records import RunFolder

if TYPE_CHECKING:
    from ..datasets import Dataset
    from ..datasets.readers import Sample

READ_ALL_BELOW = 64 << 20
"""Bytes: of a data set up to this size every file's content is hashed."""

SAMPLED = 64
"""Files whose content is hashed in a larger one."""

_CLOCK = 2_000_000_000  # ns: FAT keeps times to two seconds, and copies round
SCHEMA = pa.schema(
    [pa.field("size", pa.int64()), pa.field("time", pa.int64()), pa.field("digest", pa.string())],
    metadata={"apm.images.files": "1"},
)


@dataclass(frozen=True)
class FileState:
    """Columns over the samples of a data set; None where a sample is no file, or the file is not there."""

    sizes: Sequence[int | None]
    """Bytes."""
    times: Sequence[int | None]
    """Last change, ns since 1970."""
    digests: Sequence[str | None]
    """SHA-256 of the content, as hex; None where it was not read."""

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> FileState:
        """Look at the files of `samples`."""
        found = [_stat(sample.path) for sample in samples]
        sizes = [None if status is None else status.st_size for status in found]
        step = 1 if sum(size or 0 for size in sizes) <= READ_ALL_BELOW else max(1, len(samples) // SAMPLED)
        digests = [_digest(sample.path) if number % step == 0 else None for number, sample in enumerate(samples)]
        return cls(sizes, [None if status is None else status.st_mtime_ns for status in found], digests)

    @classmethod
    def from_table(cls, table: pa.Table) -> FileState:
        """Read back what `to_table` gave."""
        return cls(*(table[name].to_pylist() for name in SCHEMA.names))

    def to_table(self) -> pa.Table:
        """The columns ``size``, ``time`` and ``digest``."""
        return pa.table(
            [pa.array(values, field.type) for values, field in zip(self._columns, SCHEMA, strict=True)], schema=SCHEMA
        )

    @property
    def _columns(self) -> tuple[Sequence[int | str | None], ...]:
        return self.sizes, self.times, self.digests

    def changes(self, now: FileState) -> dict[int, str]:
        """By number of the sample, what is different now, for people.

        Times alone are no change where all of them differ: then the data set was copied, or unpacked again. Sizes and
        known content must be the same all the same.
        """
        found: dict[int, str] = {}
        later: dict[int, str] = {}
        unread = 0  # files of the same size whose content is not known of both times
        for number, size in enumerate(self.sizes):
            digests = self.digests[number], now.digests[number]
            times = self.times[number], now.times[number]
            if size != now.sizes[number]:
                found[number] = f"{_bytes(size)} before, {_bytes(now.sizes[number])} now"
            elif None not in digests:
                if digests[0] != digests[1]:
                    found[number] = "other content"
            elif times[0] is not None and times[1] is not None:
                unread += 1
                if abs(times[0] - times[1]) > _CLOCK:
                    later[number] = "changed since, content not known"
        return found if len(later) == unread else {**later, **found}

    def part(self, numbers: Sequence[int]) -> FileState:
        """The files with these numbers."""
        return FileState(*([column[number] for number in numbers] for column in self._columns))  # type: ignore[arg-type]


def _stat(path: str | None) -> os.stat_result | None:
    try:
        return None if path is None else os.stat(path)
    except OSError:
        return None


def _digest(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while part := file.read(1 << 20):
                digest.update(part)
            return digest.hexdigest()
    except OSError:
        return None


def _bytes(size: int | None) -> str:
    return "absent" if size is None else f"{size} bytes"


def check_files(folder: RunFolder, states: Mapping[str, FileState], cells: Mapping[str, Callable[[], Dataset]]) -> None:
    """Compare the files of every cell with what they were when the run began; a run that begins writes that down.

    Args:
        folder: of the run.
        states: the files now, by cell.
        cells: opens a cell's data set again, for the names of what has changed.

    Raises:
        UsageError: files of a cell have changed; they are named.
    """
    for cell, now in states.items():
        if all(size is None for size in now.sizes) and not folder.files_file(cell).exists():
            continue  # built in, or streamed
        table = folder.read_files(cell)
        if table is None:
            folder.write_files(cell, now.to_table())
        elif changes := FileState.from_table(table).changes(now):
            samples = cells[cell]().samples
            raise UsageError(
                f"{len(changes)} of the {len(samples)} images of {cell} have changed since {folder.path} was begun: "
                f"{named_changes(changes, samples)}. Put them back, or give another folder with --out."
            )


def named_changes(changes: Mapping[int, str], samples: Sequence[Sample]) -> str:
    """The first few changes, by the names of the images: ``cat/1.png (other content), …``."""
    return few([f"{samples[number].id} ({what})" for number, what in changes.items()])
