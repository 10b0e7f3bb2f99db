"""What training needs of every image, computed once and kept on the disk: the student's input and the teacher's grid.

    CACHE/<key>/images.u8      (n, S, S, 3) uint8, what `apm.images.load.central_square` cuts
    CACHE/<key>/grids.f16      (n, h', w', D) float16, the teacher's own grid, at its own resolution
    CACHE/<key>/index.json     names, shapes, how far it is

The key is made of the list of images, the teacher's identity and the sizes. An interrupted run continues.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apm.errors import ApmError, ImageError, UsageError
from apm.images.files import alone_with, is_private, write_atomically, writing
from apm.images.load import IMAGENET_MEAN, IMAGENET_STD, MAX_PIXELS, central_square
from apm.pretrain.images import ImageSource

if TYPE_CHECKING:
    from apm.teachers.base import GridTeacher

_FORMAT = 1
_FLUSH_EVERY = 256  # images; what an interrupted run may have to compute again


@dataclass(frozen=True)
class GridCache:
    """Inputs and targets of n images, read from the disk as they are needed.

    Attributes:
        names: of the n images, in order.
        skipped: (name, what is wrong) of those that could not be read.
        images: (n, S, S, 3) uint8.
        grids: (n, h', w', D) float16.
    """

    names: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    images: NDArray[np.uint8]
    grids: NDArray[np.float16]

    def inputs(self, numbers: NDArray[np.int64]) -> Tensor:
        """Images (B, 3, S, S) float32, ImageNet mean and deviation taken out: what `student_input` returns for them."""
        return normalised(torch.from_numpy(self.images[numbers]))

    def targets(self, numbers: NDArray[np.int64]) -> Tensor:
        """Teacher grids (B, h', w', D) float32."""
        return torch.from_numpy(self.grids[numbers].astype(np.float32))


def normalised(pixels: Tensor) -> Tensor:
    """Squares (B, S, S, 3) uint8 -> (B, 3, S, S) float32, ImageNet mean and deviation taken out; channels last."""
    size = pixels.shape[2]
    mean, std = (torch.tensor(values).repeat(size) for values in (IMAGENET_MEAN, IMAGENET_STD))  # (S * 3,) each
    lines = pixels.flatten(2).float()  # (B, S, S * 3): whole lines, as steps of three numbers are slow
    lines.div_(255).sub_(mean).div_(std)
    return lines.unflatten(2, (size, 3)).permute(0, 3, 1, 2)


def build_cache(
    source: ImageSource,
    teacher: GridTeacher | None,
    folder: str | os.PathLike[str],
    *,
    size: int,
    grid_size: int | None = None,
    max_pixels: int = MAX_PIXELS,
    on_image: Callable[[str | None], None] = lambda error: None,
) -> GridCache:
    """Compute what is missing, and open the cache.

    Args:
        source: the images.
        teacher: gives the grids; None: only the images are wanted, and grids are (n, 0, 0, 0).
        folder: where caches lie; each in a folder of its own.
        size: S, side of the student's input in pixels.
        grid_size: side in pixels at which the teacher sees the images; None: its own default.
        max_pixels: larger images are skipped.
        on_image: called after each image, with what is wrong with it or None.

    Raises:
        UsageError: fewer than two images can be read, or another process is filling the cache.
        ApmError: the teacher's grids differ in shape, or hold numbers that are not finite or too large for float16;
            or the cache is of another user.
    """
    if teacher is not None and grid_size is None:
        grid_size = teacher.grid_size
    key = {
        "format": _FORMAT,
        "images": source.fingerprint,
        "teacher": teacher and teacher.identity,
        "size": size,
        "grid_size": grid_size,
        "max_pixels": max_pixels,
    }
    where = Path(folder, hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16])
    with writing(where):
        where.mkdir(parents=True, exist_ok=True)
    _check_owner(where)
    new: dict[str, Any] = {"key": key, "next": 0, "names": [], "skipped": [], "grid": None}
    index = _read_index(where) or new
    if index["next"] < len(source):
        with alone_with(where / "index.json", "writing"):
            index = _read_index(where) or new  # another process may have gone on in the meantime
            _extend(where, index, source, teacher, size, grid_size, max_pixels, on_image)
    if len(index["names"]) < 2:
        raise UsageError(
            f"{len(index['names'])} of {len(source)} images in {source.place} can be read; training needs 2 or more."
        )
    return _open(where, index, size)


def _extend(
    where: Path,
    index: dict[str, Any],
    source: ImageSource,
    teacher: GridTeacher | None,
    size: int,
    grid_size: int | None,
    max_pixels: int,
    on_image: Callable[[str | None], None],
) -> None:
    """Append, by plain writes: a full disk is an error then, where a mapped file would be a crash."""
    starts = (_bytes_of(index, size, kind) for kind in ("images", "grids"))
    with _open_at(where / "images.u8", next(starts)) as images, _open_at(where / "grids.f16", next(starts)) as grids:
        for name, image in source.read(index["next"], max_pixels=max_pixels):
            error = None
            if isinstance(image, ImageError):
                error = str(image)
                index["skipped"].append([name, error])
            else:
                grid = np.zeros((0, 0, 0), np.float32)
                if teacher is not None:
                    grid = teacher.encode_grid(image, size=grid_size).float().cpu().numpy()
                _check(grid, index, name)
                with writing(where):
                    images.write(np.asarray(central_square(image, size)).tobytes())
                    grids.write(grid.astype(np.float16).tobytes())
                index["names"].append(name)
            index["next"] += 1
            if index["next"] % _FLUSH_EVERY == 0:
                _flush(where, index, images, grids)
            on_image(error)
        _flush(where, index, images, grids)


def _check(grid: NDArray[np.float32], index: dict[str, Any], name: str) -> None:
    if grid.ndim != 3:
        raise ApmError(f"{name}: the teacher's grid must be (rows, columns, features), not of shape {grid.shape}.")
    if index["grid"] is None:
        index["grid"] = list(grid.shape)
    if list(grid.shape) != index["grid"]:
        raise ApmError(f"{name}: the teacher's grid is {list(grid.shape)}, and {index['grid']} for earlier images.")
    if not np.abs(grid).max(initial=0) <= np.finfo(np.float16).max:  # so that NaN is caught too
        raise ApmError(f"{name}: the teacher's grid holds values that are not finite, or beyond float16's range.")


def _bytes_of(index: dict[str, Any], size: int, kind: str) -> int:
    count = len(index["names"])
    return count * size * size * 3 if kind == "images" else count * 2 * int(np.prod(index["grid"] or 0))


def _open_at(path: Path, end: int) -> IO[bytes]:
    """Open for writing at `end`; what an interrupted run wrote beyond it is dropped."""
    path.touch(mode=0o600)
    file = path.open("r+b")
    file.truncate(end)
    file.seek(end)
    return file


def _flush(where: Path, index: dict[str, Any], *files: IO[bytes]) -> None:
    with writing(where):
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    write_atomically(where / "index.json", json.dumps(index).encode(), private=True)


def _check_owner(where: Path) -> None:
    """Refuse a cache that another user wrote or can change, since it would decide the training data."""
    for name in ("index.json", "images.u8", "grids.f16"):
        if (path := where / name).is_file():
            with path.open("rb") as file:
                if not is_private(file):
                    raise ApmError(
                        f"{path} belongs to another user, or can be changed by one. Name a cache folder of your own, "
                        f"or remove {where}."
                    )


def _read_index(where: Path) -> dict[str, Any] | None:
    try:
        index: dict[str, Any] = json.loads((where / "index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ApmError(f"{where / 'index.json'} is damaged ({error}); remove the folder {where}.") from error
    return index


def _open(where: Path, index: dict[str, Any], size: int) -> GridCache:
    arrays = []
    for kind, file, dtype, shape in (
        ("images", "images.u8", np.uint8, (size, size, 3)),
        ("grids", "grids.f16", np.float16, tuple(index["grid"])),
    ):
        path = where / file
        if not path.is_file() or path.stat().st_size != _bytes_of(index, size, kind):
            raise ApmError(f"{path} is not what {where / 'index.json'} says; remove the folder {where}.")
        whole = (len(index["names"]), *shape)
        # an empty file cannot be mapped
        arrays.append(np.memmap(path, dtype=dtype, mode="r", shape=whole) if np.prod(whole) else np.zeros(whole, dtype))
    return GridCache(
        names=tuple(index["names"]),
        skipped=tuple((name, error) for name, error in index["skipped"]),
        images=arrays[0],
        grids=arrays[1],
    )
