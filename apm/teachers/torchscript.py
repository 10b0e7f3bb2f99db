"""The weights in an archive that torch wrote, read without running anything of what it carries.

A TorchScript archive (OpenAI publishes CLIP as one) is a zip file: a pickle of the module's attributes, the numbers of
each storage in a file of their own, and code; what ``torch.save`` writes is the same without code. Here the pickle is
read by an unpickler that knows storages, tensors and plain containers; whatever else it names becomes an inert
placeholder that keeps what it is given. The code is not looked at.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def is_torchscript(archive: zipfile.ZipFile) -> bool:
    """Whether a zip file has the layout that ``torch.jit.save`` writes."""
    return any(Path(name).name == "constants.pkl" for name in archive.namelist())


def read_torchscript(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """Return the tensors among the module's attributes, and its submodules', by their dotted names.

    Raises:
        ValueError, or whatever else damaged bytes make of an unpickler: the archive is not sound.
    """
    folder, module = _unpickle(archive)
    return _numbers(archive, folder, _tensors(module))


def read_state_dict(archive: zipfile.ZipFile, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Return tensors of the state dict in what ``torch.save`` wrote, whatever else is pickled beside it.

    Args:
        archive: holds a state dict, alone or under the key "state_dict".
        wanted: whether a tensor of this name is read.

    Raises:
        ValueError, or whatever else damaged bytes make of an unpickler: the archive is not sound.
    """
    folder, content = _unpickle(archive)
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    found = {name: value for name, value in state.items() if isinstance(value, _Found) and wanted(name)}
    return _numbers(archive, folder, found)


def _unpickle(archive: zipfile.ZipFile) -> tuple[str, Any]:
    """The folder that holds the storages, and what is pickled."""
    (root,) = (name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1)
    with archive.open(_stored(archive, root)) as file:
        return root.removesuffix(".pkl"), _Unpickler(file).load()


def _numbers(archive: zipfile.ZipFile, folder: str, wanted: Mapping[str, _Found]) -> dict[str, Tensor]:
    """Read the tensors' storages, each once."""
    storages: dict[str, Tensor] = {}
    tensors = {}
    for name, found in wanted.items():
        key = found.storage.key
        if key not in storages:
            storages[key] = _read_storage(archive, f"{folder}/{key}", found.storage.dtype)
        # as_strided refuses what would lie outside the storage
        tensors[name] = storages[key].as_strided(found.size, found.stride, found.offset)
    return tensors


@dataclass(frozen=True)
class _Storage:
    """Names a storage: which file, and of what type its numbers are."""

    dtype: torch.dtype
    key: str


@dataclass(frozen=True)
class _Found:
    """A tensor before its numbers are read: a view of a storage."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Placeholder:
    """Stands for an object of any class that the pickle names, and does nothing but keep its attributes."""

    def __new__(cls, *_arguments: Any, **_named: Any) -> _Placeholder:
        return super().__new__(cls)

    def __init__(self, *_arguments: Any, **_named: Any) -> None:
        self.attributes: Any = None

    def __setstate__(self, state: Any) -> None:
        self.attributes = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass  # a kind of dictionary

    def append(self, value: Any) -> None:
        pass  # a kind of list

    extend = append


class _Dict(dict[Any, Any]):
    """A dictionary; the attributes that an OrderedDict may carry, as a state dict does, are dropped."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """Builds containers, `_Found` and `_Placeholder`, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *arguments: _rebuild(*arguments)  # a fresh one: the pickle may set its attributes
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_rest: tensor
        if (module, name) == ("collections", "OrderedDict"):
            return _Dict
        return _Placeholder

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, *_ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise ValueError("a storage of an unknown kind")
        return _Storage(dtype, key)


def _rebuild(storage: Any, offset: Any, size: Any, stride: Any, *_rest: Any) -> _Found:
    if not isinstance(storage, _Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise ValueError("a tensor without a storage, size or stride")
    return _Found(storage, offset, size, stride)


def _tensors(module: Any) -> dict[str, _Found]:
    """Walk the attributes of a module and of the modules among them."""
    found: dict[str, _Found] = {}
    seen: set[int] = set()  # a hostile archive may lead round in circles
    todo = [("", module)]
    while todo:
        prefix, node = todo.pop()
        if id(node) in seen or not isinstance(node.attributes, dict):
            continue
        seen.add(id(node))
        for name, value in node.attributes.items():
            if isinstance(value, _Found):
                found[f"{prefix}{name}"] = value
            elif isinstance(value, _Placeholder):
                todo.append((f"{prefix}{name}.", value))
    return found


def _stored(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """The entry of this name, which torch never compresses: what it takes of memory is then bounded by the file."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    return info


def _read_storage(archive: zipfile.ZipFile, name: str, dtype: torch.dtype) -> Tensor:
    content = archive.read(_stored(archive, name))
    if not content:
        return torch.empty(0, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that bytes cannot be written to; nobody does
        return torch.frombuffer(content, dtype=dtype)
