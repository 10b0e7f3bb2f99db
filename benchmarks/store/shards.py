"""Shards of a store's cell: immutable safetensors files, each with the features of some of the cell's images.

A shard holds the tensors ``rows`` (n,), numbers of the images in the cell; ``tokens`` (n, D), features of the images
themselves; ``views`` (n, V − 1, D), those of their other views; and in its header the cell that it belongs to, why
images among its rows could not be read, and a SHA-256 over all of that. It is written atomically and never changed.
When a cell is complete its shards are merged into few: see `merge`.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from apm.images.files import write_atomically, writing

from .layout import StoreKey

BLOCK_BYTES = 64 << 20
"""Of a merged shard: it passes through memory."""
_PATTERN = f"{'[0-9]' * 8}-{'[0-9a-f]' * 12}.safetensors"
_VERIFYING = 4  # threads; SHA-256 lets others run


class DamagedShard(Exception):
    """A shard whose bytes are not those that were written, or which is of another store."""

    def __init__(self, path: Path, why: str) -> None:
        self.path = path
        super().__init__(f"{path} is damaged: {why}")


@dataclass(frozen=True)
class Shard:
    """An open shard; its tensors are read from the disk when they are looked at."""

    path: Path
    rows: NDArray[np.int64]
    """(n,) numbers of the images in their cell."""
    tokens: Tensor
    """(n, D)."""
    views: Tensor
    """(n, V − 1, D)."""
    errors: Mapping[int, str]
    """By number of the image, why it has no features; its rows hold zeros."""


def write_shard(
    folder: Path, cell: str, rows: NDArray[np.int64], tokens: Tensor, views: Tensor, errors: Mapping[int, str]
) -> Path:
    """Write a shard; when this returns it is on the disk.

    Args:
        folder: of the cell.
        cell: the cell's digest.
        rows, tokens, views, errors: as in `Shard`, the tensors in the store's precision.

    Raises:
        WriteError: the disk is full or cannot be written; no part of the shard is kept.
    """
    tensors = {"rows": torch.from_numpy(rows), "tokens": tokens.contiguous(), "views": views.contiguous()}
    told = json.dumps({str(row): why for row, why in errors.items()}, sort_keys=True)
    metadata = {"cell": cell, "errors": told, "sha256": _checksum(cell, told, tensors)}
    name = f"{int(rows[0]):08d}-{uuid.uuid4().hex[:12]}.safetensors"
    return write_atomically(folder / name, save(tensors, metadata))


def read_shard(path: Path, cell: str, key: StoreKey, *, verify: bool) -> Shard:
    """Open a shard.

    Args:
        path: of the file.
        cell: the cell's digest.
        key: of the store.
        verify: whether to compare all bytes with the checksum, and not the header alone.

    Raises:
        DamagedShard: it was cut off or changed, or is of another store or cell.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in ("rows", "tokens", "views")}
        errors = {int(row): str(why) for row, why in json.loads(metadata["errors"]).items()}
    except (OSError, SafetensorError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        raise DamagedShard(path, " ".join(str(error).split())) from None
    if metadata["cell"] != cell:
        raise DamagedShard(path, "it is of other images, another teacher or other views")
    n = len(tensors["rows"])
    shapes = {"rows": (n,), "tokens": (n, key.dim), "views": (n, key.views - 1, key.dim)}
    wrong = [name for name, shape in shapes.items() if tuple(tensors[name].shape) != shape]
    if wrong or (verify and metadata["sha256"] != _checksum(cell, metadata["errors"], tensors)):
        raise DamagedShard(path, "its checksum is not that of its content")
    return Shard(path, tensors["rows"].numpy(), tensors["tokens"], tensors["views"], errors)


def read_shards(folder: Path, cell: str, key: StoreKey, *, verify: bool) -> tuple[list[Shard], list[DamagedShard]]:
    """Open all shards of a cell's folder: the sound ones and what is wrong with the others, by name."""

    def read(path: Path) -> Shard | DamagedShard:
        try:
            return read_shard(path, cell, key, verify=verify)
        except DamagedShard as damage:
            return damage

    with ThreadPoolExecutor(_VERIFYING) as pool:
        found = list(pool.map(read, sorted(folder.glob(_PATTERN))))
    return [one for one in found if isinstance(one, Shard)], [one for one in found if isinstance(one, DamagedShard)]


def places(shards: Sequence[Shard], images: int) -> NDArray[np.int64]:
    """Where each image's features are: (images, 2) shard and row in it, −1 where they are nowhere.

    Rows that are there twice, as after a kill while shards were merged, are the same: any will do.
    """
    found = np.full((images, 2), -1)
    for number, shard in enumerate(shards):
        found[shard.rows] = np.stack([np.full(len(shard.rows), number), np.arange(len(shard.rows))], axis=1)
    return found


def merge(folder: Path, cell: str, key: StoreKey, images: int) -> None:
    """Put the shards of a cell that is complete into few, each of neighbouring images.

    A new shard is on the disk before an old one goes: a process that dies in between leaves rows twice, and the next
    one that encodes merges them. At no time are there more than a few new shards' bytes twice.

    Args:
        folder: of the cell.
        cell: its digest.
        key: of the store.
        images: of the cell.
    """
    old, _ = read_shards(folder, cell, key, verify=False)
    step = max(1, BLOCK_BYTES // key.image_bytes)
    if len(old) <= -(-images // step):
        return
    place = places(old, images)
    errors = {row: why for shard in old for row, why in shard.errors.items()}
    for first in range(0, images, step):
        rows = np.arange(first, min(first + step, images))
        sources = [(old[shard], row) for shard, row in place[rows].tolist()]
        tokens = torch.stack([shard.tokens[row] for shard, row in sources])
        views = torch.stack([shard.views[row] for shard, row in sources])
        write_shard(folder, cell, rows, tokens, views, {row: errors[row] for row in rows.tolist() if row in errors})
        with writing(folder):
            for shard in old:
                if len(shard.rows) and first <= shard.rows.max() <= rows[-1]:  # all of it is in new shards now
                    shard.path.unlink(missing_ok=True)


def _checksum(cell: str, errors: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps([cell, errors]).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
