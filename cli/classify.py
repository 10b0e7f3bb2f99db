"""`apm classify`: files in, answers out, one by one and in order."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apm.errors import UsageError
from apm.labels import LABEL_SET_NAMES, PROMPT_NAMES, parse_labels, read_labels_file
from apm.paths import expand_paths

from . import render
from .options import Debug

if TYPE_CHECKING:
    from apm.classifier import Classifier

STUDENT, SOURCE, OUTPUT = "The student", "Labels and teacher", "Output"


def classify(
    paths: Annotated[
        list[str],
        typer.Argument(help="Files, folders, patterns, or - for paths on stdin, one a line.", metavar="PATH"),
    ],
    teacher: Annotated[
        str | None,
        typer.Option(
            help='A name that "apm teachers" lists, NAME/TAG of open_clip, hf-hub:ORG/REPO or local-dir:PATH. '
            "Default: ViT-B-16/openai, or the embedded one when its weights cannot be had.",
            rich_help_panel=SOURCE,
        ),
    ] = None,
    labels: Annotated[str | None, typer.Option(help='Names to choose from: "cat,dog".', rich_help_panel=SOURCE)] = None,
    labels_file: Annotated[
        Path | None, typer.Option(help="The same from a file, a name a line.", rich_help_panel=SOURCE)
    ] = None,
    label_set: Annotated[
        str | None,
        typer.Option(
            help=f"A known set of names: {', '.join(LABEL_SET_NAMES)}. Default: the teacher's own, else imagenet.",
            rich_help_panel=SOURCE,
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help=f"Prompts around each name: {', '.join(PROMPT_NAMES)} (1, 7, 80). "
            "Default: the teacher's own, else single.",
            rich_help_panel=SOURCE,
        ),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(help='Your own prompt, "a sketch of a {}."; may be repeated.', rich_help_panel=SOURCE),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimisation steps for each image. Default: 50.", rich_help_panel=STUDENT)
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate of Adam. Default: 0.0001.", rich_help_panel=STUDENT)
    ] = None,
    preset: Annotated[str, typer.Option(help="Size: paper or small.", rich_help_panel=STUDENT)] = "paper",
    readout: Annotated[str, typer.Option(help="query (the object query) or mean.", rich_help_panel=STUDENT)] = "query",
    precision: Annotated[
        str, typer.Option(help="Of the matrix products: auto, fp32 or bf16.", rich_help_panel=STUDENT)
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=STUDENT)] = "auto",
    batch_size: Annotated[
        str,
        typer.Option(help="Images adapted side by side: a number or auto. Changes no answer.", rich_help_panel=STUDENT),
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of the student's first weights.", rich_help_panel=STUDENT)] = 0,
    top_k: Annotated[int, typer.Option(help="How many labels to show.", rich_help_panel=OUTPUT)] = 5,
    max_pixels: Annotated[
        int | None,
        typer.Option(help="Refuse larger images (width × height). Default: 89478485.", rich_help_panel=OUTPUT),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON line an image, and nothing else on stdout.", rich_help_panel=OUTPUT)
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", help="Only path, label and probability, tab-separated.", rich_help_panel=OUTPUT),
    ] = False,
    debug: Debug = False,
) -> None:
    """Say what is on photographs, adapting a fresh student to each of them.

    A frozen teacher maps a photograph to one token, a small student is drawn anew and overfit to that token, and both
    say which label fits best. Nothing is kept from one photograph to the next.

    Exit code: 0 all answered, 1 some could not be (each is named on stderr), 2 wrong usage.
    """
    names = _labels(labels, labels_file, label_set)
    if prompts is not None and template:
        raise UsageError("--prompts and --template exclude each other; give one of them.")
    size = _batch_size(batch_size)
    if teacher is not None:
        from apm.teachers import check_teacher

        check_teacher(teacher)  # before the imports below, which take seconds

    from apm.classifier import Classifier
    from apm.images import MAX_PIXELS

    classifier = Classifier(
        teacher,
        labels=names,
        label_set=label_set,
        prompts=prompts,
        templates=template or None,
        preset=preset,
        readout=readout,
        steps=steps,
        lr=lr,
        precision=precision,
        device=device,
        batch_size=size,
        seed=seed,
        top_k=top_k,
        max_pixels=MAX_PIXELS if max_pixels is None else max_pixels,
    )
    if not quiet or classifier.fell_back:  # that another teacher answers must be known in any case
        for note in classifier.teacher.notes:
            render.notice(note)
    _print_answers(classifier, paths, as_json=as_json, quiet=quiet)


def _print_answers(classifier: Classifier, arguments: list[str], *, as_json: bool, quiet: bool) -> None:
    if "-" in arguments and sys.stdin is None:
        raise UsageError("Paths were to come on stdin, and it is closed.")
    paths = expand_paths(arguments, sys.stdin.buffer if "-" in arguments else ())
    total = None
    if "-" not in arguments:  # what comes by a pipe is not waited for, only to count it
        known = list(paths)
        paths, total = iter(known), len(known)
    heading = f"teacher {classifier.teacher.name}{' (fallback)' if classifier.fell_back else ''}"
    console = render.data_console()
    count = failed = 0
    try:
        with render.progress_on_terminal(total, wanted=not quiet and total != 1) as progress:
            for answer in classifier.classify(paths):
                with render.above(progress):
                    if as_json:
                        typer.echo(json.dumps(render.answer_record(answer, classifier), allow_nan=False))
                    elif answer.error is None and quiet:
                        typer.echo(render.answer_line(answer))
                    elif answer.error is None:
                        console.print(render.answer_view(answer, teacher=heading))
                    sys.stdout.flush()
                    if answer.error is not None:
                        render.failure(answer.error)
                count += 1
                failed += answer.error is not None
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from None
    if count == 0:
        raise UsageError("No path came in on stdin.")
    if failed:
        raise typer.Exit(1)


def _labels(labels: str | None, labels_file: Path | None, label_set: str | None) -> tuple[str, ...] | None:
    given = [
        option
        for option, value in (("--labels", labels), ("--labels-file", labels_file), ("--label-set", label_set))
        if value is not None
    ]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other; give one of them.")
    if labels is not None:
        return parse_labels(labels)
    return None if labels_file is None else read_labels_file(labels_file)


def _batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f'--batch-size is "{text}"; it must be a number from 1 on, or auto.')
    return int(text)
