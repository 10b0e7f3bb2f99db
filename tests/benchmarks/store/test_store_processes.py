"""A store that several processes fill, or one that is killed: it holds what one process would have put there."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from apm.benchmarks.store.reader import FeatureStore
from tests.benchmarks.made_runs import make_dataset
from tests.benchmarks.store.test_store import VIEWS, fill
from tests.fakes import FakeTeacher
from tests.launch import TORCHRUN, finish, start

pytestmark = pytest.mark.slow

WORKER = """
import os, sys, time
from pathlib import Path
from apm.benchmarks.store.encode import encode
from apm.benchmarks.store.filling import EncodeOptions
from apm.processes import join
from tests.benchmarks.made_runs import make_dataset
from tests.benchmarks.store.test_store import VIEWS
from tests.fakes import FakeTeacher

class Counted(FakeTeacher):
    def encode_image(self, pixels):
        time.sleep(float(sys.argv[2]))
        if self.image_calls == 0:
            Path(sys.argv[1] + f".{os.environ.get('RANK', 0)}").touch()
        return super().encode_image(pixels)

with join() as group:
    options = EncodeOptions(views=VIEWS, batch_size=1, workers=1, flush_seconds=0.0)
    encode(Path(sys.argv[1]), [lambda: make_dataset(17, bad=[3])], Counted(), options, group=group)
"""


def assert_whole(store: Path, tmp_path: Path) -> None:
    dataset = make_dataset(17, bad=[3])
    fill(tmp_path / "alone", dataset)
    one, other = (FeatureStore.open(path).cell(dataset) for path in (tmp_path / "alone", store))
    assert one.views(range(17)).first(VIEWS).equal(other.views(range(17)).first(VIEWS))
    assert [other.error(number) for number in range(17)] == [one.error(number) for number in range(17)]
    assert one.error(3) == "the file is cut off"


def test_three_processes_fill_the_store_of_one(tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert finish(WORKER, tmp_path, store, 0.0, launcher=(*TORCHRUN, "--nproc-per-node=3")) == 0
    assert sorted(path.name for path in tmp_path.glob("store.*")) == [
        "store.0",
        "store.1",
        "store.2",
    ]  # all had a share
    assert len(list((store / "digits").glob("*.safetensors"))) == 1
    assert_whole(store, tmp_path)


def test_a_killed_encoding_goes_on(tmp_path: Path) -> None:
    store = tmp_path / "store"
    process = start(WORKER, tmp_path, store, 0.05)
    try:
        while len(shards := list((store / "digits").glob("*.safetensors"))) < 3 and process.poll() is None:
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert 3 <= len(shards) < 17
    dataset, teacher = make_dataset(17, bad=[3]), FakeTeacher()
    fill(store, dataset, teacher)
    assert 0 < teacher.image_calls < 16 * VIEWS
    assert_whole(store, tmp_path)
