"""Several processes on one run: the rows are those of one process, also when one of them is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from torch.distributed import HashStore

from apm.benchmarks.runs.records import Records, RunFolder
from apm.errors import UsageError
from apm.processes import ALONE, Group, agree, join, restarted
from tests.benchmarks.made_runs import Plain, Stream, make_dataset, make_run
from tests.benchmarks.runs.test_runner import assert_same
from tests.launch import TORCHRUN, finish, start
from tests.places import ROOT

WORKER = """
import os, signal, sys
from pathlib import Path
from apm.processes import join, restarted
from apm.benchmarks.runs.records import RunFolder
from tests.benchmarks.made_runs import Plain, Stream, make_dataset, make_run

RunFolder.merge = lambda folder, cell: None  # the shards of each process are looked at
folder, kill_after = Path(sys.argv[1]), int(sys.argv[2])

class Killed(Plain):
    def predict(self, batch):
        if os.environ["RANK"] == "1" and not restarted() and self.images >= kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().predict(batch)

with join() as group:
    methods = [Killed() if kill_after else Plain(), Stream()]
    make_run(folder, methods, make_dataset(17, bad=[3]), group=group, flush_seconds=0.0)
"""


def torchrun(folder: Path, processes: int, *, restarts: int = 0, kill_after: int = 0) -> None:
    """Run the worker under torch's launcher, which must end well."""
    flags = (f"--nproc-per-node={processes}", f"--max-restarts={restarts}", "--monitor-interval=0.1")
    assert finish(WORKER, folder.parent, folder, kill_after, launcher=(*TORCHRUN, *flags)) == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("whole")
    make_run(folder, [Plain(), Stream()], make_dataset(17, bad=[3]))
    return folder


@pytest.mark.slow
def test_three_processes_write_the_rows_of_one(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "run"
    torchrun(folder, 3)
    assert_same(folder, whole)
    record = json.loads((folder / "run.json").read_text())
    assert record["counts"] == {"digits": {"images": 17, "rows": 34, "failed_images": 1}}
    assert [session["processes"] for session in record["sessions"]] == [3]
    assert Records.open(folder).run["config"] == Records.open(whole).run["config"]
    # The episodic method was divided: each process wrote its own positions.
    shards = [set(part["position"]) for part in _plain_shards(folder)]
    assert {position % 3 for positions in shards for position in positions} == {0, 1, 2}
    assert all(len({position % 3 for position in positions}) == 1 for positions in shards)


@pytest.mark.slow
def test_a_killed_worker_is_restarted_and_goes_on(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "run"
    torchrun(folder, 2, restarts=1, kill_after=2)
    assert_same(folder, whole)
    assert len(json.loads((folder / "run.json").read_text())["sessions"]) == 2  # killed; restarted


ORPHANED = """
import os, sys, time
from pathlib import Path
from apm.processes import join
from tests.benchmarks.made_runs import Plain, Stream, make_dataset, make_run

class Noted(Plain):
    def predict(self, batch):
        Path(sys.argv[1] + f".{os.environ['RANK']}.pid").write_text(str(os.getpid()))
        return super().predict(batch)

with join() as group:
    make_run(Path(sys.argv[1]), [Noted(seconds=0.2), Stream()], make_dataset(60), group=group, flush_seconds=0.0)
"""


@pytest.mark.slow
def test_a_worker_whose_launcher_was_killed_ends_and_doubles_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    make_run(tmp_path / "whole", [Plain(), Stream()], make_dataset(60))
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    launcher = start(ORPHANED, tmp_path, folder, launcher=(*TORCHRUN, "--nproc-per-node=2"), **silent)
    notes = [Path(f"{folder}.{rank}.pid") for rank in (0, 1)]
    try:
        deadline = time.monotonic() + 300
        while not all(note.is_file() and note.read_text() for note in notes) or len(_plain_shards(folder)) < 4:
            assert time.monotonic() < deadline and launcher.poll() is None
            time.sleep(0.02)
        first, orphan = (int(note.read_text()) for note in notes)
        os.kill(launcher.pid, signal.SIGKILL)
        os.kill(first, signal.SIGKILL)
        _wait_for_end(first)  # with it goes its lock
        make_run(folder, [Plain(), Stream()], make_dataset(60))  # while the orphan may still be at work
        _wait_for_end(orphan)
    finally:
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
    assert_same(folder, tmp_path / "whole")
    written = [row for path in RunFolder(folder).shards("digits") for row in pq.read_table(path).to_pylist()]
    assert len(written) == 120  # none of them twice, not even on the disk


@pytest.mark.slow
def test_a_process_that_waits_for_others_ends_with_its_launcher(tmp_path: Path) -> None:
    note, said = tmp_path / "pid", tmp_path / "said"
    waiting = (
        "import os, pathlib, torch.distributed; from apm.processes import join;"
        f"pathlib.Path({str(note)!r}).write_text(str(os.getpid())); join().__enter__()"
    )
    environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}  # nobody is there
    with said.open("w") as stderr:
        launcher = subprocess.Popen(
            ["bash", "-c", '"$@" & wait', "bash", sys.executable, "-c", waiting],
            cwd=ROOT,
            env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
            stderr=stderr,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while not (note.is_file() and note.read_text()):
            assert time.monotonic() < deadline and launcher.poll() is None
            time.sleep(0.02)
        time.sleep(2)  # until it has looked who started it
        launcher.kill()
        _wait_for_end(int(note.read_text()))
    finally:
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
    assert "The launcher has ended" in said.read_text()


def _wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 60
    while _alive(pid):
        assert time.monotonic() < deadline, f"process {pid} works on"
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    """Whether a process runs; one that has ended, with all its threads, and is not yet waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z" or len(os.listdir(f"/proc/{pid}/task")) > 1
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_one_process_finishes_what_one_of_two_began(tmp_path: Path, whole: Path) -> None:
    class First(Group):
        def broadcast(self, value: Any) -> Any:
            return value

        def barrier(self) -> None:
            raise KeyboardInterrupt  # the other one never comes

    folder, dataset = tmp_path / "run", make_dataset(17, bad=[3])
    with pytest.raises(KeyboardInterrupt):
        make_run(folder, [Plain(), Stream()], dataset, group=First(0, 2))
    rows = RunFolder(folder).read("digits").to_pylist()
    assert {row["position"] for row in rows if row["method"] == "plain"} == set(range(0, 17, 2))
    assert {row["position"] for row in rows if row["method"] == "stream"} == set(range(17))
    make_run(folder, [Plain(), Stream()], dataset)
    assert_same(folder, whole)


def test_processes_find_each_other_in_a_store_that_holds_greetings_of_the_dead() -> None:
    store = HashStore()
    names = []
    for _ in range(3):  # each attempt after the first finds what the one before has left
        with ThreadPoolExecutor(3) as pool:
            found = [pool.submit(agree, store, rank, 3) for rank in (0, 2)]
            time.sleep(0.05)  # the first has answered the dead meanwhile
            found.append(pool.submit(agree, store, 1, 3))
            (name,) = {future.result(timeout=60) for future in found}
        names.append(name)
    assert len(set(names)) == 3


def test_a_process_stops_when_the_first_is_refused_or_sees_other_data(tmp_path: Path) -> None:
    class Second(Group):
        answer: tuple[Any, Any]

        def broadcast(self, value: Any) -> Any:
            assert value == (None, None)  # it takes no lock and writes no record
            return self.answer

        def barrier(self) -> None:
            pass

    record = make_run(tmp_path / "other").run
    for answer, message in (
        ((UsageError("in use"), None), "in use"),
        ((None, {**record, "config": {**record["config"], "seed": 5}}), "does not see the same as process 0. seed: 5"),
    ):
        group = Second(1, 2)
        object.__setattr__(group, "answer", answer)
        with pytest.raises(UsageError, match=message):
            make_run(tmp_path / "run", group=group)
    assert not (tmp_path / "run").exists()


def test_outside_of_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    with join() as group:
        assert group == ALONE
    assert not restarted()


def _plain_shards(folder: Path) -> list[dict[str, list[int]]]:
    tables = [pq.read_table(path).to_pydict() for path in RunFolder(folder).shards("digits")]
    return [table for table in tables if set(table["method"]) == {"plain"}]
