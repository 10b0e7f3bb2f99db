"""Fill a store: every image and its views through the teacher, once; stopped at any time, and continued.

Under ``torchrun`` process r of w encodes every w-th of the images that are missing. Features are written before 30
seconds of work have come together, so that no more than that is lost by a kill.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from apm.errors import ApmError, UsageError
from apm.images.files import writing
from apm.processes import ALONE, Group
from apm.teachers.base import Teacher
from apm.test_time.views import check, check_input

from ..runs.environment import describe
from ..runs.file_state import FileState, named_changes
from ..runs.locks import lock_folder, patience
from ..runs.progress import Progress
from .filling import EncodeOptions, Filling, Plan
from .layout import PRECISIONS, CellFolder, StoreKey, cell_identity, differing, read_store, size, write_store
from .shards import BLOCK_BYTES, merge, places, read_shards

if TYPE_CHECKING:
    from ..datasets import Dataset

_ROW_BYTES = 200  # of an image in the tables beside the features, at most


@dataclass
class Encoded:
    """What came of it."""

    path: Path
    images: int
    """In all cells asked for."""
    computed: int
    """Of these, by this session."""
    failed: int
    """Of these, images that cannot be decoded."""


def store_key(teacher: Teacher, options: EncodeOptions) -> StoreKey:
    """What the features of a store so filled depend on.

    Raises:
        UsageError: a number of views, a share or a precision that cannot be, or a teacher that has no views.
    """
    check(options.views, options.min_area)
    check_input(teacher, options.views)
    if options.precision not in PRECISIONS:
        raise UsageError(f'precision is "{options.precision}"; features are stored in {" or ".join(PRECISIONS)}.')
    return StoreKey(
        teacher=teacher.identity,
        dim=teacher.dim,
        views=options.views,
        min_area=options.min_area,
        seed=options.seed,
        precision=options.precision,
    )


def encode(
    path: Path,
    cells: Sequence[Callable[[], Dataset]],
    teacher: Teacher,
    options: EncodeOptions,
    *,
    group: Group = ALONE,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_note: Callable[[str], None] = lambda text: None,
    on_failure: Callable[[str], None] = lambda text: None,
    on_warning: Callable[[str], None] = lambda text: None,
) -> Encoded:
    """Encode what a store does not yet have of some cells.

    Args:
        path: the store; made where it does not exist.
        cells: open their data sets.
        teacher: encodes images and views.
        options: which views, and how they are kept.
        group: this process's place among those that share the work.
        on_progress: called after every batch.
        on_note: called with a sentence for people: how large the store will be, what is encoded again.
        on_failure: called with a sentence for each image that cannot be decoded.
        on_warning: called with each warning of a data set.

    Raises:
        UsageError: another process has the store; it is of another teacher, of other views or images (what differs is
            named); or the disk cannot hold it.
        ApmError: the disk cannot be written, or the teacher's numbers are beyond float16. What was written is whole.
    """
    key = store_key(teacher, options)
    lock, plan, refusal = None, None, None
    sessions: list[dict[str, Any]] = []
    started = time.monotonic()
    if group.first:
        try:
            lock = lock_folder(path, patience(group.world), busy="Another apm encode")
            sessions, plan = _prepare(path, cells, key, on_note, on_warning)
            sessions.append(_session(options, teacher, group))
            write_store(path, key, sessions)
        except ApmError as error:
            refusal = error
    try:
        refusal, plan = group.broadcast((refusal, plan))
        if refusal is not None:
            raise refusal
        assert plan is not None
        work = Filling(path, key, teacher, options, group, plan, on_progress, on_failure)
        for number, (cell, open_cell) in enumerate(zip(plan.missing, cells, strict=True)):
            work.fill(number, cell, open_cell)
        group.barrier()
        if group.first:
            sessions[-1]["seconds"] = round(time.monotonic() - started, 3)
            write_store(path, key, sessions)
            _finish(path, key, plan)
        group.barrier()
        return Encoded(path, sum(map(len, plan.numbers.values())), work.done, _failed(path, key, plan))
    finally:
        if lock is not None:
            lock.release()


def _session(options: EncodeOptions, teacher: Teacher, group: Group) -> dict[str, Any]:
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    about = {"command": list(options.command), "teacher": teacher.name, "started": started, "seconds": 0.0}
    return {**about, "processes": group.world, **describe(teacher.device)}


def _prepare(
    path: Path,
    cells: Sequence[Callable[[], Dataset]],
    key: StoreKey,
    on_note: Callable[[str], None],
    on_warning: Callable[[str], None],
) -> tuple[list[dict[str, Any]], Plan]:
    """Check that the store is the one asked for, find out what it lacks, and whether the disk has room for that."""
    earlier = read_store(path)
    if earlier is not None and (found := differing(vars(earlier[0]), vars(key))):
        raise UsageError(
            f"{path} holds other features. {found}. Use the same settings, or encode into another folder with --out."
        )
    plan, fresh = Plan(), []
    for open_cell in cells:
        dataset = open_cell()
        if dataset.cell in plan.missing:
            raise UsageError(f"{dataset.cell} is requested twice.")
        for warning in dataset.warnings:
            on_warning(f"{dataset.cell}: {warning}")
        folder, state = CellFolder.of(path, dataset.cell), FileState.of(dataset.samples)
        known = _known(path, folder, dataset, state)
        added = [place for place, sample in enumerate(dataset.samples) if sample.id not in known]
        if added:
            samples = [dataset.samples[place] for place in added] if known else None
            fresh.append((folder, dataset, state.part(added), samples))
        by_id = known | {dataset.samples[place].id: len(known) + more for more, place in enumerate(added)}
        there = _there(folder, key, len(by_id), on_note) if known else np.zeros(len(by_id), dtype=bool)
        plan.numbers[dataset.cell] = numbers = np.array([by_id[sample.id] for sample in dataset.samples])
        plan.missing[dataset.cell] = np.sort(numbers[~there[numbers]])
    _check_room(path, plan, key, on_note)
    for folder, dataset, state, samples in fresh:
        folder.write(dataset, state, samples)
    plan.digests = {cell: CellFolder.of(path, cell).digest(key) for cell in plan.missing}
    return (earlier[1] if earlier else []), plan


def _known(path: Path, folder: CellFolder, dataset: Dataset, state: FileState) -> dict[str, int]:
    """The numbers of a cell's images by id; empty where the store does not have the cell.

    The data set may be the cell's images, some of them, or these and more, as with a larger ``--limit``.

    Raises:
        UsageError: the cell is of other images, or their files have changed.
    """
    there, asked = folder.read(), cell_identity(dataset)
    if there is None:
        return {}
    instead = "Put them back, or encode into another folder with --out."
    ids, before = folder.images()
    known = {name: number for number, name in enumerate(ids)}
    shared = [place for place, sample in enumerate(dataset.samples) if sample.id in known]
    samples = [dataset.samples[place] for place in shared]
    numbers, labels = [known[sample.id] for sample in samples], folder.labels()
    part = len(shared) in (len(known), len(dataset.samples))
    if part and all(sample.label == labels[number] for sample, number in zip(samples, numbers, strict=True)):
        asked["fingerprint"] = there["fingerprint"]
    if found := differing(there, asked):
        raise UsageError(f"{path} holds {dataset.cell} of other images. {found}. {instead}")
    if changes := before.part(numbers).changes(state.part(shared)):
        raise UsageError(
            f"{len(changes)} of the {len(samples)} images of {dataset.cell} have changed since {path} was "
            f"begun: {named_changes(changes, samples)}. {instead}"
        )
    return known


def _there(folder: CellFolder, key: StoreKey, images: int, on_note: Callable[[str], None]) -> NDArray[np.bool_]:
    """Which images a sound shard has; damaged ones are removed."""
    shards, damaged = read_shards(folder.path, folder.digest(key), key, verify=True)
    for damage in damaged:
        on_note(f"{damage}. Its features are encoded again, unless another file has them.")
        with writing(damage.path):
            damage.path.unlink(missing_ok=True)
    return np.asarray(places(shards, images)[:, 0] >= 0)


def _check_room(path: Path, plan: Plan, key: StoreKey, on_note: Callable[[str], None]) -> None:
    """Say how large the store will be, and refuse where the disk cannot hold it."""
    images, missing = sum(map(len, plan.numbers.values())), sum(map(len, plan.missing.values()))
    spare = 2 * min(BLOCK_BYTES, missing * key.image_bytes)  # while shards are merged
    needed = missing * (key.image_bytes + _ROW_BYTES) + spare
    place = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    there = (
        f"{images - missing:,} are there, {missing:,} are to be encoded" if missing < images else "none is there yet"
    )
    on_note(
        f"{path}: {images:,} images × {key.views} views × {key.dim} numbers in {key.precision}, "
        f"{size(images * key.image_bytes)} in all; {there}. {size(free)} are free."
    )
    if missing and needed > free:
        raise UsageError(
            f"The disk of {path} cannot hold it: {size(needed)} are needed and {size(free)} are free. Free some space, "
            "give another disk with --out, or fewer --views or a --limit."
        )


def _finish(path: Path, key: StoreKey, plan: Plan) -> None:
    """Merge the cells that are complete now.

    Raises:
        ApmError: shards were removed while others were written.
    """
    for cell, numbers in plan.numbers.items():
        folder = CellFolder.of(path, cell)
        shards, _ = read_shards(folder.path, plan.digests[cell], key, verify=False)
        there = places(shards, folder.count())[:, 0] >= 0
        if gone := int((~there[numbers]).sum()):
            raise ApmError(f"{path}: the features of {gone} images of {cell} were removed. Run the same command again.")
        if there.all():
            merge(folder.path, plan.digests[cell], key, len(there))


def _failed(path: Path, key: StoreKey, plan: Plan) -> int:
    """How many images could not be decoded, by this session or an earlier one."""
    failed = 0
    for cell, digest in plan.digests.items():
        shards, _ = read_shards(CellFolder.of(path, cell).path, digest, key, verify=False)
        failed += len({row for shard in shards for row in shard.errors}.intersection(plan.numbers[cell].tolist()))
    return failed
