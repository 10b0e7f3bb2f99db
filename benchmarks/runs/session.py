"""What one process does of a run: it answers its share of every cell, and the first one keeps run.json up to date."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from apm.errors import ApmError, UsageError
from apm.processes import Group
from apm.teachers.base import Teacher
from apm.text.zeroshot import ZeroShotHead

from ..methods.base import Batch, Method, StreamMethod
from ..methods.published import AsPublished
from .decoding import Readable, Unreadable, next_batch
from .environment import peak_memory
from .progress import Progress
from .records import RunFolder
from .rows import Row
from .run_record import RunOptions, check_complete, count_rows, prompted
from .scoring import NOT_FINITE, Tally, score
from .shares import WorkShare, split_work, stream_order
from .source import CellImages, Features
from .timed_batch import TimedBatch

if TYPE_CHECKING:
    from ..datasets import Dataset


class Session:
    """The state of one process during a run."""

    def __init__(
        self,
        folder: RunFolder,
        methods: Sequence[Method],
        teacher: Teacher,
        options: RunOptions,
        features: Features | None,
        group: Group,
        record: dict[str, Any],
        started: float,
        on_progress: Callable[[Progress], None],
        on_note: Callable[[str], None],
        on_failure: Callable[[str], None],
        on_texts: Callable[[int, int], None] | None,
    ) -> None:
        self.folder, self.methods, self.teacher, self.options = folder, methods, teacher, options
        self.group, self.record, self.started = group, record, started
        self.on_progress, self.on_note, self.on_failure = on_progress, on_note, on_failure
        self.on_texts, self.features = on_texts, features
        self.looking: set[str] = set()  # methods that were seen to ask for pixels though features are known
        self.heads: dict[tuple[tuple[str, ...], tuple[str, ...]], ZeroShotHead] = {}
        self.earlier_seconds = record["wall_seconds"]
        self.shares: dict[str, list[WorkShare]] = {}
        self.left = 0
        self.answered = 0
        self.working_seconds = 0.0
        self.seconds_per_image: float | None = None

    def run(self, headers: Mapping[str, Mapping[str, Any]], cells: Sequence[Callable[[], Dataset]]) -> None:
        """Answer what is left of all cells; the first process counts the rows, and merges them at the end."""
        self.folder.join(self.record["sessions"][-1]["id"])
        try:
            self.plan(headers)
            for number, (cell, open_cell) in enumerate(zip(headers, cells, strict=True)):
                self.run_cell(number, cell, open_cell)
            self.group.barrier()
        finally:
            if self.group.first:
                self.record["counts"] = count_rows(self.folder, headers)
                self.write_record()
        if self.group.first:
            check_complete(self.folder, self.record["counts"], headers, len(self.methods))
            for cell in headers:
                self.folder.merge(cell)
            self.folder.end()

    def plan(self, headers: Mapping[str, Mapping[str, Any]]) -> None:
        """Find out what is left to do in every cell."""
        done, session = 0, self.record["sessions"][-1]["id"]
        for cell, header in headers.items():
            rows = self.folder.read(cell, ["position", "method"])
            done += len(set(rows["position"].to_pylist()))
            self.shares[cell] = split_work(
                self.methods, rows, header["images"], self.group, name=f"{session}/{cell}", spread=bool(self.features)
            )
            self.left += sum(len(share.positions) for share in self.shares[cell])
        if done and self.group.first:
            self.on_note(f"Continuing {self.folder.path}: {done} images are done.")

    def run_cell(self, number: int, cell: str, open_cell: Callable[[], Dataset]) -> None:
        """Answer what is left of one cell."""
        shares = self.shares[cell]
        if not shares:
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
        total = sum(len(share.positions) for share in shares)
        done = 0
        tally = Tally()
        for share in shares:
            for method in share.methods:
                if isinstance(method, AsPublished):
                    method.begin(dataset.name)
                    method.encode_texts(self.teacher, head, self.on_texts)
                if method.stream:
                    cast(StreamMethod, method).reset()
            if share.replay:
                self._replay(share, source, head)
            buffer = _Buffer(self.folder, cell, self.options.flush_seconds, self.write_record)
            images = source.read(share.positions)
            try:
                while True:
                    begun = time.monotonic()
                    items = next_batch(images, share.together or self._batch_size(), whole=share.together is not None)
                    if not items:
                        break
                    if folder is not None and not folder.is_dir():  # an unplugged drive: no image is at fault
                        raise ApmError(f"{folder} is no longer there. Run the same command again when it is.")
                    answers = self._answer(items, share.methods, head, cell, source)
                    rows = [row for row in answers if row.position not in share.recorded[row.method]]
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
        self.on_progress(Progress(cell, number + 1, len(self.shares), done, total, tally.accuracy(), rate, remaining))

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

    def _replay(self, share: WorkShare, source: CellImages, head: ZeroShotHead) -> None:
        """Show stream methods again what they have answered already, and record nothing."""
        stream = [method for method in share.methods if method.stream]
        names = ", ".join(method.name for method in stream)
        self.on_note(f"Rebuilding the state of {names} from the {len(share.replay)} images before.")
        images = source.read(share.replay)
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
                self.on_note(f"{method.name} needs the images themselves: they are decoded too.")

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
