"""Recorded outputs of the published methods: where they are, and when ours agree with them.

The folder is taken from the environment variable APM_PEERS_DIR, so that other files of the same form can be run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.places import GOLDEN

FOLDER = Path(os.environ.get("APM_PEERS_DIR") or GOLDEN)


def golden_files(name: str) -> list[Path]:
    """Return a method's files; a folder of one's own need not hold every method."""
    found = sorted(FOLDER.glob(f"{name}_seed*.npz"))
    if not found and FOLDER == GOLDEN:
        raise FileNotFoundError(f"no {name}_seed*.npz in {GOLDEN}")
    return found


def each_golden(name: str) -> pytest.MarkDecorator:
    """Run a test with ``path`` each of the method's files."""
    return pytest.mark.parametrize("path", golden_files(name), ids=lambda path: path.stem)


def read_golden(path: Path) -> Mapping[str, Tensor]:
    """Every array of a file."""
    with np.load(path) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def close(ours: Tensor, published: Tensor, tolerance: float = 1e-4) -> None:
    """Fail unless they agree to `tolerance`, relative or of the mean magnitude."""
    atol = tolerance * float(published.abs().mean())
    torch.testing.assert_close(ours, published, rtol=tolerance, atol=atol)
