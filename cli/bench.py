"""`apm bench`: methods on data sets, into a run folder that can be continued, and a table at the end."""

# ruff: noqa: RUF009  (`setting` makes fields)
from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apm.errors import UsageError
from apm.labels import PROMPT_NAMES
from apm.settings import at_least, between, check_values, setting, settings_of
from apm.test_time.options import StudentOptions
from apm.test_time.queries import ALL

from .data import answer, fill_store, load_chosen_teacher, say_notes, shared_precision
from .options import Debug, flag, options_of, student_options
from .render import failure, notice, notice_if_slow, say, say_json, told_when_interrupted
from .run_options import (
    DATA,
    METHOD,
    OUTPUT,
    PROTOCOL_HELP,
    RUN,
    TEACHER_HELP,
    VIEWS_HELP,
    Cells,
    DataSets,
    Quiet,
    Work,
)
from .table import print_table, show

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from apm.benchmarks.datasets import Dataset
    from apm.benchmarks.methods import Method
    from apm.benchmarks.runs.run_record import RunOptions
    from apm.benchmarks.runs.runner import Summary
    from apm.benchmarks.store.reader import FeatureStore
    from apm.processes import Group
    from apm.teachers.base import Teacher
    from apm.text.descriptors import Descriptors


@dataclass(frozen=True, kw_only=True)
class Methods:
    """The methods, the teacher they share, and its prompts."""

    method: list[str] | None = setting(
        None,
        "zero-shot, tpt, ctpt, rtpt, rlcf, dynaprompt, coop, cocoop, tpt+coop, tpt+cocoop, mta, zero, tps, tda, "
        "boostadapter, dmn, dpe, dota, onzeta, ecalp, oga, ttl, tent, clipartt, watt, apm, glom-ttt, vit-probe, "
        "mae-finetune, mae-joint or ttt-mae, with its own settings as tpt:steps=2; repeatable. Default: zero-shot and "
        "apm.",
    )
    target: list[str] | None = setting(
        None, f"apm: {settings_of(StudentOptions)['target'].help} Repeatable. Default: {StudentOptions.target}."
    )
    views: int | None = setting(None, VIEWS_HELP)
    protocol: str = setting("common", PROTOCOL_HELP)
    descriptors: list[str] | None = setting(
        None,
        "LLM descriptors of classes for the published methods whose authors use them (dmn, dpe, tps): a JSON file "
        '{"class name": ["sentence", …], …} for every data set, or DATASET=FILE; repeatable.',
    )
    oracle: bool = setting(
        False, "Allow settings chosen with the test labels, such as dmn:alpha=oracle; marked ORACLE in tables."
    )
    record_steps: bool = setting(False, "apm: record the prediction after each step.")
    record_logits: bool = setting(False, "Record every class's logit, for apm compare.")
    teacher: str | None = setting(None, TEACHER_HELP)
    prompts: str | None = setting(
        None, f"Prompt templates: {', '.join(PROMPT_NAMES)} (1, 7, 80). Default: each data set's own."
    )
    template: list[str] | None = setting(None, 'A prompt of your own: "a sketch of a {}."; repeatable.')

    def templates(self) -> tuple[str, ...] | None:
        """The prompts of the whole run, checked as the protocol is; None where each data set has its own."""
        if self.prompts is not None and self.template:
            raise UsageError("--prompts and --template exclude each other; give one of them.")
        from apm.benchmarks.runs.plan import check_protocol
        from apm.labels import check_templates, prompt_templates

        check_protocol(self.protocol, {"--views": self.views, "--prompts": self.prompts, "--template": self.template})
        if self.template:
            return check_templates(self.template)
        return prompt_templates(self.prompts) if self.prompts else None

    @property
    def specs(self) -> Sequence[str]:
        """The methods, as they are written."""
        return self.method or ["zero-shot", "apm"]

    def described(self, names: Sequence[str]) -> Mapping[str, Descriptors]:
        """The descriptors of the data sets and suites, checked as far as they can be without the data."""
        if not self.descriptors:
            return {}
        from apm.benchmarks.datasets import expand
        from apm.benchmarks.runs.described import described

        return described(self.descriptors, expand(names), self.specs, self.protocol)

    def create(
        self, student: StudentOptions, device: torch.device, work: Work, descriptors: Mapping[str, Descriptors]
    ) -> Sequence[Method]:
        """The methods, ready to answer."""
        from apm.benchmarks.methods import MethodOptions, create_methods

        options = MethodOptions(
            student=student,
            views=self.views,
            device=device,
            seed=work.seed,
            batch_size=work.batch_size,
            record_steps=self.record_steps,
            protocol=self.protocol,
            descriptors=descriptors,
            oracle=self.oracle,
        )
        return create_methods(self.specs, options, targets=self.target or ())


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Where features are read and rows written, and in which orders the images are taken.

    Raises:
        UsageError: values that cannot work, or do not go together.
    """

    features: Path | None = setting(
        None, "Read tokens and views from what apm encode wrote; images are decoded only for methods that need them."
    )
    store: Path | None = setting(
        None, "As --features, but first encode what is missing from the store, for this run and later ones."
    )
    out: Path | None = setting(None, "Run folder. Default: runs/DATASETS-TEACHER. Run again to continue.")
    fresh: bool = setting(False, "Delete the contents of the run folder and start over.")
    order: int | None = setting(
        None, "Seed of the image order for stream methods. Default: --seed.", check=between(0, 2**62)
    )
    orders: int = setting(
        1,
        "Run stream methods in this many orders, seeded with --order and the numbers after it, each into a folder "
        "beside the run's; tables show mean ± standard deviation.",
        check=at_least(1),
    )

    def __post_init__(self) -> None:
        """Check what needs no data."""
        if self.features is not None and self.store is not None:
            raise UsageError(
                "--features and --store exclude each other: --store also reads, and encodes what is missing."
            )
        check_values(self, flag)


@student_options(METHOD, prefix="apm: ", defaults={"queries": ALL})
@options_of(Cells, "cells", DATA)
@options_of(Methods, "methods", METHOD, spelled={"descriptors": "[DATASET=]FILE"})
@options_of(Folders, "folders", RUN, spelled={"features": "STORE", "store": "STORE"})
@options_of(Work, "work", RUN)
def bench(
    datasets: DataSets = None,
    list_: Annotated[
        bool,
        typer.Option("--list", help="List the data sets and which of them are under the root.", rich_help_panel=DATA),
    ] = False,
    *,
    cells: Cells,
    methods: Methods,
    student: dict[str, Any],
    folders: Folders,
    work: Work,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print the output of apm table --format json and nothing else.", rich_help_panel=OUTPUT
        ),
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run methods on data sets: zero-shot, other methods and APM in one loop, with every answer recorded.

    A run is a folder; running the same command again continues it. Under torchrun the processes share one run:
    torchrun --nproc-per-node 4 -m apm bench …

    Exit code: 0 done, 1 some images have no answer (each is named on stderr), 2 wrong usage, 130 interrupted.
    """
    names = datasets or []
    if list_:
        _print_list(names, cells.root, as_json=as_json)
        return
    templates = methods.templates()
    planned = cells.plan(names, work.seed)
    descriptors = methods.described(names)

    from apm.processes import join, on_many_machines

    if folders.fresh and on_many_machines():  # launchers tell each other of no restart: it would clear the folder again
        raise UsageError("--fresh works with one process only. Remove the run folder and leave out --fresh.")
    with join() as group:
        summaries = _run(
            names, planned, cells, methods, templates, descriptors, student, folders, work, group, quiet=quiet
        )
    if group.first:
        _print_summaries(summaries, as_json=as_json, oracle=methods.oracle)
        if not quiet:
            places = shlex.join(str(summary.path) for summary in summaries)
            notice(f"Records: {places}. Other formats, and tables of several runs: apm table {places}")
        for summary in summaries:
            if summary.failed:
                failure(f"{summary.failed} image(s) have no answer; see the rows with an error in {summary.path}.")
    if any(summary.failed for summary in summaries):
        raise typer.Exit(1)


def _run(
    names: Sequence[str],
    planned: Sequence[Callable[[], Dataset]],
    cells: Cells,
    methods: Methods,
    templates: tuple[str, ...] | None,
    descriptors: Mapping[str, Descriptors],
    student: dict[str, Any],
    folders: Folders,
    work: Work,
    group: Group,
    *,
    quiet: bool,
) -> list[Summary]:
    """Load the teacher, make the methods, and answer in every order that is wanted."""
    from apm.benchmarks.runs.plan import default_folder, plan_orders
    from apm.benchmarks.runs.run_record import RunOptions
    from apm.processes import restarted

    teacher = load_chosen_teacher(methods.teacher, work.device)
    say_notes(teacher, group, quiet=quiet)
    precision = student.get("precision", "auto")
    if group.first:
        notice_if_slow(precision, teacher.device)
    folder = folders.out or default_folder(names, teacher.name)
    fresh = folders.fresh and not restarted()
    precision = shared_precision(precision, folder, teacher, fresh, group)
    made = methods.create(StudentOptions(**{**student, "precision": precision}), teacher.device, work, descriptors)
    options = RunOptions(
        seed=work.seed,
        limit=cells.limit,
        prompts="custom" if methods.template else methods.prompts,
        templates=templates,
        order=folders.order,
        protocol=methods.protocol,
        record_steps=methods.record_steps,
        record_logits=methods.record_logits,
        batch_size=work.images_at_a_time(teacher),
        workers=work.workers,
        fresh=fresh,
        command=("apm", *sys.argv[1:]),
    )
    again = shlex.join(argument for argument in options.command if argument != "--fresh")
    stopped = f"interrupted: what was answered is in {folder}. To continue: {again}"
    with told_when_interrupted(stopped, speaks=group.first):
        known = _features(folders.features, folders.store, names, planned, made, teacher, options, group, quiet=quiet)
        return [
            answer("bench", place, planned, members, teacher, one, group, features=known, quiet=quiet)
            for place, members, one in plan_orders(folder, made, options, folders.orders)
        ]


def _features(
    features: Path | None,
    store: Path | None,
    names: Sequence[str],
    cells: Sequence[Callable[[], Dataset]],
    methods: Sequence[Method],
    teacher: Teacher,
    options: RunOptions,
    group: Group,
    *,
    quiet: bool,
) -> FeatureStore | None:
    """The store that the run reads, filled first with --store; None if the run encodes for itself."""
    path = store or features
    if path is None:
        return None
    from apm.benchmarks.datasets import expand
    from apm.benchmarks.store.filling import EncodeOptions
    from apm.benchmarks.store.layout import read_store
    from apm.benchmarks.store.reader import FeatureStore, wanted_views

    datasets = expand(names)
    if store is not None:
        there = read_store(store)
        wanted = max((views for views, _ in wanted_views(methods, datasets).values()), default=1)
        views = max(wanted, there[0].views) if there else wanted
        precision = there[0].precision if there else EncodeOptions.precision
        filling = EncodeOptions(
            views=views,
            seed=options.seed,
            precision=precision,
            batch_size=options.batch_size,
            workers=options.workers,
            command=options.command,
        )
        fill_store(store, cells, teacher, filling, group, quiet=quiet)
    known = FeatureStore.open(path)
    known.suits(teacher, options.seed, methods, datasets)
    return known


def _print_summaries(summaries: Sequence[Summary], *, as_json: bool, oracle: bool) -> None:
    from apm.benchmarks.runs.records import Records
    from apm.benchmarks.tables.build import make_tables
    from apm.benchmarks.tables.formats import as_json as tables_as_json

    tables = make_tables([Records.open(summary.path) for summary in summaries], oracle=oracle)
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
