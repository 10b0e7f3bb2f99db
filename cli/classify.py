"""`apm classify`: its options, and what is checked before anything is loaded."""

# ruff: noqa: RUF009  (`setting` makes fields)
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apm.errors import UsageError
from apm.images.paths import printable
from apm.labels import (
    LABEL_SET_NAMES,
    PROMPT_NAMES,
    check_templates,
    check_words,
    parse_labels,
    read_labels_file,
)
from apm.settings import setting
from apm.startup import collector_paused
from apm.test_time.options import StudentOptions

from . import render
from .answer_file import check_out
from .answering import Answering, Form, Inputs, interrupted
from .options import Debug, options_of, pixel_limit, student_options
from .progress import counted

if TYPE_CHECKING:
    from apm.classifier import Classifier

STUDENT, SOURCE, OUTPUT = "The student", "Labels and teacher", "Output"
SPELLED = {
    "as_json": "--json",
    "quiet": "--quiet -q",
    "out": "FILE",
    "explain": "DIR",
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """The teacher, the labels and the prompts."""

    teacher: str | None = setting(
        None,
        'A name that "apm teachers" lists, NAME/TAG of open_clip, hf-hub:ORG/REPO or local-dir:PATH. '
        "Default: ViT-B-16/openai, or the embedded one if its weights are not available.",
    )
    labels: str | None = setting(None, 'Class names to choose from: "cat,dog".')
    labels_file: Path | None = setting(None, "Class names from a text file, one per line.")
    label_set: str | None = setting(
        None,
        f"A built-in set of class names: {', '.join(LABEL_SET_NAMES)}. Default: the teacher's own, else imagenet.",
    )
    prompts: str | None = setting(
        None,
        f"Prompt templates for the class names: {', '.join(PROMPT_NAMES)} (1, 7, 80 of them). "
        "Default: the teacher's own, else single.",
    )
    template: list[str] | None = setting(None, 'A prompt template of your own: "a sketch of a {}."; repeatable.')

    def names(self) -> tuple[str, ...] | None:
        """The labels given, or None where they are the teacher's or of a set; all that is given is checked."""
        named = {"--labels": self.labels, "--labels-file": self.labels_file, "--label-set": self.label_set}
        given = [option for option, value in named.items() if value is not None]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} exclude each other; give one of them.")
        if self.prompts is not None and self.template:
            raise UsageError("--prompts and --template exclude each other; give one of them.")
        check_words(None, self.label_set, self.prompts, None)
        if self.template:
            check_templates(self.template)
        if self.labels is not None:
            return parse_labels(self.labels)
        return None if self.labels_file is None else read_labels_file(self.labels_file)


@student_options(
    STUDENT,
    notes={
        "distil": "; both with --explain",
        "precision": "; fp32 with --explain",
        "grid_views": "; 16 with --explain",
    },
)
@options_of(Source, "source", SOURCE)
@options_of(Form, "form", OUTPUT, spelled=SPELLED)
def classify(
    paths: Annotated[
        list[str],
        typer.Argument(help="Files, folders, patterns, or - to read paths from stdin, one per line.", metavar="PATH"),
    ],
    source: Source,
    *,
    student: dict[str, Any],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=STUDENT)] = "auto",
    batch_size: Annotated[
        str,
        typer.Option(
            help="Images adapted at the same time: a number or auto. Answers do not depend on it.",
            rich_help_panel=STUDENT,
        ),
    ] = "auto",
    form: Form,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            help="Refuse larger images (width × height). Default: 89478485. Decoding takes 8 bytes a pixel, some "
            "formats up to 24; all threads together 683 MiB, or what one larger image takes.",
            callback=pixel_limit,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Classify photographs, adapting a new student to each of them.

    A frozen teacher maps a photograph to one token. A small student starts from random weights and is overfit to that
    token, and both name the label that fits best. Nothing is carried over from one photograph to the next.

    Exit code: 0 all answered, 1 some could not be (each is named on stderr), 2 wrong usage.
    """
    names = source.names()
    size = _batch_size(batch_size)
    chosen = [] if form.explain is None else _fill_for_maps(student, form.explain)
    if form.out is not None:
        check_out(form.out)
    inputs = Inputs(paths)
    inputs.name_problems(form)
    try:
        classifier = load_classifier(
            source, names, student, form, device=device, batch_size=size, max_pixels=max_pixels
        )
    except KeyboardInterrupt:
        raise interrupted(0, inputs.total, form) from None
    for note in _notes(classifier, quiet=form.quiet, chosen=chosen):
        render.notice(note)
    render.notice_if_slow(classifier.student.precision, classifier.device)
    Answering(classifier, inputs, form).run()


def load_classifier(
    source: Source,
    names: tuple[str, ...] | None,
    student: dict[str, Any],
    form: Form,
    *,
    device: str,
    batch_size: int | None,
    max_pixels: int | None,
) -> Classifier:
    """Load the teacher and encode the labels, showing progress."""
    if source.teacher is not None:
        from apm.teachers import check_teacher

        check_teacher(source.teacher)  # before the imports below, which take seconds

    with collector_paused():
        from apm.classifier import Classifier
        from apm.images.load import MAX_PIXELS

    with counted("encoding labels", wanted=not form.quiet) as encoded:
        return Classifier(
            source.teacher,
            labels=names,
            label_set=source.label_set,
            prompts=source.prompts,
            templates=source.template or None,
            student=StudentOptions(**student),
            device=device,
            batch_size=batch_size,
            top_k=form.top_k,
            min_probability=form.min_probability,
            max_pixels=MAX_PIXELS if max_pixels is None else max_pixels,
            progress=encoded,
        )


def _notes(classifier: Classifier, *, quiet: bool, chosen: list[str]) -> Iterator[str]:
    """What the user should know before the first answer."""
    if not quiet or classifier.fell_back:  # that another teacher answers must be known in any case
        yield from classifier.teacher.notes
    if classifier.fell_back and classifier.label_source == "teacher":
        yield (
            "The embedded teacher knows few things and, without --labels, guesses wildly: it may call a cat a French"
            ' horn. Say what may be in the photographs: --labels "cat,dog,horse".'
        )
    if quiet:
        return
    if classifier.student.readout is None and classifier.student.distil == "grid":
        yield "--distil grid trains no object query, so the token is read as the field's mean (--readout mean)."
    if chosen:
        yield f"--explain uses {', '.join(chosen)}, which the maps need; values that you give take precedence."


def _fill_for_maps(student: dict[str, Any], folder: Path) -> list[str]:
    """Check what --explain needs before anything is loaded; fill in the rest, and return what was filled in."""
    from apm.test_time.label_maps import LR, STEPS, VIEWS

    if student.get("distil") == "cls":
        raise UsageError("--explain needs a target with information about locations: --distil both or grid, not cls.")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--explain {printable(folder)} is a file; it must be a folder or a new name.")
    # bfloat16 steps would leave their rounding in the field
    needed: dict[str, Any] = {"steps": STEPS, "lr": LR, "distil": "both", "precision": "fp32"}
    if "queries" not in student:
        needed["grid_views"] = VIEWS
    filled = {name: value for name, value in needed.items() if name not in student}
    student.update(filled)
    return [f"--{name.replace('_', '-')} {value}" for name, value in filled.items()]


def _batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f'--batch-size is "{text}"; it must be a number of 1 or more, or auto.')
    return int(text)
