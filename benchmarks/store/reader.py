"""A store, opened for a run: features in place of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apm.errors import UsageError, few
from apm.teachers.base import Teacher

from ..methods.base import Method
from ..methods.published import AsPublished
from ..runs.file_state import FileState, named_changes
from .layout import CellFolder, StoreKey, cell_identity, differing, mending, read_store
from .shards import Shard, places, read_shards

if TYPE_CHECKING:
    from ..datasets import Dataset


class FeatureStore:
    """A store of features; `runs.source.Features` to a run.

    Attributes:
        path: its folder.
        key: what its features depend on besides the images.
        record: what a run writes down of it.
    """

    def __init__(self, path: Path, key: StoreKey, sessions: Sequence[dict[str, Any]]) -> None:
        self.path, self.key = path, key
        self.record: dict[str, str | int] = {
            "store": str(path),
            "key": key.digest,
            "precision": key.precision,
            "views": key.views,
        }
        self._mending = mending(sessions)

    @classmethod
    def open(cls, path: Path) -> FeatureStore:
        """Open a store for reading.

        Raises:
            UsageError: there is none, or its record is damaged or of another version.
        """
        found = read_store(path)
        if found is None:
            raise UsageError(f'No store at "{path}": a store holds store.json. Make one with apm encode … --out {path}')
        return cls(path, *found)

    def suits(self, teacher: Teacher, seed: int, methods: Sequence[Method], datasets: Sequence[str] = ()) -> None:
        """Check that these are the features that a run of these methods, on these data sets, would compute.

        Raises:
            UsageError: they are of another teacher, seed or kind of views, or too few; what differs is named.
        """
        there = {"teacher": self.key.teacher, "dim": self.key.dim, "seed": self.key.seed, "min_area": self.key.min_area}
        asked = {"teacher": teacher.identity, "dim": teacher.dim, "seed": seed}
        if found := differing(there, asked):
            raise UsageError(
                f"The features in {self.path} are not those of this run. {found}. Run with the store's settings, or "
                "make another store with apm encode … --out ANOTHER."
            )
        for name, (views, min_area) in wanted_views(methods, datasets).items():
            if views > self.key.views:
                raise UsageError(
                    f"{name} needs {views} views of each image, but {self.path} holds {self.key.views}: run with "
                    f"--views {self.key.views}, or encode {views} with apm encode … --views {views} --out ANOTHER."
                )
            if views > 1 and min_area is not None and (found := differing(there, {"min_area": min_area})):
                raise UsageError(f"{name} needs other views than {self.path} holds. {found}. Leave that setting out.")

    def check(self, dataset: Dataset, now: FileState) -> None:
        """Check that the store has sound features of a data set's images, as they are now.

        Every byte of the cell is read and compared with its checksum.

        Args:
            dataset: all of the images that were encoded, or some.
            now: its files. Files that are not there any more are no change: the store stands for them.

        Raises:
            UsageError: images or their files are others, some are missing, or shards are damaged; they are named, and
                so is the command that mends it.
        """
        numbers = self._numbers(dataset)
        folder = CellFolder.of(self.path, dataset.cell)
        labels = folder.labels()
        pairs = zip(dataset.samples, numbers, strict=True)
        if other := [sample.id for sample, number in pairs if sample.label != labels[number]]:
            raise self._others(dataset, f"{len(other)} labels differ: {few(other)}")
        then = folder.images()[1].part(numbers.tolist())
        changes = {n: what for n, what in then.changes(now).items() if now.sizes[n] is not None}
        if changes:
            what = f"{len(changes)} of {len(numbers)} have changed since they were encoded"
            raise self._others(dataset, f"{what}: {named_changes(changes, dataset.samples)}")
        self._whole(dataset, numbers, verify=True)

    def cell(self, dataset: Dataset) -> StoredCell:
        """The features of a data set that was checked."""
        return self._whole(dataset, self._numbers(dataset), verify=False)

    def _whole(self, dataset: Dataset, numbers: NDArray[np.int64], *, verify: bool) -> StoredCell:
        """The features of all samples, or a `UsageError` that says which are missing."""
        folder = CellFolder.of(self.path, dataset.cell)
        shards, damaged = read_shards(folder.path, folder.digest(self.key), self.key, verify=verify)
        found = places(shards, folder.count())[numbers]
        if missing := int((found[:, 0] < 0).sum()):  # a damaged shard whose rows are elsewhere too does no harm
            why = f" {damaged[0]}{', and others are' if len(damaged) > 1 else ''}." if damaged else ""
            raise UsageError(
                f"{self.path} lacks the features of {missing} of the {len(numbers)} images of {dataset.cell}.{why} To "
                f"encode what is missing: {self._mending}"
            )
        return StoredCell(self.key, shards, found)

    def _numbers(self, dataset: Dataset) -> NDArray[np.int64]:
        """The numbers in the store of a data set's samples."""
        folder = CellFolder.of(self.path, dataset.cell)
        there, asked = folder.read(), cell_identity(dataset)
        if there is None:
            have = ", ".join(sorted(path.parent.name for path in self.path.glob("*/cell.json"))) or "nothing"
            raise UsageError(
                f"{self.path} has no features of {dataset.cell}; it has {have}. Encode it with apm encode … --out "
                f"{self.path}"
            )
        if found := differing(there, {"generated": asked["generated"]}):
            raise self._others(dataset, found)
        if there["fingerprint"] == asked["fingerprint"]:
            return np.arange(len(dataset.samples))
        known = {name: number for number, name in enumerate(folder.images()[0])}
        if missing := [sample.id for sample in dataset.samples if sample.id not in known]:
            what = f"{len(missing)} of {len(dataset.samples)} are not among the {len(known)} of the store"
            raise self._others(dataset, f"{what}: {few(missing)}")
        return np.array([known[sample.id] for sample in dataset.samples])

    def _others(self, dataset: Dataset, what: str) -> UsageError:
        return UsageError(
            f"The images of {dataset.cell} are not those in {self.path}. {what}. Put the data back, or encode it again "
            "with apm encode … --out ANOTHER."
        )


@dataclass(frozen=True)
class StoredCell:
    """The features of one data set; `runs.source.CellFeatures` to a run."""

    key: StoreKey
    shards: Sequence[Shard]
    places: NDArray[np.int64]
    """(n, 2) of each sample, shard and row in it."""

    def error(self, number: int) -> str | None:
        """Why the image has no features."""
        shard, row = (int(place) for place in self.places[number])
        return self.shards[shard].errors.get(int(self.shards[shard].rows[row]))

    def views(self, numbers: Sequence[int]) -> StoredViews:
        """The features of some samples."""
        return StoredViews(self.key.views, self.key.min_area, self, tuple(numbers))


@dataclass(frozen=True)
class StoredViews:
    """Features of some images; `methods.base.KnownViews` to a batch."""

    count: int
    min_area: float
    cell: StoredCell
    numbers: tuple[int, ...]

    def first(self, count: int) -> Tensor:
        """The first `count` views' features: (B, count, D) float32."""
        found = torch.empty(len(self.numbers), count, self.cell.key.dim)
        for out, (number, row) in zip(found, self.cell.places[list(self.numbers)].tolist(), strict=True):
            shard = self.cell.shards[number]
            out[0] = shard.tokens[row]
            out[1:] = shard.views[row, : count - 1]
        return found


def wanted_views(methods: Sequence[Method], datasets: Sequence[str] = ()) -> dict[str, tuple[int, float | None]]:
    """By method that looks at views: how many of each image, and the smallest share of the image in them.

    Args:
        methods: of a run.
        datasets: of the run; methods as published look at other views of each.
    """
    wanted = {}
    for method in methods:
        if getattr(method, "encodes_views", False):
            continue
        if isinstance(method, AsPublished) and datasets:
            if looked_at := [one for name in datasets if (one := method.views(name))]:
                wanted[method.name] = max(looked_at, key=lambda one: one[0])
            continue
        views, min_area = method.settings.get("views"), method.settings.get("min_area")
        if isinstance(views, int):
            wanted[method.name] = views, None if min_area is None else float(min_area)
    return wanted
