"""How answers look: to people (rich), and to programs (records of the documented schema)."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from apm.paths import printable

if TYPE_CHECKING:
    import torch
    from rich.console import Console, RenderableType
    from rich.progress import Progress

    from apm.classifier import Answer, Classifier, Prediction

PLAIN_WIDTH = 120  # of output that goes to a file or a pipe, where no terminal gives a width


def notice(text: str) -> None:
    """Say one line on stderr."""
    typer.echo(f"note: {' '.join(text.split())}", err=True)


def notice_if_slow(precision: str, device: torch.device) -> None:
    """Say so, even to those who asked for quiet, where the precision asked for is the slower one."""
    from apm.precision import slowness

    if text := slowness(precision, device):
        notice(text)


def failure(text: str) -> None:
    """Name one failed input on stderr."""
    typer.echo(f"error: {' '.join(text.splitlines())}", err=True)  # a file's name may hold several blanks


def warning(text: str) -> None:
    """Say on stderr what must not be overlooked."""
    typer.secho(f"WARNING: {text}", err=True, bold=True, fg="red")


def data_console() -> Console:
    """Return the console for stdout; its lines are wide and plain where stdout is no terminal."""
    from rich.console import Console

    class DataConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would end the program as if an input had failed

    console = DataConsole(highlight=False, soft_wrap=True)
    return console if console.is_terminal else DataConsole(highlight=False, soft_wrap=True, width=PLAIN_WIDTH)


@contextmanager
def progress_on_terminal(total: int | None, *, wanted: bool, doing: str = "classify") -> Iterator[Progress | None]:
    """Show a bar on stderr when that is a terminal; yields None where there is to be none.

    Args:
        total: number of items, or None when it is not known.
        wanted: False shows none in any case.
        doing: the word before the bar.
    """
    if not wanted or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task(doing, total=total)
        yield progress


@contextmanager
def above(progress: Progress | None) -> Iterator[None]:
    """Take the bar away while something is printed: stdout and stderr may be the same terminal."""
    if progress is None:
        yield
        return
    progress.stop()
    yield
    progress.advance(progress.task_ids[0])
    progress.start()


def answer_view(answer: Answer, *, teacher: str) -> RenderableType:
    """Lay out one answer: both rankings side by side, and a line on the adaptation."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    for heading in ("student", teacher):
        table.add_column(Text(heading), style="bold" if heading == "student" else "", overflow="fold")
        table.add_column("", justify="right")
    for mine, theirs in zip(answer.top, answer.teacher_top, strict=True):
        table.add_row(Text(printable(mine.label)), _percent(mine), Text(printable(theirs.label)), _percent(theirs))
    lines: list[RenderableType] = [Text(printable(answer.path or "image"), style="bold cyan")]
    lines += [Padding(table, (0, 0, 0, 2))]
    lines += [Text(f"  {_summary(answer)}", style="dim")]
    lines += [Text(f"  note: {printable(note)}", style="dim") for note in answer.notes]
    return Group(*lines)


def answer_line(answer: Answer) -> str:
    """Return the shortest form: path, label and probability, separated by tabs."""
    best = answer.top[0]
    return f"{printable(answer.path or 'image')}\t{printable(best.label)}\t{best.probability:.4f}"


def answer_record(answer: Answer, classifier: Classifier) -> dict[str, Any]:
    """Return what `--json` prints for one answer: see schemas/classify.json."""
    record = answer.adaptation
    return {
        "path": str(answer.path) if answer.path is not None else None,
        "teacher": {
            "name": classifier.teacher.name,
            "identity": classifier.teacher.identity,
            "fallback": classifier.fell_back,
            "notes": list(classifier.teacher.notes),
        },
        "labels": {"source": classifier.label_source, "count": len(classifier.head.labels)},
        "prompts": {"source": classifier.prompt_source, "count": len(classifier.head.templates)},
        "top": _ranking(answer.top),
        "teacher_top": _ranking(answer.teacher_top),
        "agree": answer.agree,
        "adaptation": None
        if record is None
        else {
            "preset": classifier.preset,
            "readout": classifier.student_config.readout,
            "distil": classifier.adapt_config.distil,
            "rgb_weight": classifier.adapt_config.rgb_weight,
            "queries": classifier.adapt_config.queries,
            "lr": classifier.adapt_config.lr,
            "seed": classifier.adapt_config.seed,
            "device": str(classifier.device),
            "precision": record.precision,
            "steps": record.steps,
            "first_loss": _finite(record.first_loss),
            "last_loss": _finite(record.last_loss),
            "cosine": _finite(record.cosine),
            "losses": [_finite(loss) for loss in record.losses],
            "cosines": [_finite(cosine) for cosine in record.cosines],
            "seconds": record.seconds,
        },
        "notes": list(answer.notes),
        "error": answer.error,
    }


def _percent(prediction: Prediction) -> str:
    return f"{prediction.probability:6.1%}"


def _summary(answer: Answer) -> str:
    record = answer.adaptation
    if record is None:
        return "no adaptation"
    agreement = "agree" if answer.agree else "DISAGREE"
    return (
        f"{agreement} · {record.steps} steps · loss {record.first_loss:.2e} → {record.last_loss:.2e} · "
        f"cosine {record.cosine:.4f} · {record.seconds:.1f} s"
    )


def _ranking(predictions: tuple[Prediction, ...]) -> list[dict[str, Any]]:
    return [{"label": one.label, "probability": one.probability} for one in predictions]


def _finite(value: float) -> float | None:
    """JSON knows no NaN and no infinity."""
    return value if math.isfinite(value) else None
