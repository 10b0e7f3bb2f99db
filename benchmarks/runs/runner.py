"""Run methods over data sets, image by image, into a run folder that can be continued after anything.

The runner alone holds labels: a method is given a `Batch` of images and returns logits; what is right is decided here.

Order. The images of a cell are gone through in one seeded order, the stream order, which is the same for all methods.
Episodic methods do not care. A stream method (its answers depend on the images before) sees it from the first image
to the last: when a run is continued, the state of the method is rebuilt by showing it again, without recording, the
images it had already answered. One that answers a number of images together gets whole batches of that order.

Processes. Under ``torchrun`` stream methods cannot be divided, but for their whole batches: the first process answers
them, or, where the features of the images are known, each another one. Of the images of episodic methods process r of w
answers positions r, r + w, r + 2w, …, or, where streams are spread so, those that no process has come to yet. The rows
are those of one process.

Time. Rows are written to the disk before 30 seconds of work have come together; batches are made smaller where one
would take longer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apm.errors import ApmError, UsageError
from apm.processes import ALONE, Group
from apm.teachers.base import Teacher

from ..methods.base import Method
from .file_state import check_files
from .locks import patience
from .progress import Progress
from .records import RunFolder
from .run_record import RunOptions, add_own_prompts, check_same_data, configuration, describe_cells, prepare
from .session import Session
from .source import Features

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
        raise UsageError(f"Two methods of a run have the same name: {', '.join(names)}.")
    folder = RunFolder(path)
    started = time.monotonic()
    with _begun(folder, cells, methods, teacher, options, features, group) as (headers, record):
        for cell, header in headers.items() if group.first else ():
            for warning in header["warnings"]:
                on_warning(f"{cell}: {warning}")
        told = on_progress, on_note, on_failure, on_texts
        session = Session(folder, methods, teacher, options, features, group, record, started, *told)
        session.run(headers, cells)
        return Summary(path, record)


@contextmanager
def _begun(
    folder: RunFolder,
    cells: Sequence[Callable[[], Dataset]],
    methods: Sequence[Method],
    teacher: Teacher,
    options: RunOptions,
    features: Features | None,
    group: Group,
) -> Iterator[tuple[dict[str, dict[str, Any]], dict[str, Any]]]:
    """Hold the run folder, and begin or continue the run in it.

    Gives every process what run.json says, of the cells and altogether.
    """
    headers, sets, states = describe_cells(cells, options, look=group.first)
    add_own_prompts(headers, sets, methods)
    config = configuration(methods, teacher, headers, options)
    opened = dict(zip(headers, cells, strict=True))
    files = partial(check_files, folder, states, opened)
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
        yield headers, record
    finally:
        if lock is not None:
            lock.release()
