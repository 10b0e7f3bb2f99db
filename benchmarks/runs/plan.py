"""From what a user asks for to the cells and methods of a run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from apm.errors import UsageError, unknown

from ..corruptions import CORRUPTIONS, check_level
from ..datasets import DATASETS, Dataset, expand, open_dataset
from ..protocols import PROTOCOLS

if TYPE_CHECKING:
    from ..methods.base import Method
    from .run_record import RunOptions

CLEAN, ALL = "clean", "all"
"""Words for `--corruption` beside the names of corruptions."""


def plan_cells(
    names: Sequence[str],
    *,
    root: Path | None = None,
    corruptions: Sequence[str] = (),
    levels: Sequence[int] = (5,),
    limit: int | None = None,
    seed: int = 0,
    from_clean: bool = False,
    source: str | None = None,
    label_set: str | None = None,
) -> list[Callable[[], Dataset]]:
    """List the cells of a run: each opens its data set.

    Args:
        names: data sets and suites.
        root: folder that holds data sets.
        corruptions: names, ``clean`` for the images as they are, ``all`` for the 15. None given: clean, and all 15
            for imagenet-c.
        levels: severities for every corruption.
        limit, seed, from_clean, source, label_set: as `open_dataset`.

    Raises:
        UsageError: an unknown name, or options that do not go together. Nothing is opened here.
    """
    datasets = expand(names)
    if not datasets:
        raise UsageError(f"No data set is named. Known: {', '.join(DATASETS)}; see apm bench --list.")
    if source is not None and len(datasets) > 1:
        raise UsageError(f"--source works with one data set, but {len(datasets)} are named: {', '.join(datasets)}.")
    for level in levels:
        check_level(level)
    wanted = dict.fromkeys(name for given in corruptions for name in ((*CORRUPTIONS,) if given == ALL else (given,)))
    for name in wanted:
        if name != CLEAN and name not in CORRUPTIONS:
            raise unknown("corruption", name, [*CORRUPTIONS, CLEAN, ALL])
    cells: list[Callable[[], Dataset]] = []
    for dataset in datasets:
        corrupted_only = DATASETS[dataset].reader == "corrupted"
        if corrupted_only and CLEAN in wanted:
            raise UsageError(f"{dataset} holds no clean images; name the data set imagenet for them.")
        for corruption in wanted or (CORRUPTIONS if corrupted_only else (CLEAN,)):
            made = corruption != CLEAN
            for level in dict.fromkeys(levels) if made else (5,):
                cells.append(
                    partial(
                        open_dataset,
                        dataset,
                        root,
                        corruption=corruption if made else None,
                        level=level,
                        limit=limit,
                        seed=seed,
                        from_clean=from_clean and made,
                        source=source,
                        label_set=label_set if DATASETS[dataset].reader == "folder" else None,
                    )
                )
    return cells


def check_protocol(protocol: str, given: Mapping[str, object]) -> None:
    """Refuse an unknown protocol, and what `published` leaves no room for.

    Args:
        protocol: its name.
        given: options of views and prompts by name, with their values; None or empty: not given.
    """
    if protocol not in PROTOCOLS:
        raise unknown("protocol", protocol, PROTOCOLS)
    if protocol == "published" and (named := [name for name, value in given.items() if value]):
        raise UsageError(
            f"{' and '.join(named)} with --protocol published, which gives each method its authors' own. Leave one "
            "out; settings after a method's name, as in tpt:views=8, are possible."
        )


def plan_orders(
    folder: Path, methods: Sequence[Method], options: RunOptions, count: int
) -> list[tuple[Path, Sequence[Method], RunOptions]]:
    """List the runs of several orders: all methods in the first, in the others those whose answers depend on the order.

    Returns:
        For each its folder, its methods and its options; the seeds of the orders follow each other.

    Raises:
        UsageError: several orders, and to no method the order matters.
    """
    stream = [method for method in methods if method.stream]
    if count > 1 and not stream:
        named = ", ".join(method.name for method in methods)
        raise UsageError(f"--orders {count} needs methods whose answers depend on the order; none of {named} does.")
    runs: list[tuple[Path, Sequence[Method], RunOptions]] = [(folder, methods, options)]
    for seed in range(options.order_seed + 1, options.order_seed + count):
        runs.append((folder.with_name(f"{folder.name}-order-{seed}"), stream, replace(options, order=seed)))
    return runs


def default_folder(names: Sequence[str], teacher: str) -> Path:
    """Where a run goes when no folder is given: the same for the same data sets and teacher, to be continued."""
    return Path("runs") / re.sub(r"[^A-Za-z0-9._+-]+", "-", f"{'+'.join(names)}-{teacher}").strip("-")
