"""Refuse weight files that are damaged or could carry code, before open_clip reads them."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from apm.errors import TeacherError


def check_checkpoint(path: Path) -> None:
    """Accept a safetensors file, or a torch file of tensors alone.

    A torch file is read with ``weights_only=True`` and mapped rather than copied, so the check costs little.

    Raises:
        TeacherError: the file is empty, truncated, of another kind, or a pickle with more in it than tensors.
    """
    try:
        if path.stat().st_size == 0:
            raise TeacherError(f'The checkpoint "{path}" is empty.')
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
            tensors: Any = dict.fromkeys(names)
        else:
            tensors = _read_torch(path)
    except OSError as error:
        raise TeacherError(f'The checkpoint "{path}" cannot be read: {error.strerror or error}.') from error
    except SafetensorError as error:
        raise TeacherError(f'The checkpoint "{path}" is damaged or no safetensors file ({error}).') from error
    if not tensors:
        raise TeacherError(f'The checkpoint "{path}" holds no tensors.')


def _read_torch(path: Path) -> Any:
    """Return the state dict in a torch file, or refuse it."""
    zipped = zipfile.is_zipfile(path)
    if zipped:
        with zipfile.ZipFile(path) as archive:
            if any(Path(name).name == "constants.pkl" for name in archive.namelist()):
                raise TeacherError(
                    f'The checkpoint "{path}" is a TorchScript archive, which carries code, so it is refused.'
                    " Save the model's state dict instead, best as safetensors."
                )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of foreign pickles before it refuses them
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise TeacherError(
            f'The checkpoint "{path}" is damaged, or a pickle that holds more than tensors and could run code, so it is'
            " refused. Save the model's state dict instead, best as safetensors."
        ) from error
    except OSError:
        raise
    except Exception as error:  # damaged bytes fail in the reader in many ways
        raise TeacherError(
            f'The checkpoint "{path}" is damaged: it cannot be read ({type(error).__name__}).'
        ) from error
    tensors = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise TeacherError(
            f'The checkpoint "{path}" holds no state dict: names with tensors, alone or under the key "state_dict".'
        )
    return tensors
