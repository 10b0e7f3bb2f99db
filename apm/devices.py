"""Which device the work is done on."""

import torch

from apm.errors import UsageError, unknown


def pick_device(name: str) -> torch.device:
    """Return the device for "auto", "cpu" or "cuda" ("cuda:1" too).

    Raises:
        UsageError: an unknown name, or CUDA asked for where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise unknown("device", name, ("auto", "cpu", "cuda"))
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f'PyTorch finds no CUDA device for "{name}" on this machine; use cpu or auto.')
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise UsageError(f'There is no device "{name}"; this machine has {torch.cuda.device_count()}, counted from 0.')
    return torch.device(name)
