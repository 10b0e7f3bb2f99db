"""What a table of the paper takes: which of its cells can be run here, in which runs, and for how many hours."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image

from apm.errors import TeacherError, UsageError, unknown
from apm.labels import prompt_templates
from apm.teachers import check_teacher, hub
from apm.teachers.base import Teacher
from apm.text.zeroshot import ZeroShotHead

from ..datasets import Dataset
from ..methods import create_method
from ..methods.base import Method, StreamMethod
from ..methods.mae import ViTProbe
from ..methods.published import AsPublished
from ..runs.plan import CLEAN, plan_cells
from ..runs.records import Records, RunFolder
from ..runs.timed_batch import TimedBatch
from .recipes import OWN, PaperTable, Recipe

LONG = 2.0
"""Seconds of work that need no second, warmer measurement."""
TEXTS = 16
"""Class names that are encoded to learn what a text costs."""


@dataclass(frozen=True, kw_only=True)
class PlannedCell:
    """A column of the table."""

    column: str
    open: Callable[[], Dataset]
    dataset: Dataset | None
    """None where it cannot be run."""
    reason: str = ""
    """Why not."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run: the rows of the table that have a teacher and prompts in common."""

    teacher: str
    """As `apm bench --teacher` takes it."""
    prompts: str | None
    recipes: tuple[Recipe, ...]
    specs: tuple[str, ...]
    """The methods of the recipes, as `create_method` takes them."""
    reason: str = ""
    """Why it cannot be run: its weights are not here, or a learned file cannot be used."""
    fetchable: bool = True
    """Whether the reason is that the teacher's weights are not here."""

    @property
    def folder(self) -> str:
        """Name of its run folder below that of the table."""
        return re.sub(r"[^A-Za-z0-9._+-]+", "-", f"{self.teacher}-{self.prompts or OWN}").strip("-")

    @property
    def templates(self) -> tuple[str, ...] | None:
        """Of its prompt set; None for the data sets' own."""
        return prompt_templates(self.prompts) if self.prompts else None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be run for one table."""

    table: PaperTable
    cells: tuple[PlannedCell, ...]
    jobs: tuple[Job, ...]
    left_out: Mapping[Recipe, str] = field(default_factory=dict)
    """Rows that are in no job, and why."""

    @property
    def ready(self) -> list[PlannedCell]:
        """The columns that can be run."""
        return [cell for cell in self.cells if cell.dataset is not None]

    @property
    def ready_jobs(self) -> list[Job]:
        """The runs whose weights are here, or may be fetched."""
        return [job for job in self.jobs if not job.reason]


def make_plan(
    table: PaperTable,
    root: Path | None,
    *,
    methods: Sequence[str] = (),
    teachers: Mapping[str, str] | None = None,
    learned: Mapping[str, Path] | None = None,
    limit: int | None = None,
    seed: int = 0,
    from_clean: bool = False,
    download: bool = False,
) -> Plan:
    """Find out which parts of a table can be run. Data sets are opened; no image is decoded, nothing downloaded.

    Args:
        table: one of `PAPER`.
        root: folder that holds the data sets; None: APM_DATA.
        methods: those wanted, by their names in the bench; none given: all of the table.
        teachers: by the paper's name of a teacher, another than that of its recipes.
        learned: files with what was learned from labels, by the options of `recipes.LEARNED`.
        limit, seed, from_clean: as `plan_cells`.
        download: whether weights that are not here may be fetched when the run begins.

    Raises:
        UsageError: a method that the table does not have.
    """
    known = list(dict.fromkeys(recipe.method for recipe in table.recipes))
    for name in methods:
        if name not in known:
            raise unknown(f"method of Table {table.number}", name, known)
    cells = [_cell(table, column, root, limit=limit, seed=seed, from_clean=from_clean) for column in table.columns]
    jobs: dict[tuple[str, str | None, str], Job] = {}
    left_out: dict[Recipe, str] = {}
    for recipe in table.recipes:
        if methods and recipe.method not in methods:
            continue
        spec, problem = recipe.method, ""
        if recipe.learned:
            file = (learned or {}).get(recipe.learned.option)
            if file is None:
                needed = recipe.learned
                left_out[recipe] = f"needs {needed.what}: --{needed.option} FILE ({needed.command} makes one)"
                continue
            spec = f"{recipe.method}:file={file}"
            problem = learned_problem(spec, cells)
        teacher = (teachers or {}).get(recipe.teacher, recipe.weights)
        key = (teacher, recipe.prompts, problem)
        job = jobs.get(key) or Job(
            teacher=teacher,
            prompts=recipe.prompts,
            recipes=(),
            specs=(),
            reason=problem or ("" if download else missing_weights(teacher)),
            fetchable=not problem,
        )
        jobs[key] = replace(job, recipes=(*job.recipes, recipe), specs=tuple(dict.fromkeys((*job.specs, spec))))
    return Plan(table=table, cells=tuple(cells), jobs=tuple(jobs.values()), left_out=left_out)


def missing_weights(teacher: str) -> str:
    """Why a teacher cannot be loaded without the network; empty where it can."""
    try:
        with hub.no_network():
            check_teacher(teacher)
    except TeacherError as error:
        return str(error)
    return ""


def learned_problem(spec: str, cells: Sequence[PlannedCell]) -> str:
    """Why a method's learned file cannot be used on these cells; empty where it can."""
    try:
        method = create_method(spec)
        if isinstance(method, ViTProbe):
            for cell in cells:
                if cell.dataset is not None:
                    method.check_classes(cell.dataset.class_names)
    except UsageError as error:
        return str(error)
    return ""


def _cell(
    table: PaperTable, column: str, root: Path | None, *, limit: int | None, seed: int, from_clean: bool
) -> PlannedCell:
    name = "imagenet-c" if table.corrupted else column
    (opener,) = plan_cells(
        [name],
        root=root,
        corruptions=[column if table.corrupted else CLEAN],
        limit=limit,
        seed=seed,
        from_clean=from_clean,
    )
    try:
        return PlannedCell(column=column, open=opener, dataset=opener())
    except UsageError as error:
        return PlannedCell(column=column, open=opener, dataset=None, reason=str(error).removeprefix(f"{name}: "))


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What was measured on this machine, for one run."""

    classes: tuple[int, ...]
    """Numbers of classes that were measured: the fewest and the most of the cells, or one."""
    seconds: Mapping[str, tuple[float, ...]]
    """By method, seconds per image with each of these numbers of classes."""
    per_text: float
    """Seconds to encode a class name in one template."""

    def image(self, method: str, classes: int) -> float:
        """Seconds per image with a number of classes, interpolated between those measured."""
        return float(np.interp(classes, self.classes, self.seconds[method]))


def measure(teacher: Teacher, methods: Sequence[Method], cells: Sequence[PlannedCell]) -> Rates:
    """Time the methods on an image of noise, with the class names of the cells with the fewest and the most classes.

    A method that takes less than two seconds is timed a second time, when everything is warm.
    """
    sets = sorted((cell.dataset for cell in cells if cell.dataset), key=lambda dataset: len(dataset.class_names))
    chosen = {len(dataset.class_names): dataset for dataset in (sets[0], sets[-1])}
    begun = time.perf_counter()
    teacher.encode_text([f"a photo of a {name}." for name in sets[-1].class_names[:TEXTS]])
    per_text = (time.perf_counter() - begun) / min(TEXTS, max(chosen))
    found: dict[str, list[float]] = {method.name: [] for method in methods}
    for dataset in chosen.values():
        head = ZeroShotHead.build(teacher, dataset.class_names, ("a photo of a {}.",))
        for method in methods:
            if isinstance(method, AsPublished):
                method.begin(dataset.name)
                method.encode_texts(teacher, head)
            seconds = _time(teacher, head, method)
            found[method.name].append(_time(teacher, head, method) if seconds < LONG else seconds)
    return Rates(
        classes=tuple(chosen),
        seconds={name: tuple(values) for name, values in found.items()},
        per_text=per_text,
    )


def _time(teacher: Teacher, head: ZeroShotHead, method: Method) -> float:
    """Seconds that a method takes for an image, with all that it uses."""
    noise = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)
    batch = TimedBatch(["noise"], [Image.fromarray(noise)], teacher, head, stream_length=1)
    if method.stream:
        cast(StreamMethod, method).reset()
    _, own, shared = batch.measure(partial(method.predict, batch))
    return own + shared


def expected_seconds(job: Job, plan: Plan, methods: Sequence[Method], rates: Rates, out: Path) -> float:
    """How long a run will take by the measured rates: texts once for each label set, then what is left of the images.

    Reading the images is not in it: threads do that meanwhile.
    """
    done = _done(out / job.folder)
    total, texts = 0.0, set()
    for cell in plan.ready:
        assert cell.dataset is not None
        templates = job.templates or cell.dataset.templates
        texts |= {template.format(name) for template in templates for name in cell.dataset.class_names}
        share = 1 - done.get(cell.dataset.cell, 0) / (len(cell.dataset.samples) * len(methods))
        classes = len(cell.dataset.class_names)
        total += share * len(cell.dataset.samples) * sum(rates.image(method.name, classes) for method in methods)
    return total + len(texts) * rates.per_text


def _done(folder: Path) -> dict[str, int]:
    """By cell, how many rows a run folder holds already."""
    if RunFolder(folder).read_run() is None:
        return {}
    return {cell: RunFolder(folder).read(cell, ["position"]).num_rows for cell in Records.open(folder).cells}
