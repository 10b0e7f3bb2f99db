"""Why a zero-shot number of ours is not the published one: rules that look at what the record says, at nothing else.

Each rule is a function of a `Case` that returns a sentence, or None where the record gives no such cause. They stand in
the order of what they usually cost; a case may have several.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from apm.labels import prompt_templates
from apm.teachers import catalog

from ..datasets.specs import DATASETS
from ..runs.records import Records
from ..tables.stats import interval
from ..tables.table import Score
from .recipes import WEIGHTS, Recipe


@dataclass(frozen=True, kw_only=True)
class Case:
    """A cell of ours that is to be explained."""

    recipe: Recipe
    published: Mapping[str, str]
    """The published row, by the columns of its file."""
    run: Records
    cell: Mapping[str, Any]
    """What run.json says of the cell."""
    score: Score

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the record says of the teacher's architecture and input; empty in records made before it did."""
        return self.run.run["teacher"].get("settings", {})

    @property
    def weights(self) -> catalog.Entry | None:
        """What is known of the weights that stand for the published teacher."""
        return catalog.find(*WEIGHTS[self.recipe.teacher].split("/"))

    @property
    def same_model(self) -> bool:
        """Whether the run's teacher is of the published architecture."""
        return _model(self.run.run["teacher"]["name"]) == _model(WEIGHTS[self.recipe.teacher])


@dataclass(frozen=True)
class Cause:
    """A likely cause."""

    name: str
    """A key of `RULES`."""
    text: str


def causes(case: Case) -> list[Cause]:
    """All likely causes, the weightiest first."""
    found = ((name, rule(case)) for name, rule in RULES.items())
    return [Cause(name, text) for name, text in found if text is not None]


def _model(teacher: str) -> str:
    return teacher.partition("/")[0].removesuffix(catalog.QUICKGELU)


def _teacher(case: Case) -> str | None:
    if case.same_model:
        return None
    return f"the run's teacher is {case.run.run['teacher']['name']}, the published one {case.recipe.teacher}"


def _weights(case: Case) -> str | None:
    name = case.run.run["teacher"]["name"]
    if not case.same_model or catalog.find(*name.split("/", 1)) == case.weights:
        return None
    return f"the run's weights are {name}, and {WEIGHTS[case.recipe.teacher]} is taken for the published ones"


def _variant(case: Case) -> str | None:
    dataset, title = case.cell["dataset"], case.cell["title"]
    return None if title == dataset else f"the images are {title}, the published ones {dataset}"


def _unfinished(case: Case) -> str | None:
    if "incomplete" in case.score.marks:
        return f"the run is not finished: {case.score.n + case.score.failed:,} of {case.cell['images']:,} images"
    return f"{case.score.failed:,} images have no answer" if case.score.failed else None


def _subset(case: Case) -> str | None:
    images, total, whole = case.cell["images"], case.cell["total"], DATASETS[case.cell["dataset"]].images
    spread = f"; {_interval(case.score)}" if case.score.n else ""
    if images < total:
        return f"{images:,} of {total:,} images{spread}"
    if whole and total != whole:
        return f"{total:,} images, where {case.cell['dataset']} has {whole:,}{spread}"
    return None


def _interval(score: Score) -> str:
    assert score.accuracy is not None
    correct = np.arange(score.n) < round(score.accuracy * score.n / 100)
    low, high = interval(correct, np.arange(score.n))
    return f"the 95 % interval of ours is {100 * low:.1f} to {100 * high:.1f}"


def _generated(case: Case) -> str | None:
    return (
        "the corruptions were generated here; the official files are another draw" if case.cell["generated"] else None
    )


def _hub_split(case: Case) -> str | None:
    return f"the split of {case.cell['source']} is not CoOp's" if "hub split" in case.score.marks else None


def _quick_gelu(case: Case) -> str | None:
    used, entry = case.settings.get("quick_gelu"), case.weights
    if not case.same_model or entry is None or used is None or used == entry.quick_gelu:
        return None
    if entry.quick_gelu:
        return "the model was built without QuickGELU, which the published weights were trained with"
    return "the model was built with QuickGELU, which the published weights were trained without"


def _prompt_set(case: Case) -> str | None:
    expected = prompt_templates(case.recipe.prompts) if case.recipe.prompts else (_own_template(case),)
    used = case.run.run["prompt_sets"][case.cell["prompt_set"]]
    if set(used) == set(expected):
        return None
    wanted = f'"{expected[0]}"' if len(expected) == 1 else f"{len(expected)} templates"
    have = f'"{used[0]}"' if len(used) == 1 else f"{len(used)} templates"
    return f"the run's prompts are {have} ({case.cell['prompts']}), where {wanted} is taken for the published row"


def _own_template(case: Case) -> str:
    return DATASETS[case.cell["dataset"]].template


def _interpolation(case: Case) -> str | None:
    told = []
    if (kind := case.settings.get("interpolation", "bicubic")) != "bicubic":
        told.append(f"images are resized by {kind} interpolation, CLIP's by bicubic")
    if (resize := case.settings.get("resize", "shortest")) != "shortest":
        told.append(f"images are resized by the rule {resize}, CLIP's to their shortest side")
    size, entry = case.settings.get("image_size"), case.weights
    if case.same_model and entry is not None and size is not None and size != entry.image_size:
        told.append(f"the input is {size} pixels wide, that of the published weights {entry.image_size}")
    return "; ".join(told) or None


def _precision(case: Case) -> str | None:
    stores = {session["features"]["precision"] for session in case.run.run["sessions"] if "features" in session}
    used = sorted(({case.settings.get("precision", "fp32")} | stores) - {"fp32", "float32"})
    return f"features were computed or kept in {', '.join(used)}" if used else None


def _weights_not_stated(case: Case) -> str | None:
    if case.recipe.stated:
        return None
    return (
        f"the paper does not say which weights its {case.recipe.teacher} has; {WEIGHTS[case.recipe.teacher]} is a guess"
    )


def _prompts_not_stated(case: Case) -> str | None:
    return "the published row does not say its prompts" if case.published["prompts"] == "not stated" else None


def _not_recorded(case: Case) -> str | None:
    if case.settings:
        return None
    return "the record does not say how the teacher was built (QuickGELU, interpolation, precision): run it anew"


RULES: Mapping[str, Callable[[Case], str | None]] = {
    "teacher": _teacher,
    "variant": _variant,
    "unfinished": _unfinished,
    "subset": _subset,
    "generated": _generated,
    "split": _hub_split,
    "QuickGELU": _quick_gelu,
    "prompt set": _prompt_set,
    "interpolation": _interpolation,
    "weights": _weights,
    "precision": _precision,
    "weights not stated": _weights_not_stated,
    "prompts not stated": _prompts_not_stated,
    "not recorded": _not_recorded,
}
"""By the name of the cause, its rule."""
