"""The paper's Tables 1, 2 and 3 as data: which run gives which published row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..corruptions import CORRUPTIONS
from ..datasets.specs import SUITES

OWN = "own"
"""Word for the prompts that belong to each data set."""

WEIGHTS = {
    "ViT-B/16": "ViT-B-16/openai",
    "ViT-L/14": "ViT-L-14/openai",
    "ViT-H/14": "ViT-H-14-quickgelu/dfn5b",
}
"""By the paper's name of a teacher, the weights that are taken for it."""
NO_TEACHER, STAND_IN = "none", "embedded"
"""What the paper says of rows without a teacher, and what their runs take where no other is named: every run has a
teacher to compare with, which has no part in these rows' answers."""


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What a row needs that was learned from labels, as a file."""

    option: str
    """Of `apm reproduce`."""
    what: str
    command: str
    """What makes it."""


LEARNED = {
    "coop": Learned(option="coop", what="a learned prompt", command="apm prompts"),
    "cocoop": Learned(option="cocoop", what="a learned prompt", command="apm prompts"),
    "vit-probe": Learned(option="probe", what="a trained head", command="apm mae probe"),
    "ttt-mae": Learned(option="probe", what="a trained head", command="apm mae probe"),
    "mae-finetune": Learned(option="finetuned", what="a trained head", command="apm mae finetune"),
    "mae-joint": Learned(option="joint", what="a trained head", command="apm mae joint"),
}
"""By method, what it needs."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a published row is run here."""

    row: str
    """The published method."""
    teacher: str
    """The published teacher, a key of `WEIGHTS`, or `NO_TEACHER`."""
    method: str
    """Name of the method in the bench."""
    prompts: str | None = None
    """Prompt set; None for each data set's own."""
    stated: bool = True
    """Whether the paper says which weights its teacher has."""

    @property
    def learned(self) -> Learned | None:
        """What it needs that was learned from labels."""
        return LEARNED.get(self.method.removeprefix("tpt+"))

    @property
    def title(self) -> str:
        """The row, and its teacher where it has one."""
        return self.row if self.teacher == NO_TEACHER else f"{self.row}, {self.teacher}"

    @property
    def weights(self) -> str:
        """The teacher that is taken for the published one, as `apm bench --teacher` takes it."""
        return WEIGHTS.get(self.teacher, STAND_IN)


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """One table of the paper."""

    number: int
    title: str
    published: str
    """File of its numbers in `published/`."""
    columns: tuple[str, ...]
    """Data sets, or the corruptions of imagenet-c at level 5."""
    recipes: tuple[Recipe, ...]
    corrupted: bool = False


def _base(*others: Recipe, ensemble: str) -> tuple[Recipe, ...]:
    common = (
        Recipe(row="CLIP zero-shot", teacher="ViT-B/16", method="zero-shot"),
        Recipe(row=ensemble, teacher="ViT-B/16", method="zero-shot", prompts="openai"),
        Recipe(row="TPT", teacher="ViT-B/16", method="tpt"),
        Recipe(row="APM", teacher="ViT-B/16", method="apm"),
        Recipe(row="CoOp", teacher="ViT-B/16", method="coop"),
        Recipe(row="CoCoOp", teacher="ViT-B/16", method="cocoop"),
    )
    return (*common, *others)


PAPER: Mapping[int, PaperTable] = {
    1: PaperTable(
        number=1,
        title="Table 1: natural distribution shifts",
        published="natural_shifts.csv",
        columns=SUITES["natural-shifts"],
        recipes=_base(
            Recipe(row="TPT + CoOp", teacher="ViT-B/16", method="tpt+coop"),
            Recipe(row="TPT + CoCoOp", teacher="ViT-B/16", method="tpt+cocoop"),
            Recipe(row="CLIP zero-shot", teacher="ViT-L/14", method="zero-shot"),
            Recipe(row="APM", teacher="ViT-L/14", method="apm"),
            Recipe(row="OpenCLIP zero-shot", teacher="ViT-H/14", method="zero-shot", stated=False),
            Recipe(row="APM", teacher="ViT-H/14", method="apm", stated=False),
            ensemble="Ensemble (80 templates)",
        ),
    ),
    2: PaperTable(
        number=2,
        title="Table 2: ImageNet-C, level 5",
        published="imagenet_c_level5.csv",
        columns=tuple(sorted(CORRUPTIONS)),
        recipes=(
            Recipe(row="OpenCLIP zero-shot", teacher="ViT-L/14", method="zero-shot", stated=False),
            Recipe(row="APM", teacher="ViT-L/14", method="apm", stated=False),
            Recipe(row="Joint Train", teacher=NO_TEACHER, method="mae-joint"),
            Recipe(row="Fine-Tune", teacher=NO_TEACHER, method="mae-finetune"),
            Recipe(row="ViT Probe", teacher=NO_TEACHER, method="vit-probe"),
            Recipe(row="TTT-MAE", teacher=NO_TEACHER, method="ttt-mae"),
        ),
        corrupted=True,
    ),
    3: PaperTable(
        number=3,
        title="Table 3: cross-dataset",
        published="cross_dataset.csv",
        columns=SUITES["cross-dataset"],
        recipes=_base(ensemble="Ensemble"),
    ),
}
