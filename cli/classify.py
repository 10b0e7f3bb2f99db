"""`apm classify`: files in, answers out, one by one and in order."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apm.errors import ImageError, UsageError
from apm.labels import LABEL_SET_NAMES, PROMPT_NAMES, parse_labels, read_labels_file
from apm.paths import expand_paths, printable

from . import render
from .options import Debug

if TYPE_CHECKING:
    from apm.classifier import Answer, Classifier

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
    distil: Annotated[
        str | None,
        typer.Option(
            help="What the student is overfit to: cls (the teacher's token), grid (its patch features) or both. "
            "Default: cls; both with --explain.",
            rich_help_panel=STUDENT,
        ),
    ] = None,
    rgb_weight: Annotated[
        float, typer.Option(help="Of a loss towards the image's own colours, added to it.", rich_help_panel=STUDENT)
    ] = 0.0,
    queries: Annotated[
        int | None,
        typer.Option(
            help="Locations drawn afresh for each step, an approximation. Default: all of them.",
            rich_help_panel=STUDENT,
        ),
    ] = None,
    readout: Annotated[
        str | None,
        typer.Option(
            help="query (the object query) or mean. Default: query; mean with --distil grid.", rich_help_panel=STUDENT
        ),
    ] = None,
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
    explain: Annotated[
        Path | None,
        typer.Option(
            help="Folder for a picture of where the best labels are, one an image, with its arrays (.npz).",
            rich_help_panel=OUTPUT,
            metavar="DIR",
        ),
    ] = None,
    explain_size: Annotated[
        int, typer.Option(help="Places a side at which --explain asks the field.", rich_help_panel=OUTPUT)
    ] = 112,
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
    chosen: list[str] = []
    if explain is not None:
        steps, lr, distil, chosen = _for_maps(explain, explain_size, steps, lr, distil)
    distil = distil or "cls"
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
        distil=distil,
        rgb_weight=rgb_weight,
        queries=queries,
        top_k=top_k,
        max_pixels=MAX_PIXELS if max_pixels is None else max_pixels,
    )
    if not quiet or classifier.fell_back:  # that another teacher answers must be known in any case
        for note in classifier.teacher.notes:
            render.notice(note)
    render.notice_if_slow(precision, classifier.device)
    if readout is None and distil == "grid" and not quiet:
        render.notice(
            "--distil grid trains no object query, so the token is read as the field's mean (--readout mean)."
        )
    if chosen and not quiet:
        render.notice(f"--explain takes {', '.join(chosen)}: the maps need them. Your own values go before.")
    _print_answers(classifier, paths, as_json=as_json, quiet=quiet, explain=explain, explain_size=explain_size)


def _for_maps(
    folder: Path, size: int, steps: int | None, lr: float | None, distil: str | None
) -> tuple[int, float, str, list[str]]:
    """Check what --explain needs before anything is loaded; fill in steps, lr, distil, and say what was filled in."""
    from apm.benchmarks.figures import require_matplotlib
    from apm.explain import LR, STEPS

    require_matplotlib("Pictures of --explain")
    if size < 1:
        raise UsageError(f"--explain-size is {size}; it must be at least 1.")
    if distil == "cls":
        raise UsageError("--explain needs a target that says what is where: --distil both, or grid, not cls.")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--explain {printable(folder)} is a file; it must be a folder, or a name that is free.")
    filled = (("--steps", steps, STEPS), ("--lr", lr, LR), ("--distil", distil, "both"))
    told = [f"{name} {default}" for name, given, default in filled if given is None]
    return steps or STEPS, LR if lr is None else lr, distil or "both", told


def _explained(classifier: Classifier, paths: Iterable[Path], folder: Path, size: int) -> Iterator[Answer]:
    """Yield the answers, each after its picture and arrays are on disk."""
    from apm.benchmarks.explain_figures import write_explanation
    from apm.classifier import Answer

    for path in paths:
        try:
            perception = classifier.perceive(path)
        except ImageError as error:
            yield Answer(path=path, error=str(error))
            continue
        write_explanation(perception, classifier, folder, size=size)
        yield perception.answer


def _print_answers(
    classifier: Classifier,
    arguments: list[str],
    *,
    as_json: bool,
    quiet: bool,
    explain: Path | None,
    explain_size: int,
) -> None:
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
            answers = (
                classifier.classify(paths) if explain is None else _explained(classifier, paths, explain, explain_size)
            )
            for answer in answers:
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
