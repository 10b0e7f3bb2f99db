"""Run methods over data sets, image by image, into a run folder that can be continued after anything.

The runner alone holds labels: a method is given a `Batch` of images and returns logits; what is right is decided here.

Order. The images of a cell are gone through in one seeded order, the stream order, which is the same for all methods.
Episodic methods do not care. A stream method (its answers depend on the images before) sees it from the first image
to the last: when a run is continued, the state of the method is rebuilt by showing it again, without recording, the
images it had already answered.

Processes. Under ``torchrun`` process r of w answers positions r, r + w, r + 2w, … for episodic methods; stream
methods cannot be divided and are answered by the first process alone, after its part. The rows are those of one
process.

Time. Rows are written to the disk before 30 seconds of work have come together; batches are made smaller where one
would take longer.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from apm.errors import ApmError, UsageError
from apm.teachers.base import Teacher
from apm.zeroshot import ZeroShotHead

from .clock import ClockedBatch
from .corruptions import VERSION
from .distributed import ALONE, Group
from .environment import describe
from .methods.base import Method, Prediction, StreamMethod
from .records import SCHEMA_VERSION, Row, RunFolder, describe_differences, differences

if TYPE_CHECKING:
    from .datasets import Dataset, Sample

FLUSH_SECONDS = 30.0
NOT_FINITE = "the numbers are not finite"
_LOCK_PATIENCE = 10.0  # a restarted process waits for its predecessor's lock to be given back

logger = logging.getLogger("apm")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What a run is besides its cells, methods and teacher.

    Fields up to `record_steps` are part of its configuration.
    """

    seed: int = 0
    limit: int | None = None
    prompts: str | None = None
    """Name of the prompt set that replaces the data sets' own; None for their own."""
    templates: tuple[str, ...] | None = None
    """Its templates; given together with `prompts`."""
    record_steps: bool = False
    batch_size: int = 8
    workers: int = 4
    """Threads that read and decode images while the teacher and the students compute."""
    flush_seconds: float = FLUSH_SECONDS
    fresh: bool = False
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class Progress:
    """How far this process is."""

    cell: str
    cell_number: int
    cells: int
    done: int
    """Images of this cell that this process has answered, earlier runs included."""
    total: int
    """Images of this cell that are this process's part."""
    accuracy: Mapping[str, float]
    """Running accuracy in [0, 1] of each method on the images of this session."""
    images_per_second: float
    remaining_seconds: float
    """Estimate for the rest of the whole run."""


@dataclass
class Summary:
    """What a run came to."""

    path: Path
    run: dict[str, Any]
    """What stands in run.json."""

    @property
    def failed(self) -> int:
        """Images without an answer by some method, in the whole run folder."""
        return sum(count["failed_images"] for count in self.run["counts"].values())


def run(
    path: Path,
    cells: Sequence[Callable[[], Dataset]],
    methods: Sequence[Method],
    teacher: Teacher,
    options: RunOptions,
    *,
    group: Group = ALONE,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_note: Callable[[str], None] = logger.info,
    on_failure: Callable[[str], None] = logger.warning,
) -> Summary:
    """Run or continue `methods` on `cells` in the run folder `path`.

    Args:
        path: the run folder; made where it does not exist.
        cells: opens the data set of a cell. Called at the start, and again when the cell's turn comes, so that many
            cells do not lie in memory together.
        methods: the methods; names must differ.
        teacher: the frozen teacher that all of them share.
        options: seed, limits, sizes.
        group: this process's place among those of the run.
        on_progress: called after every batch.
        on_note: called with a sentence for people: what is continued.
        on_failure: called with a sentence for each image without an answer.

    Raises:
        UsageError: the folder is in use, or holds a run of another configuration (the differing fields are named).
        ApmError: the disk cannot be written; nothing that was written is damaged.
        KeyboardInterrupt: after everything answered so far has been written.
    """
    names = [method.name for method in methods]
    if len(set(names)) != len(names):
        raise UsageError(f"Two methods of one run have the same name: {', '.join(names)}.")
    folder = RunFolder(path)
    started = time.monotonic()
    headers, sets = _describe_cells(cells, options)
    config = {
        "teacher": teacher.identity,
        "methods": {method.name: {"stream": method.stream, **method.settings} for method in methods},
        "cells": {key: header["identity"] for key, header in headers.items()},
        "seed": options.seed,
        "limit": options.limit,
        "prompts": options.prompts,
        "record_steps": options.record_steps,
    }
    lock, record, refusal = None, None, None
    if group.first:
        try:
            lock = folder.lock(_LOCK_PATIENCE if group.world > 1 else 0.0)
            record = _prepare(folder, config, headers, sets, teacher, options, group)
        except ApmError as error:
            refusal = error
    try:
        refusal, record = group.broadcast((refusal, record))
        if refusal is not None:
            raise refusal
        assert record is not None
        _same_data(record["config"], config, group)
        work = _Work(folder, methods, teacher, options, group, record, started, on_progress, on_note, on_failure)
        try:
            work.plan(headers)
            for number, (key, open_cell) in enumerate(zip(headers, cells, strict=True)):
                work.run_cell(number, key, open_cell)
            group.barrier()
        finally:
            if group.first:
                record["counts"] = _counts(folder, headers)
                work.write_record()
        return Summary(path, record)
    finally:
        if lock is not None:
            lock.release()


def stream_order(n: int, seed: int) -> list[int]:
    """The order in which the n images of a cell are gone through: a permutation drawn from PCG64(seed)."""
    return np.random.Generator(np.random.PCG64(seed)).permutation(n).tolist()


def _prompted(dataset: Dataset, options: RunOptions) -> Dataset:
    if options.templates is None:
        return dataset
    return replace(dataset, templates=options.templates, prompts_name=options.prompts or "custom")


def _title(dataset: Dataset) -> str:
    """What tables call it: for a folder of the user's its own name, with the folder above where that says more."""
    return dataset.name if dataset.name != "folder" else "/".join(Path(dataset.source).resolve().parts[-2:])


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _describe_cells(
    cells: Sequence[Callable[[], Dataset]], options: RunOptions
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, list[str]]]]:
    """Open every cell once: what run.json says of it, by key; and the label and prompt sets, once each, by digest."""
    headers: dict[str, dict[str, Any]] = {}
    sets: dict[str, dict[str, list[str]]] = {"label_sets": {}, "prompt_sets": {}}
    for open_cell in cells:
        dataset = _prompted(open_cell(), options)
        if dataset.cell in headers:
            raise UsageError(f"{dataset.cell} is asked for twice in one run.")
        labels, prompts = _digest(dataset.class_names), _digest(dataset.templates)
        sets["label_sets"][labels] = list(dataset.class_names)
        sets["prompt_sets"][prompts] = list(dataset.templates)
        headers[dataset.cell] = {
            "identity": {
                "fingerprint": dataset.fingerprint,
                "label_set": labels,
                "prompt_set": prompts,
                "generated": f"corruptions version {VERSION}" if dataset.generated else None,
            },
            "dataset": dataset.name,
            "title": _title(dataset),
            "corruption": dataset.corruption,
            "level": dataset.level,
            "generated": dataset.generated,
            "layout": dataset.layout,
            "source": dataset.source,
            "split": dataset.split,
            "fingerprint": dataset.fingerprint,
            "classes": len(dataset.class_names),
            "label_set": labels,
            "prompts": dataset.prompts_name,
            "prompt_set": prompts,
            "images": len(dataset.samples),
            "total": dataset.total,
            "notes": list(dataset.notes),
        }
    return headers, sets


def _prepare(
    folder: RunFolder,
    config: dict[str, Any],
    headers: dict[str, dict[str, Any]],
    sets: dict[str, dict[str, list[str]]],
    teacher: Teacher,
    options: RunOptions,
    group: Group,
) -> dict[str, Any]:
    """Begin or continue the run: check the configuration, remove leftovers, write run.json."""
    if options.fresh:
        folder.clear()
    folder.remove_leftovers()
    record = folder.read_run()
    if record is None:
        if any(folder.path.glob("shards/*/*.parquet")):
            raise UsageError(f"{folder.path} holds rows but no run.json. Give another folder with --out, or --fresh.")
        record = {
            "schema": SCHEMA_VERSION,
            "config": config,
            "teacher": {"name": teacher.name, "identity": teacher.identity, "notes": list(teacher.notes)},
            "stream_order": {"generator": "numpy PCG64 permutation", "seed": options.seed},
            "cells": {key: {k: v for k, v in header.items() if k != "identity"} for key, header in headers.items()},
            **sets,
            "sessions": [],
            "counts": {},
            "wall_seconds": 0.0,
        }
    elif found := differences(record["config"], config):
        raise UsageError(
            f"{folder.path} holds a run of another configuration. {describe_differences(found)}. "
            "Give another folder with --out, or start over with --fresh."
        )
    record["sessions"].append(
        {
            "command": list(options.command),
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": 0.0,
            "processes": group.world,
            "batch_size": options.batch_size,
            "workers": options.workers,
            **describe(teacher.device),
        }
    )
    folder.write_run(record)
    return record


def _same_data(first: Mapping[str, Any], mine: Mapping[str, Any], group: Group) -> None:
    """Check that this machine sees the same files and weights as the first process."""
    if found := differences(first, mine):
        raise UsageError(f"Process {group.rank} does not see what process 0 sees. {describe_differences(found)}.")


def _counts(folder: RunFolder, cells: Iterable[str]) -> dict[str, dict[str, int]]:
    counts = {}
    for cell in cells:
        rows = folder.read(cell, ["position", "error"])
        failed = rows.filter(rows["error"].is_valid())
        counts[cell] = {
            "images": len(set(rows["position"].to_pylist())),
            "rows": rows.num_rows,
            "failed_images": len(set(failed["position"].to_pylist())),
        }
    return counts


@dataclass
class _Lane:
    """Methods that go through the same positions together."""

    methods: list[Method]
    positions: list[int]
    replay: list[int] = field(default_factory=list)
    """Positions that stream methods have answered in an earlier session."""


class _Work:
    """The state of one process during a run."""

    def __init__(
        self,
        folder: RunFolder,
        methods: Sequence[Method],
        teacher: Teacher,
        options: RunOptions,
        group: Group,
        record: dict[str, Any],
        started: float,
        on_progress: Callable[[Progress], None],
        on_note: Callable[[str], None],
        on_failure: Callable[[str], None],
    ) -> None:
        self.folder, self.methods, self.teacher, self.options = folder, methods, teacher, options
        self.group, self.record, self.started = group, record, started
        self.on_progress, self.on_note, self.on_failure = on_progress, on_note, on_failure
        self.heads: dict[tuple[tuple[str, ...], tuple[str, ...]], ZeroShotHead] = {}
        self.earlier_seconds = record["wall_seconds"]
        self.lanes: dict[str, list[_Lane]] = {}
        self.left = 0
        self.answered = 0
        self.working_seconds = 0.0
        self.seconds_per_image: float | None = None

    def plan(self, headers: Mapping[str, Mapping[str, Any]]) -> None:
        """Find out what is left to do in every cell."""
        done = 0
        for cell, header in headers.items():
            rows = self.folder.read(cell, ["position", "method"])
            done += len(set(rows["position"].to_pylist()))
            self.lanes[cell] = self._lanes(cell, rows, header["images"])
            self.left += sum(len(lane.positions) for lane in self.lanes[cell])
        if done and self.group.first:
            self.on_note(f"Continuing {self.folder.path}: {done} images are done.")

    def _lanes(self, cell: str, rows: pa.Table, n: int) -> list[_Lane]:
        """Divide what is left of a cell of n images into lanes, from the rows that there are."""
        positions = rows["position"].to_numpy()
        names = rows["method"].to_numpy(zero_copy_only=False)
        done = {method.name: set(positions[names == method.name].tolist()) for method in self.methods}
        if sum(len(found) for found in done.values()) != rows.num_rows:
            raise UsageError(f"{self.folder.path}: rows of {cell} are there twice. Start over with --fresh.")
        episodic = [method for method in self.methods if not method.stream]
        stream = [method for method in self.methods if method.stream]
        shares: list[tuple[list[Method], range]] = [(list(self.methods), range(n))]
        if self.group.world > 1 or len({frozenset(found) for found in done.values()}) > 1:
            whole = range(n) if self.group.first else range(0)
            shares = [(episodic, range(self.group.rank, n, self.group.world)), (stream, whole)]
        lanes = []
        for members, share in shares:
            left = [position for position in share if any(position not in done[method.name] for method in members)]
            seen = sorted({p for method in members if method.stream for p in done[method.name]})
            if seen != list(range(len(seen))):
                raise UsageError(
                    f"{self.folder.path}: rows of {cell} have gaps in the stream. Start over with --fresh."
                )
            if left:
                lanes.append(_Lane(members, left, seen))
        return lanes

    def run_cell(self, number: int, cell: str, open_cell: Callable[[], Dataset]) -> None:
        """Answer what is left of one cell."""
        lanes = self.lanes[cell]
        if not lanes:
            return
        dataset = _prompted(open_cell(), self.options)
        if dataset.fingerprint != self.record["cells"][cell]["fingerprint"]:
            raise UsageError(f"The files of {cell} have changed since the run began.")
        order = stream_order(len(dataset.samples), self.options.seed)
        head = self._head(dataset)
        total = sum(len(lane.positions) for lane in lanes)
        done = 0
        tally = _Tally()
        for lane in lanes:
            for method in lane.methods:
                if method.stream:
                    cast(StreamMethod, method).reset()
            if lane.replay:
                self._replay(lane, dataset.samples, order, head)
            buffer = _Buffer(self.folder, cell, self.options.flush_seconds, self.write_record)
            decoded = _decoded(((p, dataset.samples[order[p]]) for p in lane.positions), self.options)
            try:
                while True:
                    begun = time.monotonic()
                    items = list(itertools.islice(decoded, self._batch_size()))
                    if not items:
                        break
                    rows = self._answer(items, lane.methods, head, cell)
                    buffer.add(rows, begun)
                    tally.add(rows)
                    self._measure(len(items), time.monotonic() - begun)
                    done += len(items)
                    self._report(number, cell, done, total, tally)
            finally:
                decoded.close()
                buffer.flush()

    def _head(self, dataset: Dataset) -> ZeroShotHead:
        key = (tuple(dataset.class_names), tuple(dataset.templates))
        if key not in self.heads:
            self.heads = {key: ZeroShotHead.build(self.teacher, *key)}  # one at a time: 1000 classes × D stay small
        return self.heads[key]

    def _batch_size(self) -> int:
        """One image to learn the speed, then as many as asked for, unless they would take more than half the flush
        time.
        """
        if self.seconds_per_image is None:
            return 1
        fitting = int(self.options.flush_seconds / 2 / max(self.seconds_per_image, 1e-9))
        return max(1, min(self.options.batch_size, fitting))

    def _measure(self, images: int, seconds: float) -> None:
        self.seconds_per_image = seconds / images
        self.answered += images
        self.left -= images
        self.working_seconds += seconds

    def _report(self, number: int, cell: str, done: int, total: int, tally: _Tally) -> None:
        rate = self.answered / self.working_seconds if self.working_seconds else 0.0
        remaining = self.left / rate if rate else 0.0
        self.on_progress(Progress(cell, number + 1, len(self.lanes), done, total, tally.accuracy(), rate, remaining))

    def _batch(self, items: Sequence[_Readable], head: ZeroShotHead) -> ClockedBatch:
        ids, images = [item.sample.id for item in items], [item.image for item in items]
        return ClockedBatch(ids, images, self.teacher, head, seed=self.options.seed)

    def _replay(self, lane: _Lane, samples: Sequence[Sample], order: Sequence[int], head: ZeroShotHead) -> None:
        """Show stream methods again what they have answered already, and record nothing."""
        stream = [method for method in lane.methods if method.stream]
        names = ", ".join(method.name for method in stream)
        self.on_note(f"Rebuilding the state of {names} from the {len(lane.replay)} images before.")
        decoded = _decoded(((p, samples[order[p]]) for p in lane.replay), self.options)
        try:
            while items := list(itertools.islice(decoded, self.options.batch_size)):
                if readable := [item for item in items if isinstance(item, _Readable)]:
                    batch = self._batch(readable, head)
                    for method in stream:
                        batch.measure(partial(method.predict, batch))
        finally:
            decoded.close()

    def _answer(
        self, items: Sequence[_Readable | _Unreadable], methods: Sequence[Method], head: ZeroShotHead, cell: str
    ) -> list[Row]:
        """Answer a batch by all methods: a row for each image and method."""
        rows = []
        readable = [item for item in items if isinstance(item, _Readable)]
        if readable:
            batch = self._batch(readable, head)
            logits, _, _ = batch.measure(lambda: head.logits(batch.tokens()))
            teacher = logits.argmax(1).tolist()
            for method in methods:
                prediction, own, shared = batch.measure(partial(method.predict, batch))
                prediction.check(method.name, batch)
                rows += _score(method.name, prediction, readable, teacher, own / len(batch), shared / len(batch))
        for item in items:
            if isinstance(item, _Unreadable):
                place: dict[str, Any] = {"id": item.sample.id, "position": item.position, "label": item.sample.label}
                rows += [Row(**place, method=method.name, error=item.error) for method in methods]
                self.on_failure(f"{cell}: {item.sample.id}: {item.error}")
        for row in rows:
            if row.error == NOT_FINITE:
                self.on_failure(f"{cell}: {row.id}: {row.method}: {row.error}")
        return rows

    def write_record(self) -> None:
        """Bring run.json up to date; only the first process does."""
        if self.group.first:
            seconds = round(time.monotonic() - self.started, 3)
            self.record["sessions"][-1]["seconds"] = seconds
            self.record["wall_seconds"] = round(self.earlier_seconds + seconds, 3)
            self.folder.write_run(self.record)


@dataclass(frozen=True)
class _Readable:
    """An image ready to be answered."""

    position: int
    sample: Sample
    image: Image.Image


@dataclass(frozen=True)
class _Unreadable:
    """An image that cannot be decoded, and why."""

    position: int
    sample: Sample
    error: str


def _decoded(todo: Iterator[tuple[int, Sample]], options: RunOptions) -> Generator[_Readable | _Unreadable, None, None]:
    """Decode samples in threads, in order, a bounded number ahead of whoever takes them."""
    ahead = options.batch_size + options.workers
    waiting: deque[tuple[int, Sample, Future[Image.Image]]] = deque()
    with ThreadPoolExecutor(options.workers, thread_name_prefix="decode") as pool:
        try:
            for position, sample in todo:
                waiting.append((position, sample, pool.submit(sample.load)))
                if len(waiting) > ahead:
                    yield _loaded(*waiting.popleft())
            while waiting:
                yield _loaded(*waiting.popleft())
        finally:
            for _, _, future in waiting:
                future.cancel()


def _loaded(position: int, sample: Sample, future: Future[Image.Image]) -> _Readable | _Unreadable:
    try:
        return _Readable(position, sample, future.result())
    except MemoryError:
        raise
    except Exception as error:  # decoders raise all kinds; the image is at fault, not the run
        return _Unreadable(position, sample, " ".join(str(error).split()) or type(error).__name__)


def _score(
    method: str,
    prediction: Prediction,
    items: Sequence[_Readable],
    teacher: Sequence[int],
    seconds: float,
    shared_seconds: float,
) -> list[Row]:
    """Compare one method's logits with the labels: a row for each image."""
    logits = prediction.logits.detach().cpu().double()  # (B, C)
    answered = torch.isfinite(logits).all(1).tolist()
    log_probabilities = logits.log_softmax(1)
    labels = torch.tensor([item.sample.label for item in items]).unsqueeze(1)  # (B, 1)
    chosen = logits.argmax(1, keepdim=True)
    of_label = logits.gather(1, labels)
    # Among equal logits the prediction is the first class; the rank follows the same rule.
    earlier = torch.arange(logits.shape[1]) < labels
    ranks = 1 + ((logits > of_label) | ((logits == of_label) & earlier)).sum(1)
    nll = -log_probabilities.gather(1, labels)
    probability = log_probabilities.gather(1, chosen).exp()
    steps = prediction.step_logits
    trails = None if steps is None else steps.detach().cpu().nan_to_num(nan=-torch.inf).argmax(2).tolist()
    extras = {name: values.detach().cpu().tolist() for name, values in prediction.extras.items()}
    rows = []
    for index, item in enumerate(items):
        place: dict[str, Any] = {
            "id": item.sample.id,
            "position": item.position,
            "label": item.sample.label,
            "method": method,
        }
        if not answered[index]:
            rows.append(Row(**place, error=NOT_FINITE))
            continue
        rows.append(
            Row(
                **place,
                prediction=int(chosen[index]),
                probability=float(probability[index]),
                nll=float(nll[index]),
                rank=int(ranks[index]),
                teacher_prediction=teacher[index],
                loss=extras["loss"][index] if "loss" in extras else None,
                cosine=extras["cosine"][index] if "cosine" in extras else None,
                steps=int(extras["steps"][index]) if "steps" in extras else None,
                seconds=seconds,
                shared_seconds=shared_seconds,
                step_predictions=None if trails is None else tuple(trails[index]),
            )
        )
    return rows


class _Buffer:
    """Rows on their way to the disk."""

    def __init__(self, folder: RunFolder, cell: str, flush_seconds: float, after: Callable[[], None]) -> None:
        self.folder, self.cell, self.flush_seconds, self.after = folder, cell, flush_seconds, after
        self.rows: list[Row] = []
        self.since = 0.0

    def add(self, rows: Sequence[Row], begun: float) -> None:
        """Take the rows of a batch begun at `begun`; write when another such batch might come too late."""
        if not self.rows:
            self.since = begun
        self.rows += rows
        now = time.monotonic()
        if now - self.since + (now - begun) >= self.flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Write what there is as one shard."""
        if self.rows:
            rows, self.rows = self.rows, []
            self.folder.append(self.cell, rows)
            self.after()


class _Tally:
    """Running accuracy of each method."""

    def __init__(self) -> None:
        self.right: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()

    def add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            if row.error is None:
                self.answered[row.method] += 1
                self.right[row.method] += row.rank == 1

    def accuracy(self) -> dict[str, float]:
        return {method: self.right[method] / n for method, n in self.answered.items()}
