"""What tests share: one thread for the arithmetic, a private cache, photographs, and the real data where they are."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

# Before anything imports them: no test may depend on the network or on what an earlier run left in the user's cache.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("COLUMNS", "120")

import numpy as np
import pytest
from PIL import Image

from tests.places import ROOT

PHOTOGRAPHS = {"cat": "chelsea.png", "coffee": "coffee.png", "astronaut": "astronaut.png", "rocket": "rocket.jpg"}


def pytest_collection() -> None:
    """Collect no garbage while torch and its like are imported: a million objects that stay."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Keep the collector from looking at these objects again and again while tests run."""
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    """Let it take them down at the end: a library of C++ complains of what is left."""
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def disk_that_is_not_waited_for() -> Iterator[None]:
    """Leave files to the system, thousands of times: tests kill processes, but none cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the tests' caches: beside thousands of others, pytest's own would be counted for each."""
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(autouse=True)
def private_cache(caches: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test its own cache folder, and none of the user's own settings."""
    folder = Path(tempfile.mkdtemp(dir=caches))
    monkeypatch.setenv("APM_CACHE", str(folder))
    monkeypatch.delenv("APM_DATA", raising=False)
    return folder


@pytest.fixture(autouse=True)
def no_lines_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a slow machine from saying how far it is where a test compares what is said."""
    monkeypatch.setattr("apm.cli.progress.LINE_EVERY", 3600.0)


@pytest.fixture
def narrow_students(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the small student narrow, for tests of what is around it."""
    from apm.student.config import APMConfig

    preset = APMConfig.preset

    def narrow(name: str, **options: Any) -> APMConfig:
        found = preset(name, **options)
        return replace(found, hidden=(64, 32, 16), position_dim=64) if name == "small" else found

    monkeypatch.setattr(APMConfig, "preset", narrow)


@pytest.fixture(scope="session")
def photographs() -> dict[str, Path]:
    """Return scikit-image's free photographs by what is on them: cat, coffee, astronaut, rocket."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    return {name: folder / file for name, file in PHOTOGRAPHS.items()}


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """Return a small colourful JPEG: 48×32, different in each corner."""
    rows, columns = np.mgrid[0:32, 0:48]
    pixels = np.stack([columns * 5, rows * 8, (rows + columns) * 3], axis=-1).astype(np.uint8)
    path = tmp_path / "picture.jpg"
    Image.fromarray(pixels).save(path, quality=95)
    return path


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real data sets (`APM_TEST_DATA`, else shared/data beside the clone), or skip."""
    folder = Path(os.environ.get("APM_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "eval").is_dir():
        pytest.skip(f"no real data: {folder}/eval is not there (set APM_TEST_DATA)")
    return folder
