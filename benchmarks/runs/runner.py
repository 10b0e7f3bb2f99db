"""Run methods over data sets, image by image, into a run folder that can be continued after anything.

The runner alone holds labels: a method is given a `Batch` of images and returns logits; what is right is decided here.

Order. The images of a cell are gone through in one seeded order, the stream order, which is the same for all methods.
Episodic methods do not care. A stream method (its answers depend on the images before) sees it from the first image
to the last: when a run is continued, the state of the method is rebuilt by showing it again, without recording, the
images it had already answered. One that answers a number of images together gets whole batches of that order.

Processes. Under ``torchrun`` process r of w answers positions r, r + w, r + 2w, … for episodic methods; stream
methods cannot be divided, but for their whole batches, and are answered by the first process alone, after its part; or
each by another process, where the features of the images are known. The rows are those of one process.

Time. Rows are written to the disk before 30 seconds of work have come together; batches are made smaller where one
would take longer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from apm.errors import ApmError, UsageError
from apm.processes import ALONE, Group
from apm.teachers.base import Teacher
from apm.text.zeroshot import ZeroShotHead

from ..methods.base import Batch, Method, StreamMethod
from ..methods.published import AsPublished
from .decoding import Readable, Unreadable, next_batch
from .environment import peak_memory
from .file_state import check_files
from .locks import patience
from .progress import Progress
from .records import RunFolder
from .rows import Row
from .run_record import (
    RunOptions,
    add_own_prompts,
    check_complete,
    check_same_data,
    configuration,
    count_rows,
    describe_cells,
    prepare,
    prompted,
)
from .scoring import NOT_FINITE, Tally, score
from .shares import WorkShare, divide, stream_order
from .source import CellImages, Features
from .timed_batch import TimedBatch

if TYPE_CHECKING:
    from ..datasets import Dataset

logger = logging.getLogger("apm")


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
    features: Features | None = None,
    group: Group = ALONE,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_texts: Callable[[int, int], None] | None = None,
    on_note: Callable[[str], None] = logger.info,
    on_failure: Callable[[str], None] = logger.warning,
    on_warning: Callable[[str], None] = logger.warning,
) -> Summary:
    """Run or continue `methods` on `cells` in the run folder `path`.

    Args:
        path: the run folder; made where it does not exist.
        cells: opens the data set of a cell. Called at the start, and again when the cell's turn comes, so that many
            cells do not lie in memory together.
        methods: the methods; names must differ.
        teacher: the frozen teacher that all of them share.
        options: seed, limits, sizes.
        features: of the images, where they need not be computed: images are then decoded only for methods that ask for
            their pixels.
        group: this process's place among those of the run.
        on_progress: called after every batch.
        on_texts: called, while class names are encoded, with how many are done and how many there are.
        on_note: called with a sentence for people: what is continued.
        on_failure: called with a sentence for each image without an answer.
        on_warning: called with each warning of a data set, before anything is computed.

    Raises:
        UsageError: the folder is in use, or holds a run of another configuration (the differing fields are named).
        ApmError: the disk cannot be written, the run folder or rows in it have gone, or another session has taken it
            over; nothing that was written is damaged.
        KeyboardInterrupt: after everything answered so far has been written.
    """
    names = [method.name for method in methods]
    if len(set(names)) != len(names):
        raise UsageError(f"Two methods of one run have the same name: {', '.join(names)}.")
    folder = RunFolder(path)
    started = time.monotonic()
    headers, sets, states = describe_cells(cells, options, look=group.first)
    add_own_prompts(headers, sets, methods)
    opened = dict(zip(headers, cells, strict=True))
    files = partial(check_files, folder, states, opened)
    config = configuration(methods, teacher, headers, options)
    lock, record, refusal = None, None, None
    if group.first:
        try:
            if features is not None:
                for cell, state in states.items():
                    features.check(opened[cell](), state)
            lock = folder.lock(patience(group.world))
            record = prepare(folder, config, headers, sets, files, teacher, options, group, features)
        except ApmError as error:
            refusal = error
    try:
        refusal, record = group.broadcast((refusal, record))
        if refusal is not None:
            raise refusal
        assert record is not None
        check_same_data(record["config"], config, group)
        for cell, header in headers.items() if group.first else ():
            for warning in header["warnings"]:
                on_warning(f"{cell}: {warning}")
        folder.join(record["sessions"][-1]["id"])
        work = Session(
            folder,
            methods,
            teacher,
            options,
            group,
            record,
            started,
            on_progress,
            on_note,
            on_failure,
            on_texts,
            features,
        )
        try:
            work.plan(headers)
            for number, (key, open_cell) in enumerate(zip(headers, cells, strict=True)):
                work.run_cell(number, key, open_cell)
            group.barrier()
        finally:
            if group.first:
                record["counts"] = count_rows(folder, headers)
                work.write_record()
        if group.first:
            check_complete(folder, record["counts"], headers, len(methods))
            for cell in headers:
                folder.merge(cell)
            folder.end()
        return Summary(path, record)
    finally:
        if lock is not None:
            lock.release()


class Session:
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
        on_texts: Callable[[int, int], None] | None = None,
        features: Features | None = None,
    ) -> None:
        self.folder, self.methods, self.teacher, self.options = folder, methods, teacher, options
        self.group, self.record, self.started = group, record, started
        self.on_progress, self.on_note, self.on_failure = on_progress, on_note, on_failure
        self.on_texts, self.features = on_texts, features
        self.looking: set[str] = set()  # methods that were seen to ask for pixels though features are known
        self.heads: dict[tuple[tuple[str, ...], tuple[str, ...]], ZeroShotHead] = {}
        self.earlier_seconds = record["wall_seconds"]
        self.lanes: dict[str, list[WorkShare]] = {}
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
            self.lanes[cell] = divide(self.methods, rows, header["images"], self.group, spread=bool(self.features))
            self.left += sum(len(lane.positions) for lane in self.lanes[cell])
        if done and self.group.first:
            self.on_note(f"Continuing {self.folder.path}: {done} images are done.")

    def run_cell(self, number: int, cell: str, open_cell: Callable[[], Dataset]) -> None:
        """Answer what is left of one cell."""
        lanes = self.lanes[cell]
        if not lanes:
            return
        dataset = prompted(open_cell(), self.options)
        if dataset.fingerprint != self.record["cells"][cell]["fingerprint"]:
            raise UsageError(f"The files of {cell} have changed since the run began.")
        folder = Path(dataset.source) if Path(dataset.source).is_dir() else None  # None: built in, or streamed
        source = CellImages(
            dataset.samples,
            stream_order(len(dataset.samples), self.options.order_seed),
            ahead=self.options.batch_size + self.options.workers,
            workers=self.options.workers,
            known=None if self.features is None else self.features.cell(dataset),
        )
        head = self._head(dataset)
        total = sum(len(lane.positions) for lane in lanes)
        done = 0
        tally = Tally()
        for lane in lanes:
            for method in lane.methods:
                if isinstance(method, AsPublished):
                    method.begin(dataset.name)
                if method.stream:
                    cast(StreamMethod, method).reset()
            if lane.replay:
                self._replay(lane, source, head)
            buffer = _Buffer(self.folder, cell, self.options.flush_seconds, self.write_record)
            images = source.read(lane.positions)
            try:
                while True:
                    begun = time.monotonic()
                    items = next_batch(images, lane.together or self._batch_size(), whole=lane.together is not None)
                    if not items:
                        break
                    if folder is not None and not folder.is_dir():  # an unplugged drive: no image is at fault
                        raise ApmError(f"{folder} is no longer there. Run the same command again when it is.")
                    answers = self._answer(items, lane.methods, head, cell, source)
                    rows = [row for row in answers if row.position not in lane.recorded[row.method]]
                    buffer.add(rows, begun)
                    tally.add(rows)
                    self._measure(len(items), time.monotonic() - begun)
                    done += len(items)
                    self._report(number, cell, done, total, tally)
            finally:
                images.close()
                buffer.flush()

    def _head(self, dataset: Dataset) -> ZeroShotHead:
        key = (tuple(dataset.class_names), tuple(dataset.templates))
        if key not in self.heads:
            head = ZeroShotHead.build(self.teacher, *key, progress=self.on_texts)
            self.heads = {key: head}  # one at a time: 1000 classes × D stay small
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

    def _report(self, number: int, cell: str, done: int, total: int, tally: Tally) -> None:
        rate = self.answered / self.working_seconds if self.working_seconds else 0.0
        remaining = self.left / rate if rate else 0.0
        self.on_progress(Progress(cell, number + 1, len(self.lanes), done, total, tally.accuracy(), rate, remaining))

    def _batch(self, items: Sequence[Readable], head: ZeroShotHead, source: CellImages) -> TimedBatch:
        return TimedBatch(
            [item.sample.id for item in items],
            source.opened(items),
            self.teacher,
            head,
            seed=self.options.seed,
            stream_length=len(source),
            known=source.views(items),
        )

    def _replay(self, lane: WorkShare, source: CellImages, head: ZeroShotHead) -> None:
        """Show stream methods again what they have answered already, and record nothing."""
        stream = [method for method in lane.methods if method.stream]
        names = ", ".join(method.name for method in stream)
        self.on_note(f"Rebuilding the state of {names} from the {len(lane.replay)} images before.")
        images = source.read(lane.replay)
        try:
            while items := next_batch(images, self.options.batch_size):
                if readable := [item for item in items if isinstance(item, Readable)]:
                    batch = self._batch(readable, head, source)
                    for method in stream:
                        method.predict(batch)
                        self._watch(method, batch, source)
        finally:
            images.close()

    def _answer(
        self,
        items: Sequence[Readable | Unreadable],
        methods: Sequence[Method],
        head: ZeroShotHead,
        cell: str,
        source: CellImages,
    ) -> list[Row]:
        """Answer a batch of a cell by all methods: a row for each image and method."""
        rows = []
        readable = [item for item in items if isinstance(item, Readable)]
        if readable:
            batch = self._batch(readable, head, source)
            logits, _, _ = batch.measure(lambda: head.logits(batch.tokens()))
            teacher = logits.argmax(1).tolist()
            for method in methods:
                prediction, own, shared = batch.measure(partial(method.predict, batch))
                self._watch(method, batch, source)
                prediction.check(method.name, batch)
                # What the shared parts would have cost is not known where a store had them.
                seconds = own / len(batch), None if source.known is not None else shared / len(batch)
                rows += score(method.name, prediction, readable, teacher, *seconds, self.options.record_logits)
        for item in items:
            if isinstance(item, Unreadable):
                place: dict[str, Any] = {"id": item.sample.id, "position": item.position, "label": item.sample.label}
                rows += [Row(**place, method=method.name, error=item.error) for method in methods]
                self.on_failure(f"{cell}: {item.sample.id}: {item.error}")
        for row in rows:
            if row.error == NOT_FINITE:
                self.on_failure(f"{cell}: {row.id}: {row.method}: {row.error}")
        return rows

    def _watch(self, method: Method, batch: Batch, source: CellImages) -> None:
        """Decode ahead from now on, and say so, where a method has asked for pixels though features are known."""
        if batch.looked_at and not source.decoding:
            source.decoding = True
            if self.group.first and method.name not in self.looking:
                self.looking.add(method.name)
                self.on_note(f"{method.name} looks at the images themselves: they are decoded too.")

    def write_record(self) -> None:
        """Bring run.json up to date; only the first process does."""
        if self.group.first:
            seconds = round(time.monotonic() - self.started, 3)
            self.record["sessions"][-1]["seconds"] = seconds
            self.record["sessions"][-1]["peak_memory"] = peak_memory(self.teacher.device)
            self.record["wall_seconds"] = round(self.earlier_seconds + seconds, 3)
            self.folder.write_run(self.record)


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
