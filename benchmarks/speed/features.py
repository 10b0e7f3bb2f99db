"""Every training-free method on features of a store: how long a table's worth of them takes, and how much memory.

The store is synthetic and seeded: texts in groups of five likenesses, images near a text and near its likenesses, views
about their image. It is read by a real run, records and all, whose processes are started by torch's launcher.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from apm.images.files import write_atomically
from apm.processes import join
from apm.text.zeroshot import ZeroShotHead

from ..datasets import Dataset, Sample
from ..methods import Batch, Method, MethodOptions, create_method
from ..runs.environment import peak_memory
from ..runs.file_state import FileState
from ..runs.records import Records
from ..runs.run_record import RunOptions
from ..runs.runner import run
from ..store.layout import CellFolder, StoreKey, write_store
from ..store.reader import FeatureStore
from ..store.shards import write_shard
from .children import many, must_run
from .kind import kind
from .options import Options, Record
from .published_methods import SCALE, PublishedTDA, published_mta, published_zero
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


def _nothing_to_see(*_: object, **__: object) -> Any:
    raise AssertionError("a run from a store looked at an image")


class SyntheticTeacher:
    """Knows its texts by their numbers, and sees nothing: what it would see is in the store."""

    notes: tuple[str, ...] = ()
    logit_scale = SCALE
    image_size = grid_size = 1
    mean = std = (0.0, 0.0, 0.0)
    default_labels: tuple[str, ...] | None = None
    default_templates: tuple[str, ...] | None = None
    device = torch.device("cpu")
    preprocess = encode_image = encode_grid = staticmethod(_nothing_to_see)

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


def synthetic_dataset(sizes: Sizes) -> Dataset:
    """Images that are nothing but a number and a label."""
    labels = np.random.default_rng([sizes.seed, 2]).integers(0, sizes.classes, sizes.images)
    return Dataset(
        name="folder",
        samples=[Sample(f"{number:08d}", int(label), _nothing_to_see) for number, label in enumerate(labels)],
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


@kind(
    """
    | an image by | in the run         | alone     | alone, second half | published loop      | same answers       |
    | {name}      | {seconds_in_run:s} | {seconds} | {last:s}           | {published_seconds} | {same_answers:.1%} |
    """,
    "The run: {images} images × {views} views × {dim} numbers, {classes} classes, from a store of "
    "{store_bytes:M,.0f} MB in float16, all methods that have a number in the second column: {seconds:,.0f} s with "
    "{processes} processes of one thread, start, checks of the store and records included. Most memory of a "
    "process, pages of the store that the system may drop among it: {peak:M,.0f} MB. *Alone*: on the first "
    "{alone} images, one thread, as the published loops, which take the images one by one. ECALP's time for an "
    "image grows with the images before, so it is not in the run.",
    title="Features from a store",
    shared={"limit": Sizes.images},
    on_cpu=True,
)
def features(options: Options) -> Record:
    """All training-free methods on 50,000 images of a feature store, beside the published loops.

    A run of all methods has as many processes of one thread as there are cores, four at most; each method alone, and
    the published loop where there is one, is timed on 1,000 images, with one thread.
    """
    sizes = Sizes(images=40, views=4, dim=16, classes=10) if options.quick else Sizes(images=options.limit)
    processes = min(4, os.cpu_count() or 1)
    alone = min(10 if options.quick else 1000, sizes.images)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        synthetic_store(folder / "store", sizes)
        stored = sum(path.stat().st_size for path in (folder / "store").rglob("*") if path.is_file())
        write_atomically(folder / "sizes.json", json.dumps(asdict(sizes)).encode())
        begun = time.perf_counter()
        must_run(many(processes, f"{__package__}.features", str(folder)), threads=1)
        seconds = time.perf_counter() - begun
        of_run = {name: float(rows.seconds.mean()) for name, rows in Records.open(folder / "run").rows("folder")}
        peaks = [int(path.read_text()) for path in sorted(folder.glob("peak-*"))]
        with _one_thread():
            rows = [
                {**row, "seconds_in_run": of_run.get(row["name"])} for row in _alone(folder / "store", sizes, alone)
            ]
    summary = {"seconds": seconds, "peak_bytes": peaks, "peak": max(peaks), "store_bytes": stored}
    settings = {**asdict(sizes), "processes": processes, "alone": alone}
    return options.found(rows, summary, model=f"{sizes.images:,} images", **settings)


def work(folder: Path) -> None:
    """One process's part of the run."""
    sizes = Sizes(**json.loads((folder / "sizes.json").read_text()))
    teacher, methods = SyntheticTeacher(sizes), [_method(name, sizes) for name in METHODS]
    with join() as group:
        store = FeatureStore.open(folder / "store")
        store.suits(teacher, sizes.seed, methods)
        dataset = synthetic_dataset(sizes)
        options = RunOptions(seed=sizes.seed, batch_size=BATCH)
        run(folder / "run", [lambda: dataset], methods, teacher, options, features=store, group=group)
        write_atomically(folder / f"peak-{group.rank}", str(peak_memory(torch.device("cpu"))).encode())
        group.barrier()


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _alone(store: Path, sizes: Sizes, count: int) -> Iterator[Record]:
    """Each method and each published loop on the first images, nothing else at work."""
    teacher, dataset = SyntheticTeacher(sizes), synthetic_dataset(sizes)
    head = ZeroShotHead.build(teacher, dataset.class_names, dataset.templates, cache=False)
    cell, tda = FeatureStore.open(store).cell(dataset), PublishedTDA(head.features)
    loops: dict[str, Callable[[Tensor], Tensor]] = {  # an image's views (V, D) of unit length → its logits
        "tda": lambda views: tda.answer(views[:1]),
        "mta": partial(published_mta, text=head.features),
        "zero": partial(published_zero, text=head.features),
    }

    def answer(method: Method, part: range) -> Tensor:
        ids, known = [str(number) for number in part], cell.views(part)
        return method.predict(Batch(ids, lambda: [], teacher, head, stream_length=count, known=known)).logits

    @torch.inference_mode()
    def answer_published(loop: Callable[[Tensor], Tensor], part: range) -> Tensor:
        return loop(normalize(cell.views(part).first(sizes.views)[0], dim=1))

    for name in (*METHODS, GROWING):
        row: Record = {"name": name}
        row["seconds"], row["last"], answers = _timed(partial(answer, _method(name, sizes)), count, min(BATCH, count))
        if loop := loops.get(name):
            row["published_seconds"], _, theirs = _timed(partial(answer_published, loop), count, 1)
            row["same_answers"] = float((answers == theirs).double().mean())
        yield row


def _timed(answer: Callable[[range], Tensor], count: int, size: int) -> tuple[Record, float, Tensor]:
    """Seconds of an image, batch by batch; their mean in the second half, where caches are fuller; the answers."""
    seconds, answers = [], []
    for first in range(0, count, size):
        part = range(first, min(first + size, count))
        begun = time.perf_counter()
        answers.append(answer(part).argmax(dim=1))
        seconds.append((time.perf_counter() - begun) / len(part))
    return spread(seconds), float(np.mean(seconds[len(seconds) // 2 :])), torch.cat(answers)


def _method(name: str, sizes: Sizes) -> Method:
    return create_method(name, MethodOptions(views=sizes.views, seed=sizes.seed))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
