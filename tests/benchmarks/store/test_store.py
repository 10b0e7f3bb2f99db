"""The feature store: the same answers with and without it, and nothing taken from it that is not what was asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from apm.benchmarks.datasets import Dataset, Sample, open_dataset
from apm.benchmarks.methods import create_method
from apm.benchmarks.methods.base import Batch, Method, MethodOptions, Prediction, view_key
from apm.benchmarks.runs.file_state import FileState
from apm.benchmarks.runs.records import RunFolder
from apm.benchmarks.runs.run_record import RunOptions
from apm.benchmarks.runs.runner import Summary, run
from apm.benchmarks.store import encode as encoding
from apm.benchmarks.store import layout
from apm.benchmarks.store import shards as shard_files
from apm.benchmarks.store.encode import Encoded, encode
from apm.benchmarks.store.filling import EncodeOptions
from apm.benchmarks.store.layout import CellFolder
from apm.benchmarks.store.reader import FeatureStore
from apm.errors import ApmError, ImageError, UsageError
from apm.test_time.views import view_tokens
from tests.benchmarks.made_runs import Plain, make_dataset, picture
from tests.fakes import FakeTeacher

VIEWS = 6
FEATURE_METHODS = (
    *("zero-shot", "mta", "zero", "tps", "tda", "dmn", "boostadapter", "onzeta:proxy_rate=0.02", "ecalp", "dpe"),
    *("dota", "oga"),
)
COMMAND = ("apm", "encode", "digits", "--out", "store")


def fill(path: Path, dataset: Dataset, teacher: FakeTeacher | None = None, **options: Any) -> Encoded:
    """Encode one data set; `notes` takes what is said."""
    notes: list[str] = options.pop("notes", [])
    chosen = EncodeOptions(**{"views": VIEWS, "command": COMMAND, **options})
    told = {"on_note": notes.append, "on_failure": notes.append}
    return encode(path, [lambda: dataset], teacher or FakeTeacher(), chosen, **told)


def answer(
    path: Path, methods: Sequence[Method], dataset: Dataset, store: Path | None = None, **told: Any
) -> tuple[Summary, FakeTeacher]:
    """Run methods; with a store, its features are read."""
    teacher = FakeTeacher()
    features = FeatureStore.open(store) if store else None
    if features:
        features.suits(teacher, 0, methods)
    options = RunOptions(batch_size=1, record_logits=True)
    return run(path, [lambda: dataset], methods, teacher, options, features=features, **told), teacher


def rows_of(path: Path, method: str) -> list[dict[str, Any]]:
    rows = [row for row in RunFolder(path).read("digits").to_pylist() if row["method"] == method]
    return sorted(rows, key=lambda row: row["position"])


def feature_methods() -> list[Method]:
    return [create_method(name, MethodOptions(views=VIEWS)) for name in FEATURE_METHODS]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of all feature-level methods: `none` computes, `fp32` and `fp16` read stores of the same names."""
    folder = tmp_path_factory.mktemp("stores")
    dataset = make_dataset(24)
    answer(folder / "run-none", feature_methods(), dataset)
    for precision in ("fp32", "fp16"):
        fill(folder / precision, dataset, precision=precision)
        _, teacher = answer(folder / f"run-{precision}", feature_methods(), blind(dataset), folder / precision)
        assert teacher.image_calls == 0
    return folder


def refuse() -> Image.Image:
    raise AssertionError("an image was decoded")


def blind(dataset: Dataset, load: Callable[[], Image.Image] = refuse) -> Dataset:
    """The same data set, whose images cannot be looked at."""
    return replace(dataset, samples=[Sample(one.id, one.label, load, one.path) for one in dataset.samples])


@pytest.mark.parametrize("method", [create_method(name).name for name in FEATURE_METHODS])
def test_answers_from_a_store_are_those_without_it(stores: Path, method: str) -> None:
    computed, exact, rounded = (rows_of(stores / f"run-{which}", method) for which in ("none", "fp32", "fp16"))
    assert len(computed) == 24
    for one, same in zip(computed, exact, strict=True):
        assert one["logits"] == same["logits"]
    # float16 turns a feature by 2^-11 of its length at most, and the fake teacher's logit is 20 times a cosine. For
    # single images MTA's iterations and DPE's AdamW magnify that; ECALP multiplies likenesses' tenth powers by 10,000.
    most, magnified = 20 * 2**-10, {"mta": 0.3, "dpe": 0.1, "ecalp": 1.0}
    moved = np.abs(np.array([a["logits"] for a in computed]) - np.array([b["logits"] for b in rounded])).max(axis=1)
    flips = [
        (one["position"], one["probability"])
        for one, other in zip(computed, rounded, strict=True)
        if one["prediction"] != other["prediction"]
    ]
    assert 0 < moved.max() <= magnified.get(method, most)
    assert np.median(moved) <= (most if method != "ecalp" else 0.1)
    assert not flips, f"{len(flips)} of {len(moved)} answers are others: {flips}"


def test_a_store_holds_what_the_teacher_says_of_each_view(tmp_path: Path) -> None:
    dataset, teacher = make_dataset(5), FakeTeacher()
    fill(tmp_path / "store", dataset, precision="fp32")
    cell = FeatureStore.open(tmp_path / "store").cell(dataset)
    found = cell.views([3, 0]).first(VIEWS)
    for row, number in zip(found, (3, 0), strict=True):
        name = view_key(dataset.samples[number].id)
        torch.testing.assert_close(row, view_tokens(picture(number), VIEWS, teacher, seed=0, sample_id=name))
    assert cell.views([3, 0]).first(2).equal(found[:, :2])


def test_a_batch_computes_what_a_store_does_not_have(tmp_path: Path) -> None:
    dataset, teacher = make_dataset(3), FakeTeacher()
    fill(tmp_path / "store", dataset, precision="fp32")
    head: Any = None
    ids, images = [one.id for one in dataset.samples], [picture(number) for number in range(3)]
    plain = Batch(ids, images, teacher, head)
    known = FeatureStore.open(tmp_path / "store").cell(dataset).views(range(3))
    stored = Batch(ids, lambda: images, teacher, head, known=known)
    assert stored.views(VIEWS).equal(plain.views(VIEWS)) and not stored.looked_at
    assert stored.views(VIEWS + 3).equal(plain.views(VIEWS + 3)) and stored.looked_at
    assert stored.views(VIEWS, min_area=0.5).equal(plain.views(VIEWS, min_area=0.5))
    assert stored.tokens().equal(plain.tokens())


class Looking(Plain):
    """Looks at the pixels."""

    def predict(self, batch: Batch) -> Prediction:
        assert all(image.size == (24, 24) for image in batch.images)
        return super().predict(batch)


def test_methods_that_look_at_images_get_them_and_are_named(tmp_path: Path) -> None:
    dataset, notes = make_dataset(12), []
    fill(tmp_path / "store", dataset)
    methods = [Plain(), Looking("looking")]
    _, teacher = answer(tmp_path / "run", methods, dataset, tmp_path / "store", on_note=notes.append)
    assert notes == ["looking needs the images themselves: they are decoded too."]
    assert teacher.image_calls == 0
    assert len(rows_of(tmp_path / "run", "looking")) == 12
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    session = record["sessions"][0]["features"]
    assert (session["precision"], session["views"]) == ("fp16", VIEWS)
    assert {row["shared_seconds"] for row in rows_of(tmp_path / "run", "plain")} == {None}


def test_an_image_that_has_gone_is_named_by_whoever_looks_at_it(tmp_path: Path) -> None:
    dataset = make_dataset(4)
    fill(tmp_path / "store", dataset)

    def gone() -> Image.Image:
        raise ImageError("no such file")

    with pytest.raises(
        ApmError, match=r"png cannot be read, though its features are known: no such file\. Some methods"
    ):
        answer(tmp_path / "run", [Looking()], blind(dataset, gone), tmp_path / "store")


def test_what_adapts_sees_no_label_and_no_id(tmp_path: Path) -> None:
    dataset, seen = make_dataset(6), []

    class Curious(Plain):
        def predict(self, batch: Batch) -> Prediction:
            seen.append(repr(vars(batch)))
            return super().predict(batch)

    fill(tmp_path / "store", dataset)
    answer(tmp_path / "run", [Curious()], dataset, tmp_path / "store")
    assert len(seen) == 6
    assert not [one.id for one in dataset.samples if any(one.id in text for text in seen)]
    for shard in (tmp_path / "store" / "digits").glob("*.safetensors"):
        content = shard.read_bytes()
        assert b"label" not in content and dataset.samples[0].id.encode() not in content


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"teacher": FakeTeacher(seed=1)}, 'teacher: "fake@'),
        ({"seed": 3}, "seed: 0 in the store, 3 asked for"),
        (
            {"methods": ["mta:views=9"]},
            rf"mta\[views=9\] needs 9 views of each image, but .* holds {VIEWS}: run with",
        ),
        (
            {"methods": ["zero:views=4,min_area=0.5"]},
            "smallest share of the image in a crop: 0.08 in the store, 0.5 as",
        ),
    ],
)
def test_a_store_of_something_else_is_refused_by_name(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    fill(tmp_path / "store", make_dataset(4))
    methods = [create_method(name) for name in change.get("methods", ["zero-shot"])]
    with pytest.raises(UsageError, match=words):
        FeatureStore.open(tmp_path / "store").suits(
            change.get("teacher", FakeTeacher()), change.get("seed", 0), methods
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"views": 9}, f"views of an image: {VIEWS} in the store, 9 asked for"),
        ({"seed": 3}, "seed: 0 in the store, 3 asked for"),
        ({"precision": "fp32"}, 'precision: "fp16" in the store, "fp32" asked for'),
        ({"min_area": 0.5}, "0.08 in the store, 0.5 asked for"),
    ],
)
def test_encoding_something_else_into_a_store_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    fill(tmp_path / "store", make_dataset(4))
    with pytest.raises(UsageError, match=words):
        fill(tmp_path / "store", make_dataset(4), **change)
    more = make_dataset(5)
    relabelled = [replace(one, label=1 - one.label) for one in more.samples[:2]] + list(more.samples[2:])
    for samples in (more.samples[1:], relabelled):  # neither holds all of the other; other labels
        with pytest.raises(UsageError, match=r"holds digits of other images\. images, their order or labels"):
            fill(tmp_path / "store", replace(more, samples=samples))


def test_a_store_grows_with_the_limit_and_keeps_what_it_has(tmp_path: Path, animals: Path) -> None:
    store, part, whole = tmp_path / "store", open_dataset("folder", animals, limit=3), open_dataset("folder", animals)
    assert [one.id for one in part.samples] != [one.id for one in whole.samples[:3]]  # the order is another
    fill(store, part, batch_size=1)
    before = FeatureStore.open(store).cell(part).views(range(3)).first(VIEWS)
    notes: list[str] = []
    teacher = FakeTeacher()
    done = fill(store, whole, teacher, notes=notes)
    assert (done.images, done.computed, teacher.image_calls) == (8, 5, 5 * VIEWS)
    assert "3 are there, 5 are to be encoded" in notes[0]
    fill(tmp_path / "anew", whole)
    for dataset in (part, whole):
        check(store, dataset)
        grown, anew = (FeatureStore.open(path).cell(dataset) for path in (store, tmp_path / "anew"))
        numbers = range(len(dataset.samples))
        assert grown.views(numbers).first(VIEWS).equal(anew.views(numbers).first(VIEWS))
    assert FeatureStore.open(store).cell(part).views(range(3)).first(VIEWS).equal(before)
    again = FakeTeacher()
    assert fill(store, part, again).computed == fill(store, whole, again).computed == again.image_calls == 0
    picture(99).save(animals / part.samples[0].id)
    with pytest.raises(UsageError, match=f"images of folder have changed since .* {part.samples[0].id}"):
        fill(store, open_dataset("folder", animals))


@pytest.mark.parametrize("written", [1, 2, 3])
def test_a_store_that_was_killed_while_it_grew_grows_again(
    tmp_path: Path, animals: Path, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, part, whole = tmp_path / "store", open_dataset("folder", animals, limit=3), open_dataset("folder", animals)
    fill(store, part)
    real, left = layout.write_atomically, [written]

    def dying(path: Path, data: bytes) -> Path:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(path, data)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(layout, "write_atomically", dying)  # of the labels, the images, the cell; then the store's own
        fill(store, whole)
    check(store, part)
    teacher = FakeTeacher()
    fill(store, whole, teacher)
    assert teacher.image_calls == 5 * VIEWS
    check(store, whole)


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    """A folder of two classes with four pictures each."""
    for number in range(8):
        path = tmp_path / "animals" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    return tmp_path / "animals"


def check(store: Path, dataset: Dataset) -> None:
    FeatureStore.open(store).check(dataset, FileState.of(dataset.samples))


def test_changed_files_are_refused_and_deleted_ones_are_not(tmp_path: Path, animals: Path) -> None:
    dataset = open_dataset("folder", animals)
    fill(tmp_path / "store", dataset)
    check(tmp_path / "store", dataset)
    (animals / "cat" / "2.png").unlink()
    check(tmp_path / "store", dataset)
    picture(99).save(animals / "cat" / "2.png")
    with pytest.raises(UsageError, match=r"1 of 8 have changed since they were encoded: cat/2.png \("):
        check(tmp_path / "store", dataset)
    with pytest.raises(UsageError, match=r"1 of the 8 images of folder have changed since .* cat/2.png"):
        fill(tmp_path / "store", dataset)


def test_a_part_of_what_was_encoded_is_found_by_its_ids(tmp_path: Path, animals: Path) -> None:
    whole, part = open_dataset("folder", animals), open_dataset("folder", animals, limit=3)
    fill(tmp_path / "store", whole)
    check(tmp_path / "store", part)
    store = FeatureStore.open(tmp_path / "store")
    for number, sample in enumerate(part.samples):
        there = [one.id for one in whole.samples].index(sample.id)
        assert store.cell(part).views([number]).first(VIEWS).equal(store.cell(whole).views([there]).first(VIEWS))
    other = replace(part, samples=[replace(one, label=1 - one.label) for one in part.samples], fingerprint="x")
    with pytest.raises(UsageError, match="3 labels differ: "):
        check(tmp_path / "store", other)
    picture(50).save(animals / "dog" / "new.png")
    with pytest.raises(UsageError, match=r"1 of 9 are not among the 8 of the store: dog/new\.png"):
        check(tmp_path / "store", open_dataset("folder", animals))


def test_a_cell_that_is_not_there_is_refused(tmp_path: Path, animals: Path) -> None:
    fill(tmp_path / "store", make_dataset(3))
    with pytest.raises(UsageError, match=r"has no features of folder; it has digits\. Encode it with apm encode"):
        check(tmp_path / "store", open_dataset("folder", animals))
    with pytest.raises(UsageError, match="No store at"):
        FeatureStore.open(tmp_path / "nowhere")


def spoil(shard: Path, how: str) -> None:
    content = shard.read_bytes()
    if how == "cut":
        shard.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        shard.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif how == "emptied":
        shard.write_bytes(b"")
    else:
        shard.unlink()


@pytest.mark.parametrize("how", ["cut", "flipped", "emptied", "removed"])
def test_a_damaged_store_is_refused_with_its_remedy_and_mended(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_files, "BLOCK_BYTES", 4 * VIEWS * 16 * 2)  # four images in a merged shard
    dataset, path, notes = make_dataset(12), tmp_path / "store", []
    fill(path, dataset, batch_size=1, flush_seconds=0.0)
    shards = sorted((path / "digits").glob("*.safetensors"))
    whole = FeatureStore.open(path).cell(dataset).views(range(12)).first(VIEWS)
    assert len(shards) == 3
    spoil(shards[1], how)
    with pytest.raises(UsageError, match="lacks the features of 4 of the 12 images of digits") as refused:
        answer(tmp_path / "run", [Plain()], dataset, path)
    assert str(refused.value).endswith("To encode what is missing: apm encode digits --out store")
    assert (str(shards[1]) in str(refused.value)) == (how != "removed")
    assert not (tmp_path / "run" / "run.json").exists()
    teacher = FakeTeacher()
    fill(path, dataset, teacher, notes=notes)
    assert teacher.image_calls == 4 * VIEWS
    assert ("are encoded again" in " ".join(notes)) == (how != "removed")
    assert FeatureStore.open(path).cell(dataset).views(range(12)).first(VIEWS).equal(whole)
    check(path, dataset)


def test_a_shard_of_another_store_is_no_shard(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("other", 1)):
        fill(tmp_path / name, make_dataset(4), seed=seed)
    (mine,), (theirs,) = (list((tmp_path / name / "digits").glob("*.safetensors")) for name in ("one", "other"))
    shutil.copyfile(theirs, mine)
    with pytest.raises(UsageError, match="it is of other images, another teacher or other views"):
        check(tmp_path / "one", make_dataset(4))


class Interrupting(FakeTeacher):
    """Ctrl-C after so many views."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def encode_image(self, pixels: Tensor) -> Tensor:
        if self.image_calls >= self.after:
            raise KeyboardInterrupt
        return super().encode_image(pixels)


def test_an_interrupted_encoding_goes_on_where_it_was(tmp_path: Path) -> None:
    dataset, teacher = make_dataset(12), FakeTeacher()
    fill(tmp_path / "whole", dataset)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "store", dataset, Interrupting(5 * VIEWS), batch_size=2)
    with pytest.raises(UsageError, match="lacks the features of 7 of the 12"):
        FeatureStore.open(tmp_path / "store").cell(dataset)
    fill(tmp_path / "store", dataset, teacher)
    assert teacher.image_calls == 7 * VIEWS
    one, other = (FeatureStore.open(tmp_path / name).cell(dataset) for name in ("whole", "store"))
    assert one.views(range(12)).first(VIEWS).equal(other.views(range(12)).first(VIEWS))
    assert len(list((tmp_path / "store" / "digits").glob("*.safetensors"))) == 1
    again = FakeTeacher()
    assert fill(tmp_path / "store", dataset, again).computed == again.image_calls == 0


def test_a_death_while_shards_are_merged_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, path = make_dataset(9), tmp_path / "store"
    monkeypatch.setattr(shard_files, "BLOCK_BYTES", 4 * VIEWS * 16 * 2)
    real, calls = shard_files.write_shard, []

    def dying(folder: Path, cell: str, rows: Any, *others: Any) -> Path:
        calls.append(len(rows))
        if len(calls) == 9 + 2:  # nine shards of one image, one merged shard, then the end
            raise KeyboardInterrupt
        return real(folder, cell, rows, *others)

    monkeypatch.setattr(shard_files, "write_shard", dying)
    monkeypatch.setattr("apm.benchmarks.store.filling.write_shard", dying)
    with pytest.raises(KeyboardInterrupt):
        fill(path, dataset, batch_size=1, flush_seconds=0.0)
    assert calls == [1] * 9 + [4, 4]
    check(path, dataset)
    teacher = FakeTeacher()
    fill(path, dataset, teacher)
    assert teacher.image_calls == 0
    assert len(list((path / "digits").glob("*.safetensors"))) == 3
    check(path, dataset)


def test_images_that_cannot_be_decoded_are_told_by_every_run(tmp_path: Path) -> None:
    dataset, notes, told = make_dataset(6, bad=[2]), [], []
    assert fill(tmp_path / "store", dataset, notes=notes).failed == 1
    assert "digits: newt/002.png: the file is cut off" in notes
    answer(tmp_path / "run", [Plain()], blind(dataset), tmp_path / "store", on_failure=told.append)
    assert told == ["digits: newt/002.png: the file is cut off"]
    assert [row["error"] for row in rows_of(tmp_path / "run", "plain") if row["error"]] == ["the file is cut off"]
    assert fill(tmp_path / "store", dataset).failed == 1


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    notes: list[str] = []
    monkeypatch.setattr(encoding.shutil, "disk_usage", lambda place: usage._replace(free=5000))
    teacher = FakeTeacher()
    with pytest.raises(UsageError, match=r"cannot hold it: 23 kB are needed and 5 kB are free"):
        fill(tmp_path / "store", make_dataset(30), teacher, notes=notes)
    assert notes[0].startswith(f"{tmp_path / 'store'}: 30 images × {VIEWS} views × 16 numbers in fp16, 5.8 kB in all")
    assert teacher.image_calls == 0
    assert [path.name for path in (tmp_path / "store").iterdir()] == [".lock"]


class Loud(FakeTeacher):
    """Its numbers do not fit float16."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        return super().encode_image(pixels) * 1e6


def test_numbers_beyond_float16_are_refused_and_kept_in_float32(tmp_path: Path) -> None:
    with pytest.raises(ApmError, match=r"000.png: the teacher's values exceed float16.*--precision fp32"):
        fill(tmp_path / "store", make_dataset(2), Loud())
    fill(tmp_path / "wide", make_dataset(2), Loud(), precision="fp32")


class Broken(FakeTeacher):
    """Says nothing of what it sees."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        return super().encode_image(pixels) * torch.nan


def test_features_that_are_not_finite_are_no_answers(tmp_path: Path) -> None:
    fill(tmp_path / "store", make_dataset(3), Broken())
    answer(tmp_path / "run", [create_method("zero-shot")], make_dataset(3), tmp_path / "store")
    assert {row["error"] for row in rows_of(tmp_path / "run", "zero-shot")} == {"the numbers are not finite"}


@pytest.mark.parametrize(
    ("options", "words"),
    [({"views": 0}, "0 views"), ({"min_area": 0.0}, "min_area is 0.0"), ({"precision": "bf16"}, "fp16 or fp32")],
)
def test_what_no_store_can_be(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        fill(tmp_path / "store", make_dataset(2), **options)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 99}', '{"format": 1, "key": {"teacher": "x"}}'])
def test_a_damaged_record_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "store.json").write_text(content)
    with pytest.raises(UsageError, match=r"store\.json|format 99"):
        FeatureStore.open(tmp_path)


@pytest.mark.parametrize("name", ["images.parquet", "labels.parquet", "cell.json"])
def test_damaged_tables_are_told(tmp_path: Path, name: str) -> None:
    fill(tmp_path, make_dataset(3))
    file = CellFolder.of(tmp_path, "digits").path / name
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UsageError, match=rf"{name} .* and encode again"):
        check(tmp_path, make_dataset(3))
