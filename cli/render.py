"""How answers look: to people (rich), and to programs (records of the documented schema)."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import typer

from apm.images.paths import printable
from apm.settings import settings_of
from apm.test_time.options import StudentOptions

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from PIL import Image
    from rich.console import Console
    from rich.progress import Progress
    from rich.text import Text

    from apm.classifier import Adaptation, Answer, Classifier, Prediction
    from apm.student.config import Precision

INTERRUPTED = 130
"""Exit code after Ctrl-C."""
PLAIN_WIDTH = 120  # of output that goes to a file or a pipe, where no terminal gives a width


def clean(text: str) -> str:
    """Make text that may contain file names, prompts and records of others safe for any terminal.

    Control characters and those that change the direction of writing are escaped; line ends and tabs are kept.
    """
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))


def say(text: str, *, end: str = "\n") -> None:
    """Print data on stdout. Every command prints by this or `say_json`, and on stderr by the functions below."""
    typer.echo(clean(text) + end, nl=False)


def say_json(text: str, *, end: str = "\n") -> None:
    """Print JSON on stdout, with JSON's own escapes for characters that are not printable."""
    typer.echo("".join(c if c.isprintable() or c == "\n" else _json_escape(c) for c in text) + end, nl=False)


def _json_escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[start : start + 4]}" for start in range(0, len(units), 4))


def progress_line(text: str) -> None:
    """Print a line of progress on stderr, where there is no bar."""
    typer.echo(printable(text), err=True)


@contextmanager
def told_when_interrupted(text: str | Callable[[], str], *, speaks: bool = True) -> Iterator[None]:
    """On Ctrl-C say what has been done and how to go on, and exit.

    Args:
        text: the message, or a function that returns it.
        speaks: False leaves it to another process: `torchrun` interrupts them all.
    """
    try:
        yield
    except KeyboardInterrupt:
        if speaks:
            progress_line(text if isinstance(text, str) else text())
        raise typer.Exit(INTERRUPTED) from None


def notice(text: str) -> None:
    """Say one line on stderr."""
    typer.echo(f"note: {printable(' '.join(text.split()))}", err=True)


def read_image(path: Path, max_pixels: int | None) -> Image.Image:
    """Read a photograph of at most so many pixels (None: the default limit), and print the notes on the file."""
    from apm.images.load import MAX_PIXELS, load_image

    loaded = load_image(path, max_pixels=MAX_PIXELS if max_pixels is None else max_pixels)
    for note in loaded.notes:
        notice(note)
    return loaded.image


def say_files(files: Iterable[Path]) -> None:
    """Name the files that were written, a line each."""
    for file in files:
        say(str(file))


def notice_if_slow(precision: str, device: torch.device) -> None:
    """Print a note, with --quiet too, if the precision asked for is the slower one."""
    from apm.student.matmul import slowness

    if text := slowness(cast("Precision", precision), device):
        notice(text)


def failure(text: str) -> None:
    """Name one failed input on stderr."""
    typer.echo(f"error: {printable(' '.join(text.splitlines()))}", err=True)  # a name may contain runs of blanks


def warning(text: str) -> None:
    """Print on stderr what must not be overlooked."""
    typer.secho(f"WARNING: {printable(' '.join(text.splitlines()))}", err=True, bold=True, fg="red")


def data_console() -> Console:
    """Return the console for stdout; its lines are wide and plain where stdout is no terminal."""
    from rich.console import Console

    class DataConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would end the program as if an input had failed

    console = DataConsole(highlight=False, soft_wrap=True)
    return console if console.is_terminal else DataConsole(highlight=False, soft_wrap=True, width=PLAIN_WIDTH)


def on_terminal() -> bool:
    """Whether stderr is a terminal; it may be closed."""
    return sys.stderr is not None and sys.stderr.isatty()


@contextmanager
def progress_on_terminal(total: int | None, *, wanted: bool, doing: str) -> Iterator[Progress | None]:
    """Show a bar on stderr when that is a terminal; yields None where there is to be none.

    Args:
        total: number of items, or None when it is not known.
        wanted: False shows none in any case.
        doing: the word before the bar.
    """
    if not wanted or not on_terminal():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
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


def answer_view(answer: Answer, *, teacher: str) -> Text:
    """Lay out one answer: both rankings side by side, and a line on the adaptation."""
    from rich.cells import cell_len
    from rich.text import Text

    rows = [("student", " " * 6, teacher, "")]
    for one, other in zip(answer.top, answer.teacher_top, strict=True):
        rows.append((printable(one.label), _percent(one), printable(other.label), _percent(other)))
    first, second = (max(cell_len(row[column]) for row in rows) for column in (0, 2))
    view = Text()
    view.append(printable(answer.path or "image"), style="bold cyan")
    for mine, share, theirs, others in rows:
        view.append(f"\n  {mine}", style="bold")
        gap, other_gap = " " * (first - cell_len(mine) + 2), " " * (second - cell_len(theirs) + 2)
        view.append(f"{gap}{share}  {theirs}{other_gap}{others}".rstrip())
    view.append(f"\n  {_summary(answer)}", style="dim")
    for note in answer.notes:
        view.append(f"\n  note: {printable(note)}", style="dim")
    return view


def answer_line(answer: Answer) -> str:
    """Return the shortest form: path, label and probability, separated by tabs, and "unsure" where it is."""
    best = answer.top[0]
    mark = "\tunsure" if answer.unsure else ""
    return f"{printable(answer.path or 'image')}\t{printable(best.label)}\t{best.probability:.4f}{mark}"


def answer_record(
    answer: Answer, classifier: Classifier, *, file: tuple[int, int] | None = None, steps_detail: bool = False
) -> dict[str, Any]:
    """Return what `--json` prints for one answer: see schemas/classify.json.

    Args:
        answer: the answer.
        classifier: whose answer it is.
        file: the image's size in bytes and the time of its last change in nanoseconds.
        steps_detail: add loss and cosine before each step.
    """
    return {
        "path": str(answer.path) if answer.path is not None else None,
        "file": None if file is None else {"bytes": file[0], "modified_ns": file[1]},
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
        "unsure": answer.unsure if answer.error is None else None,
        "adaptation": _adaptation(answer.adaptation, classifier, steps_detail=steps_detail),
        "notes": list(answer.notes),
        "error": answer.error,
    }


def failure_record(path: Path, error: str) -> dict[str, Any]:
    """Return the record of an input that failed before any teacher was loaded."""
    nothing = ("file", "teacher", "labels", "prompts", "agree", "unsure", "adaptation")
    return {
        "path": str(path),
        **dict.fromkeys(nothing),
        "top": [],
        "teacher_top": [],
        "notes": [],
        "error": error,
    }


def _adaptation(record: Adaptation | None, classifier: Classifier, *, steps_detail: bool) -> dict[str, Any] | None:
    if record is None:
        return None
    told = {
        **_student(classifier),
        "device": str(classifier.device),
        "precision": record.precision,
        "steps": record.steps,
        "first_loss": _finite(record.first_loss),
        "last_loss": _finite(record.last_loss),
        "cosine": _finite(record.cosine),
        "seconds": record.seconds,
    }
    if steps_detail:
        told["losses"] = [_finite(loss) for loss in record.losses]
        told["cosines"] = [_finite(cosine) for cosine in record.cosines]
    return told


def _student(classifier: Classifier) -> dict[str, Any]:
    """The student's settings that have an option, as they are used."""
    record = classifier.student.record(classifier.device)
    return {name: record[name] for name, one in settings_of(StudentOptions).items() if one.option}


def _percent(prediction: Prediction) -> str:
    return f"{prediction.probability:6.1%}"


def _summary(answer: Answer) -> str:
    record = answer.adaptation
    if record is None:
        return "no adaptation"
    agreement = ("UNSURE · " if answer.unsure else "") + ("agree" if answer.agree else "DISAGREE")
    return (
        f"{agreement} · {record.steps} steps · loss {record.first_loss:.2e} → {record.last_loss:.2e} · "
        f"cosine {record.cosine:.4f} · {record.seconds:.1f} s"
    )


def _ranking(predictions: tuple[Prediction, ...]) -> list[dict[str, Any]]:
    return [{"label": one.label, "probability": one.probability} for one in predictions]


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None
