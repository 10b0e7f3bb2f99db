"""`apm reproduce`: a table of the paper as one command: its plan, its runs, and our cells beside the published ones."""

# ruff: noqa: RUF009  (`setting` makes fields)
from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apm.errors import UsageError
from apm.settings import setting
from apm.test_time.options import StudentOptions
from apm.test_time.queries import ALL

from .data import answer, load_chosen_teacher, shared_precision
from .options import Debug, options_of, student_options
from .render import failure, notice, told_when_interrupted
from .reproduced import differs, in_words, left_out, missing, print_beside, print_plan
from .run_options import DATA, METHOD, OUTPUT, PROTOCOL_HELP, RUN, VIEWS_HELP, Place, Quiet, Work

if TYPE_CHECKING:
    from apm.benchmarks.methods import Method
    from apm.benchmarks.reproduce.plan import Job, Plan
    from apm.benchmarks.reproduce.recipes import Recipe
    from apm.processes import Group
    from apm.teachers.base import Teacher


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Which rows of the table, and with which weights."""

    method: list[str] | None = setting(None, "Only this method of the table; repeatable. Default: all.")
    teacher: list[str] | None = setting(
        None,
        "A teacher other than the paper's, for all rows or for those of one teacher: ViT-H/14=NAME/TAG. Repeatable.",
    )
    coop: Path | None = setting(None, "A prompt that CoOp learned, for its rows.")
    cocoop: Path | None = setting(None, "A prompt that CoCoOp learned, for its rows.")
    probe: Path | None = setting(None, "A checkpoint of apm mae probe, for the rows ViT Probe and TTT-MAE.")
    finetuned: Path | None = setting(None, "A checkpoint of apm mae finetune, for the row Fine-Tune.")
    joint: Path | None = setting(None, "A checkpoint of apm mae joint, for the row Joint Train.")
    views: int | None = setting(None, VIEWS_HELP)
    protocol: str = setting("published", PROTOCOL_HELP)
    download: bool = setting(False, "Fetch weights that are not on this machine.")

    def plan(self, number: int, place: Place, seed: int, *, download: bool) -> Plan:
        """What can be run.

        Raises:
            UsageError: nothing can be run, or a value cannot work.
        """
        from apm.benchmarks.reproduce.plan import make_plan
        from apm.benchmarks.reproduce.recipes import LEARNED, PAPER
        from apm.benchmarks.runs.plan import check_protocol

        check_protocol(self.protocol, {"--views": self.views})
        learned = {one.option: getattr(self, one.option) for one in LEARNED.values()}
        plan = make_plan(
            PAPER[number],
            place.root,
            methods=self.method or (),
            teachers=_teachers(self.teacher or ()),
            learned={kind: file for kind, file in learned.items() if file is not None},
            limit=place.limit,
            seed=seed,
            from_clean=place.from_clean,
            download=download,
        )
        if not plan.ready or not plan.ready_jobs:
            why = [*missing(plan), *left_out(plan)]
            raise UsageError(f"{plan.table.title}: nothing can be run. {' '.join(why)}")
        return plan


@student_options(METHOD, prefix="apm: ", defaults={"queries": ALL})
@options_of(Place, "place", DATA)
@options_of(Rows, "rows", METHOD)
@options_of(Work, "work", RUN)
def reproduce(
    number: Annotated[int, typer.Argument(metavar="1|2|3", min=1, max=3, help="The table of the paper.")],
    place: Place,
    rows: Rows,
    *,
    student: dict[str, Any],
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Only print what can be run and how long it will take.", rich_help_panel=RUN),
    ] = False,
    measured: Annotated[
        bool,
        typer.Option(
            "--measure/--no-measure", help="Time every method on one image to estimate the hours.", rich_help_panel=RUN
        ),
    ] = True,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the runs. Default: runs/table-NUMBER. Run again to continue.", rich_help_panel=RUN
        ),
    ] = None,
    work: Work,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.", rich_help_panel=OUTPUT)
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run a table of the paper on your data and compare it with the published numbers.

    Lists first which cells can be run (data found? weights found?) and, from a measurement on this machine, for how
    many hours. Then runs them as apm bench does, resumably, and compares. A zero-shot number within 0.3 points agrees;
    for any other, likely causes are named from the records. Nothing is downloaded without --download.

    Exit code: 0 all cells were run and agree; 1 some could not be run, have images without an answer, or differ (each
    is named on stderr); 2 wrong usage, or nothing can be run; 130 interrupted.

    Examples:

        apm reproduce 1 --root /data --plan

        apm reproduce 3 --root /data --method zero-shot
    """
    made = rows.plan(number, place, work.seed, download=rows.download and not plan)
    folder = out or Path("runs") / f"table-{number}"
    running = _Running(made, folder, rows, student, work, place.limit, quiet=quiet)
    if plan:
        hours = {job: running.hours(job) for job in made.ready_jobs} if measured else {}
        print_plan(made, hours, rows.protocol, as_json=as_json)
        return

    from apm.processes import join

    with join() as group:
        failed = running.run(group, measured=measured)
    if group.first and (problems := running.compare(failed, as_json=as_json)):
        for text in problems:
            failure(text)
        raise typer.Exit(1)


def _teachers(given: Sequence[str]) -> dict[str, str]:
    """By the paper's name for a teacher, the teacher given for it."""
    from apm.benchmarks.reproduce.recipes import NO_TEACHER, WEIGHTS

    found: dict[str, str] = {}
    for text in given:
        label, equals, spec = text.partition("=")
        if equals and label in WEIGHTS:
            found[label] = spec
        else:
            found |= dict.fromkeys((*WEIGHTS, NO_TEACHER), text)
    return found


class _Running:
    """The runs of a plan."""

    def __init__(
        self,
        plan: Plan,
        out: Path,
        rows: Rows,
        student: dict[str, Any],
        work: Work,
        limit: int | None,
        *,
        quiet: bool,
    ) -> None:
        from apm.benchmarks.runs.run_record import RunOptions

        self.plan, self.out, self.rows, self.student, self.work, self.quiet = plan, out, rows, student, work, quiet
        self.options = RunOptions(
            seed=work.seed,
            limit=limit,
            protocol=rows.protocol,
            workers=work.workers,
            command=("apm", *sys.argv[1:]),
        )
        self.methods: dict[Job, dict[Recipe, Method]] = {}

    def hours(self, job: Job) -> float:
        """Expected hours of a run, by a measurement with its teacher."""
        from apm.processes import ALONE

        loaded = self._load(job)
        return self._expected(job, loaded, self._create(job, loaded, ALONE))

    def run(self, group: Group, *, measured: bool) -> int:
        """Run all jobs; returns how many images have no answer."""
        failed = 0
        for job in self.plan.ready_jobs:
            loaded = self._load(job)
            methods = self._create(job, loaded, group)
            if measured and group.first and not self.quiet:
                hours = self._expected(job, loaded, methods)
                notice(f"{job.folder}: {', '.join(one.name for one in methods)}; expected: {in_words(hours)}")
            failed += self._run(job, loaded, methods, group)
        return failed

    def compare(self, failed: int, *, as_json: bool) -> list[str]:
        """Print our cells beside the published ones; returns what is missing, differs or has no answer."""
        from apm.benchmarks.reproduce.beside import beside

        compared = list(beside(self.plan, self.out, self.methods))
        print_beside(self.plan, compared, self.rows.protocol, as_json=as_json)
        asked = left_out(self.plan, self.rows.method or ())
        problems = [*missing(self.plan), *asked, *(differs(one) for one in compared if one.verdict == "differs")]
        if failed:
            problems.append(f"{failed} image(s) have no answer; see the rows with an error below {self.out}.")
        return problems

    def _load(self, job: Job) -> Teacher:
        from apm.teachers import hub

        with nullcontext() if self.rows.download else hub.no_network():
            return load_chosen_teacher(job.teacher, self.work.device)

    def _create(self, job: Job, teacher: Teacher, group: Group) -> list[Method]:
        from apm.benchmarks.methods import MethodOptions, create_method, parse_method

        folder = self.out / job.folder
        asked = self.student.get("precision", "auto")
        student = {**self.student, "precision": shared_precision(asked, folder, teacher, False, group)}
        options = MethodOptions(
            student=StudentOptions(**student),
            views=self.rows.views,
            device=teacher.device,
            seed=self.work.seed,
            batch_size=self.work.batch_size,
            protocol=self.rows.protocol,
        )
        made = {parse_method(spec)[0]: create_method(spec, options) for spec in job.specs}
        self.methods[job] = {recipe: made[recipe.method] for recipe in job.recipes}
        return list(made.values())

    def _expected(self, job: Job, teacher: Teacher, methods: Sequence[Method]) -> float:
        from apm.benchmarks.reproduce.plan import expected_seconds, measure

        rates = measure(teacher, methods, self.plan.ready)
        return expected_seconds(job, self.plan, methods, rates, self.out) / 3600

    def _run(self, job: Job, teacher: Teacher, methods: Sequence[Method], group: Group) -> int:
        options = replace(
            self.options,
            prompts=job.prompts,
            templates=job.templates,
            batch_size=self.work.images_at_a_time(teacher),
        )
        stopped = f"interrupted: what was answered is in {self.out}. To continue: {shlex.join(self.options.command)}"
        folder, cells = self.out / job.folder, [cell.open for cell in self.plan.ready]
        with told_when_interrupted(stopped, speaks=group.first):
            return answer("reproduce", folder, cells, methods, teacher, options, group, quiet=self.quiet).failed
