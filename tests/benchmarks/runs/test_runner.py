"""The runner: what it records, and that nothing is lost, doubled or changed however it is stopped."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from apm.benchmarks.methods import create_method
from apm.benchmarks.methods.base import Batch, Prediction
from apm.benchmarks.runs.decoding import Readable, Unreadable, next_batch
from apm.benchmarks.runs.records import Records, RunFolder
from apm.benchmarks.runs.run_record import RunOptions
from apm.benchmarks.runs.runner import run
from apm.benchmarks.runs.scoring import NOT_FINITE
from apm.benchmarks.runs.shares import stream_order
from apm.errors import ApmError, UsageError
from apm.text.zeroshot import ZeroShotHead
from tests.benchmarks.made_runs import Interrupting, Plain, Stream, make_dataset, make_run, picture
from tests.fakes import FakeTeacher
from tests.places import ROOT
from tests.schemas import schema

UNTIMED = ("id", "position", "label", "method", "prediction", "rank", "teacher_prediction", "steps", "error")


def answers(path: Path, cell: str = "digits") -> list[tuple[Any, ...]]:
    """All rows of a cell without their numbers and timing, by method and position."""
    rows = RunFolder(path).read(cell).to_pylist()
    return sorted((tuple(row[name] for name in UNTIMED) for row in rows), key=lambda row: (row[3], row[1]))


def assert_same(path: Path, other: Path, cell: str = "digits") -> None:
    """The same rows, and the same numbers but for float32's rounding: batches may have been cut elsewhere."""
    assert answers(path, cell) == answers(other, cell)
    mine, theirs = (
        RunFolder(folder).read(cell).sort_by([("method", "ascending"), ("position", "ascending")])
        for folder in (path, other)
    )
    for name in ("probability", "nll", "cosine"):
        first, second = (table[name].to_numpy(zero_copy_only=False).astype(float) for table in (mine, theirs))
        np.testing.assert_allclose(first, second, rtol=2e-5, atol=2e-6)


def test_rows_hold_what_an_independent_computation_gives(tmp_path: Path) -> None:
    dataset = make_dataset()
    make_run(tmp_path, [Plain()], dataset)
    teacher = FakeTeacher()
    head = ZeroShotHead.build(teacher, dataset.class_names, dataset.templates)
    order = stream_order(12, 0)
    rows = sorted(RunFolder(tmp_path).read("digits").to_pylist(), key=lambda row: row["position"])
    assert len(rows) == 12
    for row in rows:
        number = order[row["position"]]
        sample = dataset.samples[number]
        assert (row["id"], row["label"]) == (sample.id, sample.label)
        logits = head.logits(teacher.encode_image(teacher.preprocess(picture(number)).unsqueeze(0)))
        moved = (logits + logits @ Plain().turn)[0].double()
        probabilities = moved.softmax(0)
        assert row["prediction"] == int(moved.argmax())
        assert row["teacher_prediction"] == int(logits.argmax())
        assert row["probability"] == pytest.approx(float(probabilities.max()), rel=1e-5)
        assert row["nll"] == pytest.approx(-math.log(float(probabilities[sample.label])), rel=1e-4)
        assert row["rank"] == sorted(moved.tolist(), reverse=True).index(float(moved[sample.label])) + 1
        assert (row["cosine"], row["steps"], row["extras"]) == (0.5, 2, [("entropy", 0.25)])
        assert row["step_predictions"] == [int(logits.flip(1).argmax()), int(logits.argmax()), int(moved.argmax())]
        assert row["seconds"] > 0
        assert row["shared_seconds"] > 0


def test_rank_of_equal_logits_agrees_with_the_prediction(tmp_path: Path) -> None:
    class Undecided(Plain):
        def predict(self, batch: Batch) -> Prediction:
            return Prediction(logits=torch.zeros(len(batch), 3))

    make_run(tmp_path, [Undecided()])
    rows = RunFolder(tmp_path).read("digits").to_pylist()
    assert {row["prediction"] for row in rows} == {0}
    assert all(row["rank"] == row["label"] + 1 for row in rows)


def test_methods_never_see_labels_or_ids(tmp_path: Path) -> None:
    dataset = make_dataset()
    seen: list[Any] = []

    class Curious(Plain):
        def predict(self, batch: Batch) -> Prediction:
            seen.append([repr(value) for value in vars(batch).values()] + [str(image.info) for image in batch.images])
            return super().predict(batch)

    make_run(tmp_path, [Curious()], dataset)
    assert seen
    for sample in dataset.samples:
        assert not any(sample.id in text for texts in seen for text in texts)


def test_run_json_follows_its_schema_and_says_what_was_run(tmp_path: Path) -> None:
    summary = make_run(tmp_path, [Plain(), Stream()], make_dataset(bad=[4]), command=("apm", "bench", "digits"))
    record = json.loads((tmp_path / "run.json").read_text())
    schema("benchmarks/run.schema.json").validate(record)
    assert record == summary.run
    assert record["config"]["teacher"] == FakeTeacher().identity
    assert record["config"]["methods"] == {
        "plain": {"stream": False, "turn": 3.0},
        "stream": {"stream": True, "weight": 5.0},
    }
    assert record["cells"]["digits"]["layout"] == "generated"
    assert record["counts"] == {"digits": {"images": 12, "rows": 24, "failed_images": 1}}
    (session,) = record["sessions"]
    assert session["command"] == ["apm", "bench", "digits"]
    assert session["versions"]["torch"] == torch.__version__.split("+")[0]
    assert session["seconds"] == record["wall_seconds"] > 0
    assert 2**24 < session["peak_memory"] < 2**40  # bytes: torch alone takes more than 16 MiB


def test_an_undecodable_image_is_a_row_with_its_error(tmp_path: Path) -> None:
    notes: list[str] = []
    summary = make_run(tmp_path, [Plain(), Stream()], make_dataset(bad=[3, 7]), notes=notes)
    failed = [row for row in RunFolder(tmp_path).read("digits").to_pylist() if row["error"]]
    assert sorted((row["id"], row["method"]) for row in failed) == [
        ("cat/003.png", "plain"),
        ("cat/003.png", "stream"),
        ("dog/007.png", "plain"),
        ("dog/007.png", "stream"),
    ]
    assert {row["error"] for row in failed} == {"the file is cut off"}
    assert all(row["prediction"] is None and row["nll"] is None for row in failed)
    assert summary.failed == 2
    assert "digits: cat/003.png: the file is cut off" in notes


def test_numbers_that_are_not_finite_are_an_error_of_that_image_and_method(tmp_path: Path) -> None:
    class Diverging(Plain):
        def predict(self, batch: Batch) -> Prediction:
            answer = super().predict(batch)
            answer.logits[0, 1] = torch.nan
            return answer

    make_run(tmp_path, [Diverging("diverging"), Plain()], batch_size=100)
    rows = RunFolder(tmp_path).read("digits").to_pylist()
    bad = {row["id"] for row in rows if row["error"] == NOT_FINITE}
    assert len(bad) == 2  # the first of the batch of one, and of the batch of the rest
    assert all(row["error"] is None for row in rows if row["method"] == "plain")
    assert all(row["prediction"] is None for row in rows if row["error"])


def test_a_second_run_does_nothing_and_changes_nothing(tmp_path: Path) -> None:
    make_run(tmp_path)
    shards = {path: path.read_bytes() for path in RunFolder(tmp_path).shards("digits")}
    method = Plain()
    notes: list[str] = []
    summary = make_run(tmp_path, [method], notes=notes)
    assert method.images == 0
    assert {path: path.read_bytes() for path in RunFolder(tmp_path).shards("digits")} == shards
    assert len(summary.run["sessions"]) == 2
    assert notes == [f"Continuing {tmp_path}: 12 images are done."]


@pytest.mark.parametrize("after", [1, 5, 9])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken"), ApmError("broken")])
def test_an_interrupted_run_keeps_what_it_answered_and_goes_on(
    tmp_path: Path, after: int, error: BaseException
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    make_run(whole)
    with pytest.raises(type(error)):
        make_run(parts, [Interrupting(after, error)])
    kept = len(answers(parts))
    assert after <= kept < 12
    assert json.loads((parts / "run.json").read_text())["counts"]["digits"]["images"] == kept
    second = Plain()
    make_run(parts, [second])
    assert second.images == 12 - kept
    assert_same(parts, whole)


@pytest.mark.parametrize("bad", [(), (2, 9)])
def test_a_stream_method_goes_on_as_if_never_stopped(tmp_path: Path, bad: tuple[int, ...]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    dataset = make_dataset(bad=bad)
    make_run(whole, [Plain(), Stream()], dataset)
    for after in (3, 4):  # stopped twice
        with pytest.raises(KeyboardInterrupt):
            make_run(parts, [Interrupting(after), Stream()], dataset)
    notes: list[str] = []
    make_run(parts, [Plain(), Stream()], dataset, notes=notes)
    assert any("Rebuilding the state of stream from the" in note for note in notes)
    assert_same(parts, whole)
    # The test can fail: without the images before, the answers are others.
    fresh = tmp_path / "fresh"
    half = make_dataset(bad=bad)
    make_run(fresh, [Stream()], half, seed=1)
    assert [row[4:6] for row in answers(fresh)] != [row[4:6] for row in answers(whole) if row[3] == "stream"]


@pytest.mark.parametrize(
    "spec", ["tda", "dmn:views=4", "boostadapter:views=4", "onzeta", "ecalp", "dpe:views=4", "dota:views=4", "oga"]
)
def test_published_streams_go_on_as_if_never_stopped(tmp_path: Path, spec: str) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    dataset = make_dataset(30)
    make_run(whole, [Plain(), create_method(spec)], dataset)
    with pytest.raises(KeyboardInterrupt):
        make_run(parts, [Interrupting(13), create_method(spec)], dataset)
    make_run(parts, [Plain(), create_method(spec)], dataset)
    assert_same(parts, whole)


def test_a_stream_starts_anew_in_each_cell(tmp_path: Path) -> None:
    first, second = make_dataset(), make_dataset(name="dtd")
    make_run(tmp_path / "both", [Stream()], [first, second])
    make_run(tmp_path / "one", [Stream()], second)
    assert_same(tmp_path / "both", tmp_path / "one", "dtd")


def test_the_stream_order_is_a_seeded_permutation_and_recorded(tmp_path: Path) -> None:
    assert stream_order(100, 3) == stream_order(100, 3) != stream_order(100, 4)
    assert sorted(stream_order(100, 3)) == list(range(100))
    summary = make_run(tmp_path, seed=3)
    assert summary.run["stream_order"] == {"generator": "numpy PCG64 permutation", "seed": 3}


KILLED = """
import sys
from pathlib import Path
from tests.benchmarks.made_runs import Plain, Stream, make_dataset, make_run
make_run(Path(sys.argv[1]), [Plain(seconds=0.02), Stream()], make_dataset(60), flush_seconds=0.03)
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_and_doubles_nothing(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    make_run(whole, [Plain(), Stream()], make_dataset(60))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    counts = []
    for shards in (1, 3, 6):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(killed)], env=environment, cwd=ROOT)
        try:
            while process.poll() is None and len(RunFolder(killed).shards("digits")) < shards:
                time.sleep(0.001)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        counts.append(len(answers(killed)))
    assert counts == sorted(counts)
    assert 0 < counts[0] < 120
    make_run(killed, [Plain(), Stream()], make_dataset(60))
    assert_same(killed, whole)
    assert not list(killed.rglob("*.part"))


def test_a_full_disk_stops_the_run_with_a_sentence_and_it_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace
    calls = []

    def filling(source: Any, target: Any) -> None:
        calls.append(target)
        if str(target).endswith(".parquet") and len([c for c in calls if str(c).endswith(".parquet")]) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", filling)
    with pytest.raises(ApmError, match="disk is full"):
        make_run(tmp_path / "parts", flush_seconds=0.0)
    monkeypatch.undo()
    kept = len(answers(tmp_path / "parts"))
    assert kept == 2
    make_run(tmp_path / "parts")
    make_run(tmp_path / "whole")
    assert_same(tmp_path / "parts", tmp_path / "whole")


def test_a_damaged_shard_can_be_removed_and_its_images_are_answered_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunFolder, "merge", lambda folder, cell: None)  # as a run that has not ended leaves them
    methods = [Plain(), Stream()]
    make_run(tmp_path / "whole", methods)
    make_run(tmp_path / "parts", methods, flush_seconds=0.0)
    shards = RunFolder(tmp_path / "parts").shards("digits")
    assert len(shards) >= 3
    shards[1].write_bytes(shards[1].read_bytes()[:-20])
    with pytest.raises(UsageError, match=r"is damaged.*Remove this file and run again"):
        make_run(tmp_path / "parts", methods)
    shards[1].unlink()
    make_run(tmp_path / "parts", methods)
    assert_same(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("remove", ["folder", "shards"])
def test_a_run_whose_folder_is_removed_says_so_and_can_be_run_again(tmp_path: Path, remove: str) -> None:
    class Removing(Plain):
        def predict(self, batch: Batch) -> Prediction:
            if 4 <= self.images < 8:
                shutil.rmtree(tmp_path / "run" / ("shards" if remove == "shards" else ""))
            return super().predict(batch)

    message = "was removed or moved" if remove == "folder" else r"rows of digits \(\d of 12\) were removed"
    with pytest.raises(ApmError, match=message):
        make_run(tmp_path / "run", [Removing()], flush_seconds=0.0)
    make_run(tmp_path / "run")
    make_run(tmp_path / "whole")
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_finished_run_leaves_only_its_records(tmp_path: Path) -> None:
    make_run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "run.json", "shards"]


def test_images_whose_folder_has_gone_are_no_errors_of_theirs(tmp_path: Path) -> None:
    place = tmp_path / "drive"
    place.mkdir()
    dataset = make_dataset(source=str(place))

    def answer_then_unplug(*arguments: Any) -> None:
        if place.is_dir():
            place.rmdir()

    with pytest.raises(ApmError, match="is no longer there"):
        run(
            tmp_path / "run",
            [lambda: dataset],
            [Plain()],
            FakeTeacher(),
            RunOptions(batch_size=2),
            on_progress=answer_then_unplug,
        )
    assert len(answers(tmp_path / "run")) == 1
    place.mkdir()
    make_run(tmp_path / "run", dataset=dataset, batch_size=2)
    assert [row[-1] for row in answers(tmp_path / "run")] == [None] * 12


def test_a_run_refuses_a_folder_in_use(tmp_path: Path) -> None:
    lock = RunFolder(tmp_path).lock()
    with pytest.raises(UsageError, match="Another run is writing"):
        make_run(tmp_path)
    lock.release()
    make_run(tmp_path)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 1}, "seed: 0 before, 1 now"),
        ({"limit": 5}, "limit: null before, 5 now"),
        ({"record_steps": True}, "record_steps: false before, true now"),
        ({"methods": [Plain(turn=4.0)]}, "methods.plain.turn: 3.0 before, 4.0 now"),
        ({"methods": [Plain(), Stream()]}, "methods.stream: null before"),
        ({"dataset": make_dataset(13)}, "the images, their order or their labels (fingerprint): "),
        ({"dataset": make_dataset(name="dtd")}, "cells only before: digits; cells only now: dtd"),
        (
            {"dataset": make_dataset(class_names=("cat", "dog", "eft"))},
            'class names: "newt" before, "eft" now (cells: digits)',
        ),
        ({"prompts": "mine", "templates": ("{}!",)}, 'prompts: "a photo of a {}." before, "{}!" now (cells: digits)'),
    ],
)
def test_another_configuration_is_refused_naming_the_field(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    make_run(tmp_path)
    before = answers(tmp_path)
    with pytest.raises(UsageError) as caught:
        make_run(tmp_path, **change)
    assert field in str(caught.value)
    assert "--fresh" in str(caught.value)
    assert answers(tmp_path) == before


def test_another_teacher_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path)
    with pytest.raises(UsageError, match=r"teacher: .* before"):
        run(tmp_path, [make_dataset], [Plain()], FakeTeacher(seed=1), RunOptions())


def test_batch_size_and_workers_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make_run(tmp_path / "parts", [Interrupting(3)])
    make_run(tmp_path / "parts", batch_size=1, workers=1)
    make_run(tmp_path / "whole", batch_size=7)
    assert_same(tmp_path / "parts", tmp_path / "whole")


def test_a_batch_of_large_images_is_smaller_and_the_answers_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counting(Plain):
        def predict(self, batch: Batch) -> Prediction:
            sizes.append(len(batch))
            return super().predict(batch)

    sizes: list[int] = []
    make_run(tmp_path / "whole", [Counting()], batch_size=5)
    assert max(sizes) == 5
    monkeypatch.setattr("apm.benchmarks.runs.decoding.BATCH_BYTES", 2 * 4 * 24 * 24)  # two pictures
    sizes = []
    make_run(tmp_path / "parts", [Counting()], batch_size=5)
    assert max(sizes) == 2 and sum(sizes) == 12
    assert_same(tmp_path / "parts", tmp_path / "whole")
    images: Iterator[Readable | Unreadable] = iter(
        [Readable(n, make_dataset().samples[n], picture(n)) for n in range(6)]
    )
    assert [len(next_batch(images, 5, whole=True)), len(next_batch(images, 5)), len(next_batch(images, 5))] == [5, 1, 0]


def test_fresh_starts_over(tmp_path: Path) -> None:
    make_run(tmp_path, seed=1)
    make_run(tmp_path, fresh=True)
    make_run(tmp_path / "other")
    assert_same(tmp_path, tmp_path / "other")
    assert len(json.loads((tmp_path / "run.json").read_text())["sessions"]) == 1


def test_rows_without_run_json_are_not_continued(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(UsageError, match=r"rows but no run\.json"):
        make_run(tmp_path)


def test_several_cells_go_into_one_folder(tmp_path: Path) -> None:
    clean = make_dataset()
    foggy = make_dataset(corruption="fog", level=5, generated=True)
    make_run(tmp_path, dataset=[clean, foggy])
    records = Records.open(tmp_path)
    assert list(records.cells) == ["digits", "digits/fog/5"]
    assert len(answers(tmp_path, "digits/fog/5")) == len(answers(tmp_path, "digits")) == 12


def test_cells_and_methods_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="digits is requested twice"):
        make_run(tmp_path, dataset=[make_dataset(), make_dataset(5)])
    with pytest.raises(UsageError, match="same name: plain, plain"):
        make_run(tmp_path, [Plain(), Plain(turn=1.0)])


def test_prompts_given_replace_those_of_the_data_set(tmp_path: Path) -> None:
    summary = make_run(tmp_path, prompts="mine", templates=("{}!", "{}?"))
    cell = summary.run["cells"]["digits"]
    assert cell["prompts"] == "mine"
    assert summary.run["prompt_sets"][cell["prompt_set"]] == ["{}!", "{}?"]


def test_rows_reach_the_disk_before_the_time_is_up(tmp_path: Path) -> None:
    shards: list[int] = []

    class Watching(Plain):
        def predict(self, batch: Batch) -> Prediction:
            shards.append(len(RunFolder(tmp_path).shards("digits")))
            return super().predict(batch)

    make_run(tmp_path, [Watching(seconds=0.02)], flush_seconds=0.05)
    # Two batches of 0.02 s and more would pass 0.05 s with a third: each shard holds two at most.
    assert shards[-1] >= len(shards) // 2 - 1
    assert len(shards) == 12  # a batch of two would take more than half of the flush time


def test_a_slow_method_gets_smaller_batches(tmp_path: Path) -> None:
    sizes: list[int] = []

    class Watching(Plain):
        def predict(self, batch: Batch) -> Prediction:
            sizes.append(len(batch))
            return super().predict(batch)

    make_run(tmp_path / "fast", [Watching()], flush_seconds=1000.0)
    assert sizes == [1, 4, 4, 3]
    sizes.clear()
    make_run(tmp_path / "slow", [Watching(seconds=0.02)], flush_seconds=0.1)
    assert max(sizes) <= 2


def test_progress_counts_this_process_and_estimates_the_rest(tmp_path: Path) -> None:
    seen: list[Any] = []
    datasets = [make_dataset(), make_dataset(8, name="dtd")]
    run(
        tmp_path,
        [lambda: datasets[0], lambda: datasets[1]],
        [Plain()],
        FakeTeacher(),
        RunOptions(batch_size=4, workers=1),
        on_progress=seen.append,
    )
    assert [(p.cell, p.cell_number, p.cells, p.done, p.total) for p in seen] == [
        ("digits", 1, 2, 1, 12),
        ("digits", 1, 2, 5, 12),
        ("digits", 1, 2, 9, 12),
        ("digits", 1, 2, 12, 12),
        ("dtd", 2, 2, 4, 8),
        ("dtd", 2, 2, 8, 8),
    ]
    right = sum(row[5] == 1 for row in answers(tmp_path))
    assert seen[3].accuracy == {"plain": right / 12}
    assert seen[0].remaining_seconds > 0
    assert seen[-1].remaining_seconds == 0


def test_images_are_decoded_a_bounded_number_ahead(tmp_path: Path) -> None:
    loaded: list[str] = []
    ahead: list[int] = []
    answered = [0]
    dataset = make_dataset(60)

    def counted(sample: Any) -> Any:
        load = sample.load

        def counting() -> Any:
            loaded.append(sample.id)
            return load()

        return type(sample)(sample.id, sample.label, counting)

    class Watching(Plain):
        def predict(self, batch: Batch) -> Prediction:
            answered[0] += len(batch)
            ahead.append(len(loaded) - answered[0])
            return super().predict(batch)

    make_run(tmp_path, [Watching(seconds=0.002)], make_dataset(60, samples=[counted(s) for s in dataset.samples]))
    assert len(loaded) == 60
    assert max(ahead) > 0  # decoding runs ahead …
    assert max(ahead) <= 4 + 2 + 1  # … by a batch and the workers


def test_the_shards_of_a_complete_run_are_merged_and_a_kill_in_between_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = [Plain(), Stream()]
    make_run(tmp_path / "whole", methods)
    assert len(RunFolder(tmp_path / "whole").shards("digits")) == 1
    unlink, removed = Path.unlink, []

    def dying(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".parquet":
            if len(removed) == 2:
                raise KeyboardInterrupt
            removed.append(path)
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dying)
        with pytest.raises(KeyboardInterrupt):
            make_run(tmp_path / "parts", methods, flush_seconds=0.0)
    assert len(RunFolder(tmp_path / "parts").shards("digits")) > 2  # the merged one, and old ones that are in it
    assert_same(tmp_path / "parts", tmp_path / "whole")
    make_run(tmp_path / "parts", methods)
    assert len(RunFolder(tmp_path / "parts").shards("digits")) == 1
    assert_same(tmp_path / "parts", tmp_path / "whole")
