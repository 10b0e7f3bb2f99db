"""`apm bench`: methods on data sets, into a run folder that can be continued, and a table at the end."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apm.errors import UsageError
from apm.images.paths import printable
from apm.labels import PROMPT_NAMES
from apm.test_time.options import StudentOptions, settings_of
from apm.test_time.queries import ALL

from .options import Debug, student_options
from .progress import counted
from .render import failure, notice, notice_if_slow, progress_line, progress_on_terminal, say, say_json, warning
from .table import print_table, show

if TYPE_CHECKING:
    from apm.benchmarks.runs.runner import Progress, Summary
    from apm.processes import Group
    from apm.teachers.base import Teacher

DATA, METHOD, RUN, OUTPUT = "Data", "Methods", "The run", "Output"
INTERRUPTED = 130
_LINE_EVERY = 30.0  # seconds between lines of progress where stderr is no terminal


@student_options(METHOD, prefix="apm: ", defaults={"queries": ALL})
def bench(
    datasets: Annotated[
        list[str] | None,
        typer.Argument(metavar="DATASET…", help="Data sets, or the suites natural-shifts and cross-dataset."),
    ] = None,
    list_: Annotated[
        bool, typer.Option("--list", help="List the data sets, and which are under the root.", rich_help_panel=DATA)
    ] = False,
    root: Annotated[
        Path | None,
        typer.Option(
            help="Folder that contains the data sets, or a data set's own folder. Default: APM_DATA.",
            rich_help_panel=DATA,
        ),
    ] = None,
    corruption: Annotated[
        list[str] | None,
        typer.Option(
            help="A corruption of ImageNet-C, clean, or all (the 15). Repeat for several. imagenet-c reads its files; "
            "for other data sets the pictures are corrupted as they are read.",
            rich_help_panel=DATA,
        ),
    ] = None,
    level: Annotated[
        list[int] | None, typer.Option(help="Severity, 1 to 5. Repeat for several. Default: 5.", rich_help_panel=DATA)
    ] = None,
    from_clean: Annotated[
        bool,
        typer.Option(
            "--from-clean",
            help="Make imagenet-c from the clean ImageNet under the root instead of reading its files.",
            rich_help_panel=DATA,
        ),
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(
            help="Use only this many images, drawn evenly from the classes by the seed.", rich_help_panel=DATA
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(help="hf:REPO[:SPLIT]: stream the data set from the Hugging Face hub.", rich_help_panel=DATA),
    ] = None,
    label_set: Annotated[
        str | None,
        typer.Option(help="For the data set folder: classify among all labels of this set.", rich_help_panel=DATA),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="zero-shot, tpt, ctpt, rtpt, rlcf, dynaprompt, coop, cocoop, tpt+coop, tpt+cocoop, mta, zero, tps, "
            "tda, boostadapter, dmn, dpe, dota, onzeta, ecalp, oga, ttl, tent, clipartt, watt or apm, with its own "
            "settings as tpt:steps=2; repeatable. Default: zero-shot and apm.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help=f"apm: {settings_of(StudentOptions)['target'].help} Repeatable. Default: {StudentOptions.target}.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    views: Annotated[
        int | None,
        typer.Option(help="Number of augmented views, for every method that uses them.", rich_help_panel=METHOD),
    ] = None,
    *,
    student: dict[str, Any],
    record_steps: Annotated[
        bool,
        typer.Option("--record-steps", help="apm: record the prediction after each step.", rich_help_panel=METHOD),
    ] = False,
    record_logits: Annotated[
        bool,
        typer.Option("--record-logits", help="Record every class's logit, for apm compare.", rich_help_panel=METHOD),
    ] = False,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="As for apm classify. Default: ViT-B-16/openai, or embedded when it cannot be had.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help=f"Prompt templates: {', '.join(PROMPT_NAMES)} (1, 7, 80). Default: each data set's own.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(help='A prompt of your own: "a sketch of a {}."; repeatable.', rich_help_panel=METHOD),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder. Default: runs/DATASETS-TEACHER. Run again to continue.", rich_help_panel=RUN),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Remove what the run folder holds, and start over.", rich_help_panel=RUN)
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=RUN)] = "auto",
    batch_size: Annotated[
        int | None, typer.Option(help="Images at a time. Answers do not depend on it.", rich_help_panel=RUN)
    ] = None,
    workers: Annotated[int, typer.Option(help="Number of threads that decode images.", rich_help_panel=RUN)] = 4,
    seed: Annotated[
        int, typer.Option(help="Seed of subset, stream order, views, corruptions, students.", rich_help_panel=RUN)
    ] = 0,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print what apm table --format json prints, nothing else.", rich_help_panel=OUTPUT),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress and no notes on stderr.", rich_help_panel=OUTPUT)
    ] = False,
    debug: Debug = False,
) -> None:
    """Run methods on data sets: teacher, peers and APM in one loop, every answer recorded, tables from the records.

    A run is a folder; running the same command again continues it. Under torchrun the processes share one run:
    torchrun --nproc-per-node 4 -m apm bench …

    Exit code: 0 done, 1 some images have no answer (each is named on stderr), 2 wrong usage, 130 interrupted.
    """
    names = datasets or []
    if list_:
        _print_list(names, root, as_json=as_json)
        return
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"--batch-size is {batch_size}; it must be 1 or more.")
    if workers < 1:
        raise UsageError(f"--workers is {workers}; it must be 1 or more.")
    if seed < 0:
        raise UsageError(f"--seed is {seed}; it must be 0 or more.")
    if prompts is not None and template:
        raise UsageError("--prompts and --template exclude each other; give one of them.")

    from apm.benchmarks.runs.plan import default_folder, plan_cells
    from apm.labels import check_templates, prompt_templates

    templates = check_templates(template) if template else prompt_templates(prompts) if prompts else None
    cells = plan_cells(
        names,
        root=root,
        corruptions=corruption or (),
        levels=level or (5,),
        limit=limit,
        seed=seed,
        from_clean=from_clean,
        source=source,
        label_set=label_set,
    )

    from apm.benchmarks.methods import MethodOptions, create_methods
    from apm.benchmarks.runs.run_record import RunOptions
    from apm.benchmarks.runs.runner import run
    from apm.processes import join, on_many_machines, restarted

    if (
        fresh and on_many_machines()
    ):  # where the launchers do not tell each other of restarts: it would start over again
        raise UsageError("--fresh is for one machine. Remove the run folder, and leave --fresh out.")
    precision = student.get("precision", "auto")
    with join() as group:
        loaded = _load_teacher(teacher, device, group)
        if not quiet and group.first:
            for note in loaded.notes:
                notice(note)
        if group.first:
            notice_if_slow(precision, loaded.device)
        folder = out or default_folder(names, loaded.name)
        fresh = fresh and not restarted()
        student["precision"] = _precision(precision, folder, loaded, fresh, group)
        methods = create_methods(
            method or ["zero-shot", "apm"],
            MethodOptions(
                student=StudentOptions(**student),
                views=views,
                device=loaded.device,
                seed=seed,
                batch_size=batch_size,
                record_steps=record_steps,
            ),
            targets=target or (),
        )
        options = RunOptions(
            seed=seed,
            limit=limit,
            prompts="custom" if template else prompts,
            templates=templates,
            record_steps=record_steps,
            record_logits=record_logits,
            batch_size=batch_size or (64 if loaded.device.type == "cuda" else 8),
            workers=workers,
            fresh=fresh,
            command=("apm", *sys.argv[1:]),
        )
        with _progress(quiet or not group.first) as (report, texts):
            try:
                summary = run(
                    folder,
                    cells,
                    methods,
                    loaded,
                    options,
                    group=group,
                    on_progress=report,
                    on_texts=texts,
                    on_note=(lambda text: None) if quiet else notice,
                    on_failure=failure,
                    on_warning=warning,
                )
            except KeyboardInterrupt:
                again = shlex.join(argument for argument in options.command if argument != "--fresh")
                progress_line(f"interrupted: what was answered is in {folder}. To continue: {again}")
                raise typer.Exit(INTERRUPTED) from None
    if group.first:
        _print_summary(summary, as_json=as_json)
        if not quiet:
            notice(
                f"Records: {folder}. Other formats, and tables of several runs: apm table {shlex.quote(str(folder))}"
            )
    if summary.failed:
        failure(f"{summary.failed} image(s) have no answer; see the rows with an error in {folder}.")
        raise typer.Exit(1)


def _load_teacher(name: str | None, device: str, group: Group) -> Teacher:
    from apm.processes import local_rank
    from apm.teachers import check_teacher, load_default_teacher, load_teacher

    if name is not None:
        check_teacher(name)
    from apm.classifier import pick_device

    place = pick_device(device)
    if place.type == "cuda" and place.index is None and group.world > 1:
        place = pick_device(f"cuda:{local_rank()}")
    return load_default_teacher(device=place) if name is None else load_teacher(name, device=place)


def _precision(asked: str, folder: Path, teacher: Teacher, fresh: bool, group: Group) -> str:
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


@contextmanager
def _progress(silent: bool) -> Iterator[tuple[Callable[[Progress], None], Callable[[int, int], None]]]:
    """Report images and the encoding of labels on stderr: a bar on a terminal, else a line now and then."""
    doing = "encoding labels"
    with (
        progress_on_terminal(None, wanted=not silent, doing="bench") as bar,
        counted(doing, wanted=bar is None and not silent) as line,
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
                bar.update(bar.task_ids[0], description=doing, completed=done, total=total)
            line(done, total)

        yield report, texts


def progress_words(progress: Progress) -> str:
    """``digits (1/4) zero-shot 71.2 % apm 70.8 % · 3.2 images/s · 2 min left``."""
    scores = " ".join(f"{name} {100 * accuracy:.1f} %" for name, accuracy in progress.accuracy.items())
    rate = f"{progress.images_per_second:.3g} images/s"
    left = f"{_duration(progress.remaining_seconds)} left"
    return f"{progress.cell} ({progress.cell_number}/{progress.cells}) {scores} · {rate} · {left}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _print_summary(summary: Summary, *, as_json: bool) -> None:
    from apm.benchmarks.runs.records import Records
    from apm.benchmarks.tables.build import make_tables
    from apm.benchmarks.tables.formats import as_json as tables_as_json

    tables = make_tables([Records.open(summary.path)])
    if as_json:
        say_json(tables_as_json(tables), end="")
        return
    show(tables)


def _print_list(names: list[str], root: Path | None, *, as_json: bool) -> None:
    from apm.benchmarks.datasets import DATASETS, SUITES, data_root, expand, find

    rows: list[dict[str, Any]] = []
    for name in expand(names) if names else DATASETS:
        spec = DATASETS[name]
        found = find(name, root)
        rows.append(
            {
                "name": name,
                "title": spec.title,
                "classes": spec.classes or None,
                "images": spec.images or None,
                "prompt": spec.template,
                "origin": spec.origin,
                "hub": list(spec.hub),
                "suites": [suite for suite, members in SUITES.items() if name in members],
                "found": None if found is None else {"folder": str(found.folder), "layout": found.layout},
            }
        )
    if as_json:
        for row in rows:
            say_json(json.dumps(row, ensure_ascii=False))
        return
    headings = ["data set", "classes", "images", "prompt", "found", "from"]
    lines = [
        [
            row["name"],
            str(row["classes"] or "–"),
            f"{row['images']:,}" if row["images"] else "–",
            row["prompt"],
            "no" if row["found"] is None else row["found"]["layout"],
            row["origin"],
        ]
        for row in rows
    ]
    print_table(headings, lines)
    say("Suites: " + "; ".join(f"{suite} ({', '.join(members)})" for suite, members in SUITES.items()) + ".")
    place = data_root(root)
    say(f"Root: {place}." if place else "Root: none; give --root FOLDER or set APM_DATA.")
