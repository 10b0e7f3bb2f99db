"""Every training-free method on features of a store: how long a table's worth of them takes, and how much memory.

The store is synthetic and seeded: texts in groups of five likenesses, images near a text and near its likenesses, views
about their image. It is read by a real run, records and all, whose processes are started by torch's launcher.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from apm.images.files import write_atomically
from apm.processes import join
from apm.text.zeroshot import ZeroShotHead

from ..datasets import Dataset, Sample
from ..methods import Batch, Method, MethodOptions, create_method
from ..runs.file_state import FileState
from ..runs.records import Records
from ..runs.run_record import RunOptions
from ..runs.runner import run
from ..store.layout import CellFolder, StoreKey, write_store
from ..store.reader import FeatureStore, StoredCell
from ..store.shards import write_shard
from .children import many, must_run
from .kind import Kind
from .options import Options, Record
from .published_methods import SCALE, PublishedTDA, published_mta, published_zero
from .tables import Table, shown
from .timing import spread

METHODS = ("zero-shot", "mta", "zero", "tda", "onzeta", "dota", "dmn", "oga", "boostadapter")
"""All that train nothing and whose time for an image does not grow with the stream for ever; in an order in which
four processes, which take the stream methods in turn, leave the most costly one alone with its process."""
GROWING = "ecalp"
"""Its time for an image grows with the images before: timed on a few thousand."""
BATCH = 64
_BLOCK = 2048  # images that are made at a time


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the synthetic data."""

    images: int = 50_000
    views: int = 8
    dim: int = 512
    classes: int = 1000
    seed: int = 0


class SyntheticTeacher:
    """Knows its texts by their numbers, and sees nothing: what it would see is in the store."""

    notes: tuple[str, ...] = ()
    logit_scale = SCALE
    image_size = grid_size = 1
    mean = std = (0.0, 0.0, 0.0)
    default_labels: tuple[str, ...] | None = None
    default_templates: tuple[str, ...] | None = None
    device = torch.device("cpu")

    def __init__(self, sizes: Sizes) -> None:
        self.sizes, self.dim, self.name = sizes, sizes.dim, "synthetic"
        self.identity = f"synthetic@{hashlib.sha256(repr(sizes).encode()).hexdigest()[:16]}"
        rng = np.random.default_rng([sizes.seed, 1])
        groups = rng.standard_normal((-(-sizes.classes // 5), sizes.dim), dtype=np.float32).repeat(5, axis=0)
        own = rng.standard_normal((sizes.classes, sizes.dim), dtype=np.float32)
        self.texts = normalize(torch.from_numpy(groups[: sizes.classes] + 0.7 * own), dim=1)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """The vectors of ``class 0``, ``class 1`` …: (T, D)."""
        return self.texts[[int(text.rpartition(" ")[2]) for text in texts]]

    def preprocess(self, image: Image.Image) -> Tensor:
        raise AssertionError("a run from a store looked at an image")

    def encode_image(self, pixels: Tensor) -> Tensor:
        raise AssertionError("a run from a store encoded an image")

    def encode_grid(self, image: Image.Image, *, size: int | None = None) -> Tensor:
        raise AssertionError("a run from a store encoded an image")


def synthetic_dataset(sizes: Sizes) -> Dataset:
    """Images that are nothing but a number and a label."""
    labels = np.random.default_rng([sizes.seed, 2]).integers(0, sizes.classes, sizes.images)
    samples = [Sample(f"{number:08d}", int(label), _no_image) for number, label in enumerate(labels)]
    return Dataset(
        name="folder",
        samples=samples,
        class_names=tuple(f"class {number}" for number in range(sizes.classes)),
        templates=("{}",),
        prompts_name="synthetic",
        layout="synthetic",
        source="synthetic",
        split="test",
        fingerprint=hashlib.sha256(repr(sizes).encode()).hexdigest(),
        notes=(),
        total=sizes.images,
    )


def synthetic_store(path: Path, sizes: Sizes) -> None:
    """Write the store."""
    teacher, dataset = SyntheticTeacher(sizes), synthetic_dataset(sizes)
    key = StoreKey(teacher=teacher.identity, dim=sizes.dim, views=sizes.views, min_area=0.08, seed=sizes.seed)
    folder = CellFolder.of(path, dataset.cell)
    folder.write(dataset, FileState.of(dataset.samples))
    write_store(path, key, [])
    labels = torch.tensor([sample.label for sample in dataset.samples])
    for first in range(0, sizes.images, _BLOCK):
        rows = np.arange(first, min(first + _BLOCK, sizes.images))
        rng = np.random.default_rng([sizes.seed, 3, first])
        noise = torch.from_numpy(rng.standard_normal((len(rows), sizes.views + 1, sizes.dim), dtype=np.float32))
        noise /= sizes.dim**0.5
        images = 0.25 * teacher.texts[labels[rows]] + noise[:, 0]  # (B, D)
        views = (10 * (images.unsqueeze(1) + 0.5 * noise[:, 1:])).half()  # (B, V, D), of no particular length
        write_shard(folder.path, folder.digest(key), rows, views[:, 0], views[:, 1:], {})


def measure_features(options: Options) -> Record:
    """Record a run of all methods on a store, and each method alone beside the published loop where there is one.

    The run has as many processes of one thread as there are cores, four at most; methods and loops are timed one by
    one on 1,000 images, with one thread. With ``quick`` all sizes are tiny, and all is in this process.
    """
    sizes = Sizes(images=40, views=4, dim=16, classes=10) if options.quick else Sizes(images=options.limit)
    processes = 1 if options.quick else min(4, os.cpu_count() or 1)
    alone = min(10 if options.quick else 1000, sizes.images)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        synthetic_store(folder / "store", sizes)
        stored = sum(path.stat().st_size for path in (folder / "store").rglob("*") if path.is_file())
        write_atomically(folder / "sizes.json", json.dumps(asdict(sizes)).encode())
        seconds = _launch(folder, processes) if processes > 1 else _work(folder)
        shares = _shares(folder / "run")
        peaks = [json.loads(path.read_text())["peak"] for path in sorted(folder.glob("peak-*.json"))]
        rows = _alone(folder / "store", sizes, alone)
    for row in rows:
        row["seconds_in_run"] = shares.get(row["name"])
    summary = {
        "seconds": seconds,
        "peak_bytes": peaks,
        "peak": max(peaks),
        "store_bytes": stored,
        "sum_of_methods": sum(shares.values()),
    }
    settings = {**asdict(sizes), "processes": processes, "alone": alone}
    return options.found(rows, summary, model=f"{sizes.images:,} images", **settings)


def _work(folder: Path) -> float:
    """One process's part of the run; the seconds that all took together."""
    sizes = Sizes(**json.loads((folder / "sizes.json").read_text()))
    teacher, methods = SyntheticTeacher(sizes), [_method(name, sizes) for name in METHODS]
    with join() as group:
        begun = time.perf_counter()
        store = FeatureStore.open(folder / "store")
        store.suits(teacher, sizes.seed, methods)
        dataset = synthetic_dataset(sizes)
        options = RunOptions(seed=sizes.seed, batch_size=BATCH)
        run(folder / "run", [lambda: dataset], methods, teacher, options, features=store, group=group)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        write_atomically(folder / f"peak-{group.rank}.json", json.dumps({"peak": peak}).encode())
        group.barrier()
        return time.perf_counter() - begun


def _launch(folder: Path, processes: int) -> float:
    """The run under torch's launcher, its start included."""
    begun = time.perf_counter()
    must_run(many(processes, f"{__package__}.features", str(folder)), threads=1)
    return time.perf_counter() - begun


def _shares(run_folder: Path) -> dict[str, float]:
    """By method, its own mean seconds for an image in the run."""
    return {name: float(rows.seconds.mean()) for name, rows in Records.open(run_folder).rows("folder")}


def _alone(store: Path, sizes: Sizes, count: int) -> list[dict[str, Any]]:
    """Each method and each published loop on the first images, one thread, nothing else at work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        teacher, dataset = SyntheticTeacher(sizes), synthetic_dataset(sizes)
        head = ZeroShotHead.build(teacher, dataset.class_names, dataset.templates, cache=False)
        cell = FeatureStore.open(store).cell(dataset)
        rows = []
        for name in (*METHODS, GROWING):
            ours = _time_method(_method(name, sizes), teacher, head, cell, count)
            row: dict[str, Any] = {"name": name, "seconds": spread(ours.seconds), "last": ours.last}
            if loop := _loop(name, head.features):
                theirs = _time_loop(loop, cell, count)
                row["published_seconds"], row["published_last"] = spread(theirs.seconds), theirs.last
                row["same_answers"] = float((ours.answers == theirs.answers).double().mean())
            rows.append(row)
        return rows
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class _Timed:
    seconds: list[float]
    """For an image, batch by batch."""
    last: float
    """Mean of the second half: caches are fuller there."""
    answers: Tensor


def _timed(answer: Callable[[range], Tensor], count: int, size: int) -> _Timed:
    seconds, answers = [], []
    for first in range(0, count, size):
        part = range(first, min(first + size, count))
        begun = time.perf_counter()
        answers.append(answer(part).argmax(dim=1))
        seconds.append((time.perf_counter() - begun) / len(part))
    half = seconds[len(seconds) // 2 :]
    return _Timed(seconds, sum(half) / len(half), torch.cat(answers))


def _time_method(method: Method, teacher: SyntheticTeacher, head: ZeroShotHead, cell: StoredCell, count: int) -> _Timed:
    def answer(part: range) -> Tensor:
        ids, known = [str(number) for number in part], cell.views(part)
        batch = Batch(ids, lambda: [], teacher, head, stream_length=count, known=known)
        return method.predict(batch).logits

    return _timed(answer, count, min(BATCH, count))


def _time_loop(loop: Callable[[Tensor], Tensor], cell: StoredCell, count: int) -> _Timed:
    def answer(part: range) -> Tensor:
        return loop(normalize(cell.views(part).first(cell.key.views)[0], dim=1))

    with torch.inference_mode():
        return _timed(answer, count, 1)


def _loop(name: str, text: Tensor) -> Callable[[Tensor], Tensor] | None:
    """The published loop of a method, from an image's views (V, D) of unit length to its logits."""
    tda = PublishedTDA(text)
    loops: dict[str, Callable[[Tensor], Tensor]] = {
        "tda": lambda views: tda.answer(views[:1]),
        "mta": partial(published_mta, text=text),
        "zero": partial(published_zero, text=text),
    }
    return loops.get(name)


def _method(name: str, sizes: Sizes) -> Method:
    return create_method(name, MethodOptions(views=sizes.views, seed=sizes.seed))


def _no_image() -> Image.Image:
    raise AssertionError("a run from a store decoded an image")


FEATURES = Kind(
    name="features",
    question="all training-free methods on 50,000 images of a feature store, beside the published loops",
    title="Features from a store",
    shared={"limit": Sizes.images},
    measure=measure_features,
    table=shown(
        Table(
            {
                "an image by": "{name}",
                "in the run": "{seconds_in_run:m3} ms",
                "alone": "{seconds}",
                "alone, second half": "{last:m3} ms",
                "published loop": "{published_seconds}",
                "same answers": "{same_answers:.1%}",
            }
        ),
        "The run: {images} images × {views} views × {dim} numbers, {classes} classes, from a store of "
        "{store_bytes:M,.0f} MB in float16, all methods that have a number in the second column: {seconds:,.0f} s with "
        "{processes} processes of one thread, start, checks of the store and records included. Most memory of a "
        "process, pages of the store that the system may drop among it: {peak:M,.0f} MB. *Alone*: on the first "
        "{alone} images, one thread, as the published loops, which take the images one by one. ECALP's time for an "
        "image grows with the images before, so it is not in the run.",
    ),
    on_cpu=True,
)

if __name__ == "__main__":
    _work(Path(sys.argv[1]))
