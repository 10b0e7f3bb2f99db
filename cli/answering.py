"""From paths to printed and written answers, one by one and in order: the loop of `apm classify`."""

# ruff: noqa: RUF009  (`setting` makes fields)
from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from apm.errors import ImageError, UsageError
from apm.images.paths import expand_paths, file_problem, printable
from apm.settings import at_least, between, check_values, setting

from . import render
from .answer_file import AnswerFile, Fingerprint, answer_settings, fingerprint
from .options import flag
from .progress import progress

if TYPE_CHECKING:
    from apm.classifier import Answer, Classifier


@dataclass(frozen=True, kw_only=True)
class Form:
    """How answers are shown, and where they are written.

    Raises:
        UsageError: a value that cannot work.
    """

    top_k: int = setting(5, "Number of labels to show.", check=at_least(1))
    min_probability: float = setting(
        0.0, 'Mark answers as "unsure" if the best label is less probable than this, 0 to 1.', check=between(0, 1)
    )
    as_json: bool = setting(False, "Print one JSON line per image and nothing else.")
    steps_detail: bool = setting(False, "Add loss and cosine of every step to the JSON.")
    quiet: bool = setting(False, "Print only path, label and probability, separated by tabs.")
    out: Path | None = setting(
        None,
        "Write the answers to this file (.jsonl or .csv) as they come; they are printed only with --json or --quiet. "
        "Run the same command again to continue.",
    )
    explain: Path | None = setting(
        None, "Write a map of the best labels for each image into this folder, with its arrays (.npz)."
    )
    explain_size: int = setting(112, "Side of the maps of --explain, in locations.", check=between(1, 2048))

    def __post_init__(self) -> None:
        """Check each value."""
        check_values(self, flag)


def paths_of(arguments: Sequence[str]) -> Iterable[Path]:
    """The paths that the arguments stand for; for ``-`` they are read from stdin, one per line, as they are needed.

    Raises:
        UsageError: an argument is empty, or paths are to come on stdin and it is closed.
    """
    if "-" in arguments and sys.stdin is None:
        raise UsageError("Paths were to be read from stdin, but it is closed.")
    return expand_paths(arguments, sys.stdin.buffer if "-" in arguments else ())


class Inputs:
    """The files to look at. Those that cannot be read at all are named at once, before anything is loaded.

    Args:
        arguments: as `apm.images.paths.expand_paths` takes them.

    Raises:
        UsageError: as `paths_of`.
    """

    def __init__(self, arguments: list[str]) -> None:
        self.paths: Iterable[Path] = paths_of(arguments)
        self.total: int | None = None
        self.problems: dict[Path, str] = {}
        if "-" not in arguments:  # input from a pipe is not waited for just to check it
            known = list(self.paths)
            self.paths, self.total = known, len(known)
            told = {path: problem for path in known if (problem := file_problem(path)) is not None}
            self.problems = {path: f"{printable(path)}: {problem}" for path, problem in told.items()}

    def name_problems(
        self,
        form: Form,
        *,
        doing: str = "classify",
        failed: Callable[[Path, str], dict[str, Any]] = render.failure_record,
    ) -> None:
        """Name on stderr what cannot be read; exit if nothing else was given.

        Args:
            form: how results are shown.
            doing: the verb for what was to be done.
            failed: a path and what is wrong → its record for ``--json``.
        """
        for problem in self.problems.values():
            render.failure(problem)
        if self.total is None or not self.problems or any(path not in self.problems for path in self.paths):
            return
        if form.as_json:
            for path in self.paths:
                render.say_json(json.dumps(failed(path, self.problems[path])))
        if self.total > 1:
            render.notice(f"nothing is left to {doing}.")
        raise typer.Exit(1)


def interrupted(done: int, total: int | None, form: Form) -> typer.Exit:
    """Say how far it got before Ctrl-C; returns what to raise."""
    of = "" if total is None else f" of {total}"
    again = "" if form.out is None else " The same command goes on from there."
    typer.echo(f"interrupted: {done}{of} images answered.{again}", err=True)
    return typer.Exit(render.INTERRUPTED)


class Answering:
    """Answers the inputs with one classifier, counting as it goes."""

    def __init__(self, classifier: Classifier, inputs: Inputs, form: Form) -> None:
        self._classifier, self._inputs, self._form = classifier, inputs, form
        self._console = render.data_console()
        self._heading = f"teacher {classifier.teacher.name}{' (fallback)' if classifier.fell_back else ''}"
        self._prints = form.out is None or form.as_json or form.quiet
        self._file: AnswerFile | None = None
        self._fingerprints: deque[Fingerprint | None] = deque()  # of the images in flight, in order
        self.done = self.failed = 0

    def run(self) -> None:
        """Answer everything.

        Raises:
            UsageError: there was no input, `Form.out` holds answers of other settings, or another process writes to it.
            typer.Exit: with 1 where some input has no answer, with 130 after Ctrl-C.
        """
        form, inputs = self._form, self._inputs
        if form.out is not None:
            settings = answer_settings(self._classifier, steps_detail=form.steps_detail)
            self._file = AnswerFile(form.out, settings)
        paths, total = inputs.paths, inputs.total
        if self._file is not None and total is not None:
            paths = [path for path in dict.fromkeys(paths) if not self._file.holds(path)]
            total = len(paths)
        try:
            with progress(total, wanted=not form.quiet, doing="classify") as counted:
                for answer in self._answers(self._watched(paths)):
                    counted(lambda answer=answer: self._show(answer))  # type: ignore[misc]
        except KeyboardInterrupt:
            raise interrupted(self.done, total, form) from None
        finally:
            if self._file is not None:
                self._file.close()
        if self._file is not None and not form.quiet:
            earlier = f", {self._file.earlier} of them from before" if self._file.earlier else ""
            count = self._file.earlier + self.done - self.failed
            words = "answer is" if count == 1 else "answers are"
            render.notice(f"{count} {words} in {printable(self._file.path)}{earlier}.")
        if self.done == 0 and inputs.total is None and (self._file is None or not self._file.earlier):
            raise UsageError("Stdin held no path.")
        if self.failed:
            raise typer.Exit(1)

    def _watched(self, paths: Iterable[Path]) -> Iterator[Path]:
        """The paths that are not answered yet; each file's size and time are noted before it is read."""
        begun: set[Path] = set()  # stdin may name a file twice before it is answered
        for path in paths:
            if self._file is not None:
                if path in begun or self._file.holds(path):
                    continue
                begun.add(path)
            self._fingerprints.append(fingerprint(path))
            yield path

    def _answers(self, paths: Iterable[Path]) -> Iterator[Answer]:
        if self._form.explain is None:
            return self._classifier.classify(paths)
        return _explained(self._classifier, paths, self._form.explain, self._form.explain_size)

    def _show(self, answer: Answer) -> None:
        form = self._form
        found = self._fingerprints.popleft()
        record = render.answer_record(answer, self._classifier, file=found, steps_detail=form.steps_detail)
        if self._file is not None:
            self._file.write(record)
        if form.as_json:
            render.say_json(json.dumps(record, allow_nan=False))
        elif answer.error is None and form.quiet:
            render.say(render.answer_line(answer))
        elif answer.error is None and self._prints:
            self._console.print(render.answer_view(answer, teacher=self._heading))
        sys.stdout.flush()
        if answer.error is not None and answer.path not in self._inputs.problems:
            render.failure(answer.error)
        self.done += 1
        self.failed += answer.error is not None


def _explained(classifier: Classifier, paths: Iterable[Path], folder: Path, size: int) -> Iterator[Answer]:
    """Yield the answers, each after its picture and arrays are on disk."""
    from apm.classifier import Answer
    from apm.figures.label_maps import write_explanation

    for path in paths:
        try:
            perception = classifier.classify_with_field(path)
        except ImageError as error:
            yield Answer(path=path, error=str(error))
            continue
        write_explanation(perception, classifier, folder, size=size)
        yield perception.answer
