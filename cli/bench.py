"""`apm bench`: methods on data sets, into a run folder that can be continued, and a table at the end."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apm.errors import UsageError
from apm.labels import PROMPT_NAMES
from apm.settings import settings_of
from apm.test_time.options import StudentOptions
from apm.test_time.queries import ALL

from .data import (
    DATA,
    METHOD,
    OUTPUT,
    RUN,
    BatchSize,
    Corruptions,
    DataSets,
    Device,
    FromClean,
    LabelSet,
    Levels,
    Limit,
    Protocol,
    Quiet,
    Root,
    Seed,
    Source,
    Views,
    Workers,
    check_numbers,
    fill_store,
    images_at_a_time,
    images_progress,
    load_shared_teacher,
    shared_precision,
)
from .options import Debug, student_options
from .render import failure, notice, notice_if_slow, say, say_json, told_when_interrupted, warning
from .table import print_table, show

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from apm.benchmarks.datasets import Dataset
    from apm.benchmarks.methods import Method
    from apm.benchmarks.runs.run_record import RunOptions
    from apm.benchmarks.runs.runner import Summary
    from apm.benchmarks.store.reader import FeatureStore
    from apm.processes import Group
    from apm.teachers.base import Teacher


@student_options(METHOD, prefix="apm: ", defaults={"queries": ALL})
def bench(
    datasets: DataSets = None,
    list_: Annotated[
        bool, typer.Option("--list", help="List the data sets, and which are under the root.", rich_help_panel=DATA)
    ] = False,
    root: Root = None,
    corruption: Corruptions = None,
    level: Levels = None,
    from_clean: FromClean = False,
    limit: Limit = None,
    source: Source = None,
    label_set: LabelSet = None,
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
    views: Views = None,
    *,
    student: dict[str, Any],
    protocol: Protocol = "common",
    oracle: Annotated[
        bool,
        typer.Option(
            "--oracle",
            help="Allow settings chosen by the test labels, such as dmn:alpha=oracle; marked ORACLE in tables.",
            rich_help_panel=METHOD,
        ),
    ] = False,
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
    features: Annotated[
        Path | None,
        typer.Option(
            metavar="STORE",
            help="Read tokens and views from what apm encode wrote; images are decoded only for methods that look at "
            "them.",
            rich_help_panel=RUN,
        ),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            metavar="STORE",
            help="As --features, and encode first what the store lacks, for this run and later ones.",
            rich_help_panel=RUN,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder. Default: runs/DATASETS-TEACHER. Run again to continue.", rich_help_panel=RUN),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Remove what the run folder holds, and start over.", rich_help_panel=RUN)
    ] = False,
    device: Device = "auto",
    batch_size: BatchSize = None,
    workers: Workers = 4,
    seed: Seed = 0,
    order: Annotated[
        int | None,
        typer.Option(help="Seed of the order that stream methods see. Default: --seed.", rich_help_panel=RUN),
    ] = None,
    orders: Annotated[
        int,
        typer.Option(
            help="Run stream methods in this many orders, of --order and the seeds that follow, each into a folder "
            "beside the run's; tables show mean ± standard deviation.",
            rich_help_panel=RUN,
        ),
    ] = 1,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print what apm table --format json prints, nothing else.", rich_help_panel=OUTPUT),
    ] = False,
    quiet: Quiet = False,
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
    check_numbers(batch_size, workers, seed)
    if features is not None and store is not None:
        raise UsageError("--features and --store exclude each other: --store reads, and fills what is missing.")
    if orders < 1 or (order is not None and order < 0):
        raise UsageError(f"--order {order} and --orders {orders}: a seed is 0 or more, and so many orders 1 or more.")
    if prompts is not None and template:
        raise UsageError("--prompts and --template exclude each other; give one of them.")

    from apm.benchmarks.runs.plan import check_protocol, default_folder, plan_cells, plan_orders
    from apm.labels import check_templates, prompt_templates

    check_protocol(protocol, {"--views": views, "--prompts": prompts, "--template": template})
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
        loaded = load_shared_teacher(teacher, device, group)
        if not quiet and group.first:
            for note in loaded.notes:
                notice(note)
        if group.first:
            notice_if_slow(precision, loaded.device)
        folder = out or default_folder(names, loaded.name)
        fresh = fresh and not restarted()
        student["precision"] = shared_precision(precision, folder, loaded, fresh, group)
        methods = create_methods(
            method or ["zero-shot", "apm"],
            MethodOptions(
                student=StudentOptions(**student),
                views=views,
                device=loaded.device,
                seed=seed,
                batch_size=batch_size,
                record_steps=record_steps,
                protocol=protocol,
                oracle=oracle,
            ),
            targets=target or (),
        )
        options = RunOptions(
            seed=seed,
            limit=limit,
            prompts="custom" if template else prompts,
            templates=templates,
            order=order,
            protocol=protocol,
            record_steps=record_steps,
            record_logits=record_logits,
            batch_size=images_at_a_time(batch_size, loaded),
            workers=workers,
            fresh=fresh,
            command=("apm", *sys.argv[1:]),
        )
        again = shlex.join(argument for argument in options.command if argument != "--fresh")
        stopped = f"interrupted: what was answered is in {folder}. To continue: {again}"
        with told_when_interrupted(stopped, speaks=group.first):
            known = _features(features, store, cells, methods, loaded, options, group, quiet=quiet)
            summaries = []
            for place, members, one in plan_orders(folder, methods, options, orders):
                with images_progress("bench", silent=quiet or not group.first) as (report, texts):
                    summary = run(
                        place,
                        cells,
                        members,
                        loaded,
                        one,
                        features=known,
                        group=group,
                        on_progress=report,
                        on_texts=texts,
                        on_note=(lambda text: None) if quiet else notice,
                        on_failure=failure,
                        on_warning=warning,
                    )
                summaries.append(summary)
    if group.first:
        _print_summaries(summaries, as_json=as_json, oracle=oracle)
        if not quiet:
            places = shlex.join(str(summary.path) for summary in summaries)
            notice(f"Records: {places}. Other formats, and tables of several runs: apm table {places}")
    for summary in summaries:
        if summary.failed:
            failure(f"{summary.failed} image(s) have no answer; see the rows with an error in {summary.path}.")
    if any(summary.failed for summary in summaries):
        raise typer.Exit(1)


def _features(
    features: Path | None,
    store: Path | None,
    cells: Sequence[Callable[[], Dataset]],
    methods: Sequence[Method],
    teacher: Teacher,
    options: RunOptions,
    group: Group,
    *,
    quiet: bool,
) -> FeatureStore | None:
    """The store that a run reads, filled where that is asked for; None for a run that encodes for itself."""
    path = store or features
    if path is None:
        return None
    from apm.benchmarks.store.filling import EncodeOptions
    from apm.benchmarks.store.layout import read_store
    from apm.benchmarks.store.reader import FeatureStore, wanted_views

    if store is not None:
        there = read_store(store)
        wanted = max((views for views, _ in wanted_views(methods).values()), default=1)
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
    known.suits(teacher, options.seed, methods)
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
