"""What a store's folder holds besides features, and of what the features are."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from apm.errors import UsageError
from apm.images.files import write_atomically
from apm.images.paths import printable

from ..corruptions import VERSION
from ..runs.file_state import FileState
from ..runs.records import encoded
from ..runs.run_json import shortened

if TYPE_CHECKING:
    from ..datasets import Dataset, Sample

FORMAT = 1
POLICY = "crops"
"""How views are made: `apm.test_time.views`."""
PRECISIONS = {"fp16": torch.float16, "fp32": torch.float32}

_WORDS = {
    "teacher": "teacher",
    "dim": "width of a feature",
    "views": "views of an image",
    "policy": "kind of views",
    "min_area": "smallest share of the image in a crop",
    "seed": "seed",
    "precision": "precision",
    "cell": "data set",
    "fingerprint": "images, their order or labels (fingerprint)",
    "generated": "corruptions",
    "source": "place",
}


@dataclass(frozen=True, kw_only=True)
class StoreKey:
    """What all features of a store depend on besides the images."""

    teacher: str
    """Its identity."""
    dim: int
    """D."""
    views: int
    """V, the image itself among them."""
    min_area: float
    seed: int
    """Of views and of corruptions that are made as images are read."""
    precision: str = "fp16"
    """A key of `PRECISIONS`."""
    policy: str = POLICY

    @property
    def digest(self) -> str:
        """16 hex digits for all of it."""
        return _digest([FORMAT, asdict(self)])

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers on the disk."""
        return PRECISIONS[self.precision]

    @property
    def image_bytes(self) -> int:
        """Bytes that an image's features take."""
        return self.views * self.dim * self.dtype.itemsize


def cell_identity(dataset: Dataset) -> dict[str, Any]:
    """What tells the images of a cell from others."""
    return {
        "cell": dataset.cell,
        "fingerprint": dataset.fingerprint,
        "generated": f"corruptions version {VERSION}" if dataset.generated else None,
    }


@dataclass(frozen=True)
class CellFolder:
    """One cell's folder in a store."""

    path: Path

    @classmethod
    def of(cls, store: Path, cell: str) -> CellFolder:
        """The folder of the cell of this name."""
        return cls(store / cell.replace("/", "--"))

    def write(self, dataset: Dataset, state: FileState, added: Sequence[Sample] | None = None) -> None:
        """Write down whose features are to come.

        Args:
            dataset: the cell's.
            state: of the files of all its samples, or of those added.
            added: samples to append to a cell that is there already. Its images keep their numbers, and it keeps the
                fingerprint of the first ones, which its shards are bound to.
        """
        samples = dataset.samples if added is None else added
        ids = pa.array([sample.id.encode("utf-8", "surrogateescape") for sample in samples], pa.binary())
        images = state.to_table().add_column(0, "id", ids)
        labels = pa.table({"label": pa.array([sample.label for sample in samples], pa.int32())})
        identity = cell_identity(dataset)
        if added is not None:
            there = _read_table(self.path / "images.parquet")
            labels = pa.concat_tables([_read_table(self.path / "labels.parquet")[: len(there)], labels])
            images = pa.concat_tables([there, images])
            identity["fingerprint"] = (self.read() or {})["fingerprint"]
        about = {"source": dataset.source, "layout": dataset.layout, "images": len(images)}
        about |= {"total": dataset.total, "limit": dataset.limit}
        # In this order: after a kill there are labels without an image, but never an image without its label.
        write_atomically(self.path / "labels.parquet", encoded(labels))
        write_atomically(self.path / "images.parquet", encoded(images))
        write_atomically(self.path / "cell.json", _json({**identity, **about}))

    def read(self) -> dict[str, Any] | None:
        """What cell.json says; None where the store does not have the cell."""
        return _read_json(self.path / "cell.json")

    def digest(self, key: StoreKey) -> str:
        """16 hex digits that every shard of the cell holds."""
        about = self.read() or {}
        return _digest([key.digest, {name: about.get(name) for name in ("cell", "fingerprint", "generated")}])

    def count(self) -> int:
        """How many images the cell has."""
        return int(_read_table(self.path / "labels.parquet").num_rows)

    def images(self) -> tuple[list[str], FileState]:
        """Ids and files of the images, in their order."""
        table = _read_table(self.path / "images.parquet")
        ids = [name.decode("utf-8", "surrogateescape") for name in table["id"].to_pylist()]
        return ids, FileState.from_table(table.drop_columns(["id"]))

    def labels(self) -> list[int]:
        """Labels of the images, in their order. Nothing that adapts may see them."""
        labels: list[int] = _read_table(self.path / "labels.parquet")["label"].to_pylist()
        return labels


def write_store(path: Path, key: StoreKey, sessions: Sequence[Mapping[str, Any]]) -> None:
    """Write store.json: the key, and who has filled the store."""
    write_atomically(path / "store.json", _json({"format": FORMAT, "key": asdict(key), "sessions": list(sessions)}))


def read_store(path: Path) -> tuple[StoreKey, list[dict[str, Any]]] | None:
    """Key and sessions of a store; None where there is none.

    Raises:
        UsageError: store.json is damaged, or of another format.
    """
    record = _read_json(path / "store.json")
    if record is None:
        return None
    if record.get("format") != FORMAT:
        raise UsageError(f"{path} is a store of format {record.get('format')}; this version reads format {FORMAT}.")
    try:
        return StoreKey(**record["key"]), record["sessions"]
    except (KeyError, TypeError):
        raise UsageError(
            f"{path / 'store.json'} is not the record of a store. Remove {path} and encode again."
        ) from None


def mending(sessions: Sequence[Mapping[str, Any]]) -> str:
    """The command that encodes what a store lacks: the one that was last used."""
    return shlex.join(sessions[-1]["command"]) if sessions and sessions[-1]["command"] else "apm encode …"


def differing(there: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Put into words in which fields a store is not what is asked for, both values of each; empty where in none."""
    return "; ".join(
        _difference(name, there.get(name), value) for name, value in asked.items() if there.get(name) != value
    )


def _difference(name: str, there: Any, asked: Any) -> str:
    if name == "fingerprint":
        there, asked = str(there)[:12], str(asked)[:12]
    return f"{_WORDS.get(name, name)}: {shortened(there)} in the store, {shortened(asked)} asked for"


def size(count: float) -> str:
    """A number of bytes for people: ``3.3 GB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if count >= 100 or unit == "bytes" else f"{count:.2g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}). Remove {path.parent} and encode again.") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} is not the record of a store. Remove {path.parent} and encode again.")
    return found


def _read_table(path: Path) -> pa.Table:
    try:
        return pq.read_table(path, partitioning=None, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        why = printable(" ".join(str(error).split()))
        raise UsageError(f"{path} is damaged ({why}). Remove {path.parent} and encode again.") from None
