"""`apm reproduce`: a table of the paper as one command: its plan, its runs, and ours beside the published cells."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apm.errors import UsageError
from apm.test_time.options import StudentOptions
from apm.test_time.queries import ALL

from .data import (
    METHOD,
    OUTPUT,
    RUN,
    BatchSize,
    Device,
    FromClean,
    Limit,
    Protocol,
    Quiet,
    Root,
    Seed,
    Views,
    Workers,
    check_numbers,
    images_at_a_time,
    images_progress,
    load_shared_teacher,
    shared_precision,
)
from .options import Debug, student_options
from .render import failure, notice, told_when_interrupted, warning
from .reproduced import differs, in_words, missing, print_beside, print_plan

if TYPE_CHECKING:
    from apm.benchmarks.methods import Method
    from apm.benchmarks.reproduce.plan import Job, Plan
    from apm.benchmarks.reproduce.recipes import Recipe
    from apm.benchmarks.runs.run_record import RunOptions
    from apm.processes import Group
    from apm.teachers.base import Teacher


@student_options(METHOD, prefix="apm: ", defaults={"queries": ALL})
def reproduce(
    number: Annotated[int, typer.Argument(metavar="1|2|3", min=1, max=3, help="The table of the paper.")],
    root: Root = None,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Say what can be run and how long it will take, and stop.", rich_help_panel=RUN),
    ] = False,
    measured: Annotated[
        bool,
        typer.Option(
            "--measure/--no-measure", help="Time every method on an image, for the expected hours.", rich_help_panel=RUN
        ),
    ] = True,
    from_clean: FromClean = False,
    limit: Limit = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Only this method of the table; repeatable. Default: all.", rich_help_panel=METHOD),
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            help="Another teacher than the paper's, for all rows, or for those of one: ViT-H/14=NAME/TAG. Repeatable.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    coop: Annotated[
        Path | None, typer.Option(help="A prompt that CoOp learned, for its rows.", rich_help_panel=METHOD)
    ] = None,
    cocoop: Annotated[
        Path | None, typer.Option(help="A prompt that CoCoOp learned, for its rows.", rich_help_panel=METHOD)
    ] = None,
    views: Views = None,
    protocol: Protocol = "published",
    download: Annotated[
        bool, typer.Option("--download", help="Fetch weights that are not on this machine.", rich_help_panel=METHOD)
    ] = False,
    *,
    student: dict[str, Any],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the runs. Default: runs/table-NUMBER. Run again to continue.", rich_help_panel=RUN
        ),
    ] = None,
    device: Device = "auto",
    batch_size: BatchSize = None,
    workers: Workers = 4,
    seed: Seed = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on stdout, nothing else.", rich_help_panel=OUTPUT)
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run a table of the paper on your data, and set ours beside the published cells.

    Says first which cells can be run (data found? weights found?) and, from a measurement on this machine, for how many
    hours; then runs them as apm bench does, resumably; then compares. A zero-shot number within 0.3 points agrees; for
    any other the likely causes are named, by what the records say. Nothing is downloaded unless --download asks for it.

    Exit code: 0 all cells were run and agree; 1 some could not be run, have images without an answer, or differ (each
    is named on stderr); 2 wrong usage, or nothing can be run; 130 interrupted.

    Examples:

        apm reproduce 1 --root /data --plan

        apm reproduce 3 --root /data --method zero-shot
    """
    check_numbers(batch_size, workers, seed)

    from apm.benchmarks.runs.plan import check_protocol

    check_protocol(protocol, {"--views": views})

    from apm.benchmarks.reproduce.plan import make_plan
    from apm.benchmarks.reproduce.recipes import PAPER
    from apm.processes import join

    learned = {kind: file for kind, file in (("coop", coop), ("cocoop", cocoop)) if file is not None}
    made = make_plan(
        PAPER[number],
        root,
        methods=method or (),
        teachers=_teachers(teacher or ()),
        learned=learned,
        limit=limit,
        seed=seed,
        from_clean=from_clean,
        download=download and not plan,
    )
    folder = out or Path("runs") / f"table-{number}"
    if not made.ready or not made.ready_jobs:
        raise UsageError(f"{made.table.title}: nothing can be run. {' '.join(missing(made))}")

    from apm.benchmarks.runs.run_record import RunOptions

    options = RunOptions(seed=seed, limit=limit, protocol=protocol, workers=workers, command=("apm", *sys.argv[1:]))
    running = _Running(made, folder, options, student, views, device, batch_size, download=download, quiet=quiet)
    if plan:
        hours = {job: running.hours(job) for job in made.ready_jobs} if measured else {}
        print_plan(made, hours, protocol, as_json=as_json)
        return
    with join() as group:
        failed = running.run(group, measured=measured)
    if not group.first:
        return

    from apm.benchmarks.reproduce.beside import beside

    compared = list(beside(made, folder, running.methods))
    print_beside(made, compared, protocol, as_json=as_json)
    problems = [*missing(made), *(differs(one) for one in compared if one.verdict == "differs")]
    if failed:
        problems.append(f"{failed} image(s) have no answer; see the rows with an error below {folder}.")
    for text in problems:
        failure(text)
    if problems:
        raise typer.Exit(1)


def _teachers(given: Sequence[str]) -> dict[str, str]:
    """By the paper's name of a teacher, the one that is given for it."""
    from apm.benchmarks.reproduce.recipes import WEIGHTS

    found: dict[str, str] = {}
    for text in given:
        label, equals, spec = text.partition("=")
        if equals and label in WEIGHTS:
            found[label] = spec
        else:
            found |= dict.fromkeys(WEIGHTS, text)
    return found


class _Running:
    """The runs of a plan."""

    def __init__(
        self,
        plan: Plan,
        out: Path,
        options: RunOptions,
        student: dict[str, Any],
        views: int | None,
        device: str,
        batch_size: int | None,
        *,
        download: bool,
        quiet: bool,
    ) -> None:
        self.plan, self.out, self.options, self.student, self.views = plan, out, options, student, views
        self.device, self.batch_size, self.download, self.quiet = device, batch_size, download, quiet
        self.methods: dict[Job, dict[Recipe, Method]] = {}

    def hours(self, job: Job) -> float:
        """Expected hours of a run, by a measurement with its teacher."""
        from apm.processes import ALONE

        loaded = self._load(job, ALONE)
        return self._expected(job, loaded, self._create(job, loaded, ALONE))

    def run(self, group: Group, *, measured: bool) -> int:
        """Run all jobs; returns how many images have no answer."""
        failed = 0
        for job in self.plan.ready_jobs:
            loaded = self._load(job, group)
            methods = self._create(job, loaded, group)
            if measured and group.first and not self.quiet:
                hours = self._expected(job, loaded, methods)
                notice(f"{job.folder}: {', '.join(one.name for one in methods)}; expected: {in_words(hours)}")
            failed += self._run(job, loaded, methods, group)
        return failed

    def _load(self, job: Job, group: Group) -> Teacher:
        from apm.teachers import hub

        with nullcontext() if self.download else hub.no_network():
            return load_shared_teacher(job.teacher, self.device, group)

    def _create(self, job: Job, teacher: Teacher, group: Group) -> list[Method]:
        from apm.benchmarks.methods import MethodOptions, create_method, parse_method

        folder = self.out / job.folder
        asked = self.student.get("precision", "auto")
        student = {**self.student, "precision": shared_precision(asked, folder, teacher, False, group)}
        options = MethodOptions(
            student=StudentOptions(**student),
            views=self.views,
            device=teacher.device,
            seed=self.options.seed,
            batch_size=self.batch_size,
            protocol=self.options.protocol,
        )
        made = {parse_method(spec)[0]: create_method(spec, options) for spec in job.specs}
        self.methods[job] = {recipe: made[recipe.method] for recipe in job.recipes}
        return list(made.values())

    def _expected(self, job: Job, teacher: Teacher, methods: Sequence[Method]) -> float:
        from apm.benchmarks.reproduce.plan import expected_seconds, measure

        rates = measure(teacher, methods, self.plan.ready)
        return expected_seconds(job, self.plan, methods, rates, self.out) / 3600

    def _run(self, job: Job, teacher: Teacher, methods: Sequence[Method], group: Group) -> int:
        from apm.benchmarks.runs.runner import run

        options = replace(
            self.options,
            prompts=job.prompts,
            templates=job.templates,
            batch_size=images_at_a_time(self.batch_size, teacher),
        )
        stopped = f"interrupted: what was answered is in {self.out}. To continue: {shlex.join(self.options.command)}"
        with (
            told_when_interrupted(stopped, speaks=group.first),
            images_progress("reproduce", silent=self.quiet or not group.first) as (report, texts),
        ):
            return run(
                self.out / job.folder,
                [cell.open for cell in self.plan.ready],
                methods,
                teacher,
                options,
                group=group,
                on_progress=report,
                on_texts=texts,
                on_note=(lambda text: None) if self.quiet else notice,
                on_failure=failure,
                on_warning=warning,
            ).failed
