"""What `apm bench`, `apm encode` and `apm reproduce` share: loading a teacher, running methods, showing progress."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from apm.images.paths import printable

from .progress import LINE_EVERY, counted
from .render import failure, notice, progress_line, progress_on_terminal, warning

if TYPE_CHECKING:
    import torch

    from apm.benchmarks.datasets import Dataset
    from apm.benchmarks.methods import Method
    from apm.benchmarks.runs.progress import Progress
    from apm.benchmarks.runs.run_record import RunOptions
    from apm.benchmarks.runs.runner import Summary
    from apm.benchmarks.store.encode import Encoded
    from apm.benchmarks.store.filling import EncodeOptions
    from apm.benchmarks.store.reader import FeatureStore
    from apm.processes import Group
    from apm.teachers.base import Teacher


def place_of(device: str) -> torch.device:
    """The device of this process; under torchrun each process has its own GPU."""
    from apm.devices import pick_device
    from apm.processes import local_rank

    place = pick_device(device)
    if place.type == "cuda" and place.index is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return pick_device(f"cuda:{local_rank()}")
    return place


def load_chosen_teacher(name: str | None, device: str) -> Teacher:
    """The teacher on this process's device; the default one where none is named."""
    from apm.teachers import check_teacher, load_default_teacher, load_teacher

    if name is not None:
        check_teacher(name)
    place = place_of(device)
    return load_default_teacher(device=place) if name is None else load_teacher(name, device=place)


def shared_precision(asked: str, folder: Path, teacher: Teacher, fresh: bool, group: Group) -> str:
    """What ``auto`` means: the precision of the run being continued, else the faster one; the same in all processes."""
    if asked != "auto":
        return asked
    from apm.benchmarks.runs.records import RunFolder
    from apm.student.matmul import measured_precision

    chosen: str | None = None
    if group.first:
        earlier = None if fresh else RunFolder(folder).read_run()
        settings = earlier["config"]["methods"].values() if earlier else ()
        chosen = next((one["precision"] for one in settings if "precision" in one), None)
        chosen = chosen or measured_precision(teacher.device)
    return str(group.broadcast(chosen))


def say_notes(teacher: Teacher, group: Group, *, quiet: bool) -> None:
    """Print a teacher's notes, once."""
    for note in teacher.notes if group.first and not quiet else ():
        notice(note)


def answer(
    doing: str,
    folder: Path,
    cells: Sequence[Callable[[], Dataset]],
    methods: Sequence[Method],
    teacher: Teacher,
    options: RunOptions,
    group: Group,
    *,
    features: FeatureStore | None = None,
    quiet: bool,
) -> Summary:
    """Run or continue methods on cells, showing progress on stderr."""
    from apm.benchmarks.runs.runner import run

    with images_progress(doing, silent=quiet or not group.first) as (report, texts):
        return run(
            folder,
            cells,
            methods,
            teacher,
            options,
            features=features,
            group=group,
            on_progress=report,
            on_texts=texts,
            on_note=(lambda text: None) if quiet else notice,
            on_failure=failure,
            on_warning=warning,
        )


def fill_store(
    path: Path,
    cells: Sequence[Callable[[], Dataset]],
    teacher: Teacher,
    options: EncodeOptions,
    group: Group,
    *,
    quiet: bool,
) -> Encoded:
    """Encode what a store lacks, showing progress on stderr."""
    from apm.benchmarks.store.encode import encode

    with images_progress("encode", silent=quiet or not group.first) as (report, _):
        return encode(
            path,
            cells,
            teacher,
            options,
            group=group,
            on_progress=report,
            on_note=(lambda text: None) if quiet else notice,
            on_failure=failure,
            on_warning=warning,
        )


@contextmanager
def images_progress(
    doing: str, *, silent: bool
) -> Iterator[tuple[Callable[[Progress], None], Callable[[int, int], None]]]:
    """Report images and the encoding of labels on stderr: a bar on a terminal, else a line now and then."""
    labels = "encoding labels"
    with (
        progress_on_terminal(None, wanted=not silent, doing=doing) as bar,
        counted(labels, wanted=bar is None and not silent) as line,
    ):
        last = [time.monotonic()]

        def report(progress: Progress) -> None:
            if bar is not None:
                words = printable(progress_words(progress))
                bar.update(bar.task_ids[0], description=words, completed=progress.done, total=progress.total)
            elif not silent and (progress.done == progress.total or time.monotonic() - last[0] >= LINE_EVERY):
                last[0] = time.monotonic()
                progress_line(f"{progress.done}/{progress.total} {progress_words(progress)}")

        def texts(done: int, total: int) -> None:
            if bar is not None:
                bar.update(bar.task_ids[0], description=labels, completed=done, total=total)
            line(done, total)

        yield report, texts


def progress_words(progress: Progress) -> str:
    """``digits (1/4) zero-shot 71.2 % apm 70.8 % · 3.2 images/s · 2 min left``."""
    scores = "".join(f" {name} {100 * accuracy:.1f} %" for name, accuracy in progress.accuracy.items())
    rate = f"{progress.images_per_second:.3g} images/s"
    left = f"{_duration(progress.remaining_seconds)} left"
    return f"{progress.cell} ({progress.cell_number}/{progress.cells}){scores} · {rate} · {left}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
