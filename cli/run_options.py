"""Options that `apm bench`, `apm encode` and `apm reproduce` share: which images, and how the machine works."""

# ruff: noqa: RUF009  (`setting` makes fields)
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apm.benchmarks.protocols import PROTOCOLS
from apm.settings import at_least, between, check_values, setting

from .options import flag

if TYPE_CHECKING:
    from apm.benchmarks.datasets import Dataset
    from apm.teachers.base import Teacher

DATA, METHOD, RUN, OUTPUT = "Data", "Methods", "The run", "Output"  # panels of the help

DataSets = Annotated[
    list[str] | None,
    typer.Argument(metavar="DATASET…", help="Data sets, or the suites natural-shifts and cross-dataset."),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no notes on stderr.", rich_help_panel=OUTPUT)
]
TEACHER_HELP = "As for apm classify. Default: ViT-B-16/openai, or embedded if its weights are not available."
VIEWS_HELP = "Number of augmented views, for every method that uses them."
PROTOCOL_HELP = ". ".join(f"{name}: {what}" for name, what in PROTOCOLS.items())


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the data sets are, and how much of each is used.

    Raises:
        UsageError: a value that cannot work.
    """

    root: Path | None = setting(
        None, "Folder that contains the data sets, or a data set's own folder. Default: APM_DATA."
    )
    from_clean: bool = setting(
        False, "Create imagenet-c on the fly from the clean ImageNet under the root instead of reading its files."
    )
    limit: int | None = setting(
        None, "Use only this many images, drawn evenly from the classes by the seed.", check=at_least(1)
    )

    def __post_init__(self) -> None:
        """Check each value."""
        check_values(self, flag)


@dataclass(frozen=True, kw_only=True)
class Cells(Place):
    """Which images of which data sets."""

    corruption: list[str] | None = setting(
        None,
        "A corruption of ImageNet-C, clean, or all (the 15). Repeat for several. imagenet-c reads its files; images of "
        "other data sets are corrupted as they are read.",
    )
    level: list[int] | None = setting(None, "Severity, 1 to 5. Repeat for several. Default: 5.")
    source: str | None = setting(None, "hf:REPO[:SPLIT]: stream the data set from the Hugging Face hub.")
    label_set: str | None = setting(None, "For the data set folder: classify among all labels of this set.")

    def plan(self, names: list[str], seed: int) -> list[Callable[[], Dataset]]:
        """List the cells: each opens its data set. Errors as `plan_cells`."""
        from apm.benchmarks.runs.plan import plan_cells

        return plan_cells(
            names,
            root=self.root,
            corruptions=self.corruption or (),
            levels=self.level or (5,),
            limit=self.limit,
            seed=seed,
            from_clean=self.from_clean,
            source=self.source,
            label_set=self.label_set,
        )


@dataclass(frozen=True, kw_only=True)
class Work:
    """How the work is done; apart from the seed, no answer depends on it.

    Raises:
        UsageError: a value that cannot work.
    """

    device: str = setting("auto", "auto, cpu or cuda.")
    batch_size: int | None = setting(None, "Images at a time. Answers do not depend on it.", check=at_least(1))
    workers: int = setting(4, "Number of threads that decode images.", check=at_least(1))
    seed: int = setting(0, "Seed of subset, stream order, views, corruptions, students.", check=between(0, 2**63 - 1))

    def __post_init__(self) -> None:
        """Check each value."""
        check_values(self, flag)

    def images_at_a_time(self, teacher: Teacher) -> int:
        """The batch size: what was asked for, else what suits the teacher's device."""
        return self.batch_size or (64 if teacher.device.type == "cuda" else 8)
