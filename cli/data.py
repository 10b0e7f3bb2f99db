"""What `apm bench`, `apm encode` and `apm reproduce` share: which images, which teacher, and how far they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apm.benchmarks.protocols import PROTOCOLS
from apm.errors import UsageError
from apm.images.paths import printable

from .progress import counted
from .render import failure, notice, progress_line, progress_on_terminal, warning

if TYPE_CHECKING:
    from apm.benchmarks.datasets import Dataset
    from apm.benchmarks.runs.progress import Progress
    from apm.benchmarks.store.encode import Encoded
    from apm.benchmarks.store.filling import EncodeOptions
    from apm.processes import Group
    from apm.teachers.base import Teacher

DATA, METHOD, RUN, OUTPUT = "Data", "Methods", "The run", "Output"
_LINE_EVERY = 30.0  # seconds between lines of progress where stderr is no terminal

DataSets = Annotated[
    list[str] | None,
    typer.Argument(metavar="DATASET…", help="Data sets, or the suites natural-shifts and cross-dataset."),
]
Root = Annotated[
    Path | None,
    typer.Option(
        help="Folder that contains the data sets, or a data set's own folder. Default: APM_DATA.",
        rich_help_panel=DATA,
    ),
]
Corruptions = Annotated[
    list[str] | None,
    typer.Option(
        help="A corruption of ImageNet-C, clean, or all (the 15). Repeat for several. imagenet-c reads its files; "
        "for other data sets the pictures are corrupted as they are read.",
        rich_help_panel=DATA,
    ),
]
Levels = Annotated[
    list[int] | None, typer.Option(help="Severity, 1 to 5. Repeat for several. Default: 5.", rich_help_panel=DATA)
]
FromClean = Annotated[
    bool,
    typer.Option(
        "--from-clean",
        help="Make imagenet-c from the clean ImageNet under the root instead of reading its files.",
        rich_help_panel=DATA,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(help="Use only this many images, drawn evenly from the classes by the seed.", rich_help_panel=DATA),
]
Source = Annotated[
    str | None,
    typer.Option(help="hf:REPO[:SPLIT]: stream the data set from the Hugging Face hub.", rich_help_panel=DATA),
]
LabelSet = Annotated[
    str | None,
    typer.Option(help="For the data set folder: classify among all labels of this set.", rich_help_panel=DATA),
]
Views = Annotated[
    int | None,
    typer.Option(help="Number of augmented views, for every method that uses them.", rich_help_panel=METHOD),
]
Protocol = Annotated[
    str, typer.Option(help=". ".join(f"{name}: {what}" for name, what in PROTOCOLS.items()), rich_help_panel=METHOD)
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=RUN)]
BatchSize = Annotated[
    int | None, typer.Option(help="Images at a time. Answers do not depend on it.", rich_help_panel=RUN)
]
Workers = Annotated[int, typer.Option(help="Number of threads that decode images.", rich_help_panel=RUN)]
Seed = Annotated[
    int, typer.Option(help="Seed of subset, stream order, views, corruptions, students.", rich_help_panel=RUN)
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no notes on stderr.", rich_help_panel=OUTPUT)
]


def images_at_a_time(asked: int | None, teacher: Teacher) -> int:
    """The batch size: what was asked for, else what suits the device."""
    return asked or (64 if teacher.device.type == "cuda" else 8)


def check_numbers(batch_size: int | None, workers: int, seed: int) -> None:
    """Refuse, with a `UsageError`, what no run can have."""
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"--batch-size is {batch_size}; it must be 1 or more.")
    if workers < 1:
        raise UsageError(f"--workers is {workers}; it must be 1 or more.")
    if seed < 0:
        raise UsageError(f"--seed is {seed}; it must be 0 or more.")


def load_shared_teacher(name: str | None, device: str, group: Group) -> Teacher:
    """The teacher of a run on this process's device; the default one where none is named."""
    from apm.processes import local_rank
    from apm.teachers import check_teacher, load_default_teacher, load_teacher

    if name is not None:
        check_teacher(name)
    from apm.classifier import pick_device

    place = pick_device(device)
    if place.type == "cuda" and place.index is None and group.world > 1:
        place = pick_device(f"cuda:{local_rank()}")
    return load_default_teacher(device=place) if name is None else load_teacher(name, device=place)


def shared_precision(asked: str, folder: Path, teacher: Teacher, fresh: bool, group: Group) -> str:
    """What auto comes to: that of the run that is continued, else what is measured, the same in all processes."""
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


def fill_store(
    path: Path,
    cells: Sequence[Callable[[], Dataset]],
    teacher: Teacher,
    options: EncodeOptions,
    group: Group,
    *,
    quiet: bool,
) -> Encoded:
    """Encode what a store lacks, and say on stderr how far it is."""
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
            elif not silent and (progress.done == progress.total or time.monotonic() - last[0] >= _LINE_EVERY):
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
