"""Read weight files, and refuse those that are damaged or could carry code, before open_clip reads them."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from apm.errors import TeacherError
from apm.teachers.torchscript import is_torchscript, read_torchscript

OPENAI_KEYS = frozenset({"input_resolution", "context_length", "vocab_size"})
"""Entries beside the weights in the files that OpenAI publishes, and in no other."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What is in a weight file."""

    numbers: int
    """How many numbers its tensors hold."""
    state: dict[str, Tensor] | None = None
    """The weights, where open_clip cannot read the file itself."""
    from_openai: bool = False
    """Whether it is one of OpenAI's own files, whose models have QuickGELU."""

    def load_into(self, model: nn.Module) -> None:
        """Put `state` into a model of open_clip.

        Raises:
            RuntimeError: names or shapes do not fit.
        """
        from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed

        state = dict(self.state or {})
        if not hasattr(model, "positional_embedding"):
            state = convert_to_custom_text_state_dict(state)
        # An archive holds buffers too that no state dict has, such as the causal mask.
        unsaved = {name for name, _ in model.named_buffers()} - model.state_dict().keys()
        state = {name: tensor for name, tensor in state.items() if name not in unsaved}
        resize_pos_embed(state, model)
        model.load_state_dict(state)


def read_checkpoint(path: Path) -> Checkpoint:
    """Accept a safetensors file, a torch file of tensors alone, or the tensors of a TorchScript archive.

    A torch file is read with ``weights_only=True`` and mapped rather than copied, so the check costs little. Of an
    archive nothing is run, see `apm.teachers.torchscript`.

    Raises:
        TeacherError: the file is empty, truncated, of another kind, or a pickle with more in it than tensors.
    """
    with _explained(path):
        if path.stat().st_size == 0:
            raise TeacherError(f'The checkpoint "{path}" is empty.')
        checkpoint = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
        if not checkpoint.numbers:
            raise TeacherError(f'The checkpoint "{path}" holds no tensors.')
        return checkpoint


def read_torch(path: Path) -> Any:
    """Return what a torch file holds, where that is tensors in plain containers and nothing else.

    Raises:
        TeacherError: the file is truncated, of another kind, or a pickle with more in it than tensors.
    """
    with _explained(path):
        return _load(path)


def model_from(path: Path, make: Callable[[Path], nn.Module], *, wanted_by: str, name: str) -> nn.Module:
    """Let `make` build a model with the weights of a file, and check them; messages are about `wanted_by` and `name`.

    Raises:
        TeacherError: there is no such file, or it is damaged, unsafe, another model's, or not finite.
    """
    if not path.is_file():
        raise TeacherError(f"{wanted_by} cannot be loaded: there is no file {path}.")
    if read_checkpoint(path).state is not None:
        raise TeacherError(f"{wanted_by} cannot be loaded: {path} is a CLIP checkpoint of OpenAI, or TorchScript.")
    try:
        model = make(path)
    except TeacherError:
        raise
    except Exception as error:  # timm and torch report what does not fit in many ways
        reason = " ".join(str(error).split())
        raise TeacherError(
            f"{wanted_by} cannot be loaded: {path} does not fit {name} ({type(error).__name__}: {reason[:300]})."
        ) from error
    if broken := not_finite(model.state_dict()):
        raise TeacherError(
            f"{wanted_by} cannot be used: {path} holds numbers that are not finite, first in {broken[0]}. Download the"
            " file again, or name another one."
        )
    return model


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn whatever a damaged or foreign file makes of its reader into a `TeacherError`."""
    try:
        yield
    except TeacherError:
        raise
    except OSError as error:
        raise TeacherError(f'The checkpoint "{path}" cannot be read: {error.strerror or error}.') from error
    except SafetensorError as error:
        raise TeacherError(f'The checkpoint "{path}" is damaged or not a safetensors file ({error}).') from error
    except pickle.UnpicklingError as error:
        raise TeacherError(
            f'The checkpoint "{path}" is damaged, or a pickle with more than tensors, which could run code; it is'
            " refused. Save the model's state dict instead, preferably as safetensors."
        ) from error
    except Exception as error:  # damaged bytes fail in the reader in many ways
        raise TeacherError(
            f'The checkpoint "{path}" is damaged: it cannot be read ({type(error).__name__}).'
        ) from error


def _read_safetensors(path: Path) -> Checkpoint:
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        numbers = sum(prod(file.get_slice(name).get_shape()) for name in names)
        if not OPENAI_KEYS & set(names):
            return Checkpoint(numbers=numbers)
        return _openai({name: file.get_tensor(name) for name in names})


def _read_torch(path: Path) -> Checkpoint:
    """Read a torch file, or refuse it."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if is_torchscript(archive):
                return _openai(read_torchscript(archive))
    return _plain(path, _load(path))


def _load(path: Path) -> Any:
    with path.open("rb") as file:
        begins = file.read(2)
    if not begins.startswith((b"PK", pickle.PROTO)):  # as the archives that torch writes, or wrote before them
        raise TeacherError(f'The checkpoint "{path}" holds no weights: it is neither a safetensors nor a torch file.')
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of foreign pickles before it refuses them
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _plain(path: Path, content: Any) -> Checkpoint:
    """Check a torch file's content: a state dict, alone or under the key "state_dict"."""
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and (isinstance(value, Tensor) or name in OPENAI_KEYS) for name, value in state.items()
    ):
        raise TeacherError(
            f'The checkpoint "{path}" holds no state dict: names with tensors, alone or under the key "state_dict".'
        )
    if OPENAI_KEYS & state.keys():
        return _openai(state)
    return Checkpoint(numbers=sum(value.numel() for value in state.values() if isinstance(value, Tensor)))


def _openai(state: dict[str, Any]) -> Checkpoint:
    """Take the weights apart from what OpenAI's files hold beside them."""
    weights = {name: value for name, value in state.items() if name not in OPENAI_KEYS}
    return Checkpoint(
        numbers=sum(value.numel() for value in weights.values()),
        state=weights,
        from_openai=state.keys() >= OPENAI_KEYS,
    )


def not_finite(weights: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors, of 16 bits and more, that hold an infinite number or NaN.

    Both show in the extremes, which take one pass and no memory.
    """
    return [
        name
        for name, tensor in weights.items()
        if tensor.is_floating_point() and tensor.numel() and not all(one.isfinite() for one in tensor.aminmax())
    ]
