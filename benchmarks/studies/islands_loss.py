"""Whether wholes break into parts as the loss falls: `python -m apm.benchmarks.studies.islands_loss --root DIR`.

Modi & Rawat 2024 (Figure 3) show it in pictures. Here a student's field is kept whenever its loss has fallen by another
half decade, from 1e-1 to ``--until``, and evaluated in float64 at the student's own locations. The size of its regions
is measured in several ways (``SIZES``): at a fixed cosine, and relative to the field's own spread, because a nearly
constant field is one region at any fixed cosine. Further conditions are controls in which no region can follow the
image, other learning rates, and the teacher's grid as target, whose loss is sampled in eighths of a decade below its
first value. ``--rows FILE`` keeps a row per image: the same command resumes from it.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image
from scipy.stats import spearmanr

from apm.teachers import load_teacher
from apm.teachers.base import Teacher
from apm.test_time.island_fields import prepare, trainers
from apm.test_time.label_maps import LR
from apm.test_time.options import StudentOptions
from apm.test_time.queries import ALL

from ..datasets import open_dataset
from .region_sizes import PARTS, SIZES, measures
from .rows import Row, continued
from .study import ROOT, USUAL, Options, Record, Study, markdown, mean_and_error, plus_minus, run, signed
from .watching import Moment, Watcher

CONDITIONS = {
    "image": "the target is the teacher's token of the image, as in the paper",
    "random target": "the target is a vector of random direction and the same length",
    "other target": "the target is another image's token",
    "3 × lr": "as *image*, with three times the learning rate",
    "lr / 3": "as *image*, with a third of the learning rate",
    "grid": "the target is the teacher's grid of the image",
    "grid, random": "the target is a grid of random directions and the same lengths",
}
LATE = 1e-2
"""Loss from which on sizes are compared by themselves: what changes first is the draw of the first weights."""


@dataclass(frozen=True)
class Fit:
    """One condition: what is fitted to what."""

    watcher: Watcher
    control: str
    """Of `apm.test_time.island_fields.prepare`."""


class Player:
    """Fits one image's students under all conditions, and measures their fields."""

    def __init__(self, teacher: Teacher, options: Options) -> None:
        self.teacher, self.options = teacher, options
        student = StudentOptions(preset=options.preset, steps=options.steps, seed=options.seed, queries=ALL)
        made = trainers(student.model(teacher.dim), student.training(teacher.device), grid_lr=options.grid_lr)
        self.model, adapt = made["cls"].model, made["cls"].config
        self.lr = adapt.lr

        def watcher(factor: float = 1) -> Watcher:
            return Watcher(self.model, replace(adapt, lr=factor * adapt.lr), device=options.device)

        as_it_is = watcher()
        self.fits = {
            "image": Fit(as_it_is, "image"),
            "random target": Fit(as_it_is, "random target"),
            "other target": Fit(as_it_is, "other target"),
            "3 × lr": Fit(watcher(3), "image"),
            "lr / 3": Fit(watcher(1 / 3), "image"),
        }
        grid = Watcher(made["grid"].model, made["grid"].config, device=options.device)
        self.fits |= {"grid": Fit(grid, "image"), "grid, random": Fit(grid, "random target")}
        for name in options.without:
            del self.fits[name]

    def __call__(self, image: Image.Image, other: Image.Image, condition: str) -> Row:
        """Moments of one condition, each with its measures."""
        subject = prepare(image, other, self.teacher, self.model, parts=PARTS, seed=self.options.seed)
        fit = self.fits[condition]
        moments = self._moments(fit.watcher, subject.inputs[fit.control], condition.startswith("grid"))
        return {
            "condition": condition,
            "moments": [
                {"passed": passed, "step": one.step, "loss": one.loss, **measures(one, self.model.grid)}
                for passed, one in moments
            ],
        }

    def _moments(self, watcher: Watcher, inputs: Any, by_grid: bool) -> Iterator[tuple[float, Moment]]:
        """The student whenever its loss has passed a threshold, the lowest of those passed at once, and that."""
        passing = Passing(self.options.until, of_first=by_grid)
        for one in watcher(inputs, passing):
            yield passing.last, one
            if passing.last <= self.options.until * 1.001:
                return


class Passing:
    """Says when a loss is at or below the next threshold: half decades from 1e-1 on, or eighths below the first."""

    def __init__(self, until: float, *, of_first: bool = False) -> None:
        self.until, self.of_first = until, of_first
        self.first: float | None = None
        self.last = math.inf
        """The threshold passed last."""

    def __call__(self, step: int, loss: float) -> bool:
        """Whether a threshold was passed by this step that was not before."""
        if self.first is None:
            self.first = loss
        start, each = (self.first, 8) if self.of_first else (1.0, 2)
        passed = math.floor(each * math.log10(start / loss) + 1e-9) if loss > 0 else 0
        lowest = self.until if loss <= self.until else start * 10 ** (-passed / each)
        if passed < (1 if self.of_first else 2) or lowest >= self.last * 0.999:
            return False
        self.last = lowest
        return True


def measure(options: Options) -> Record:
    """Watch every image, or as many as are done at Ctrl-C; the image after it is the other one."""
    data = open_dataset("folder", options.root)
    teacher = load_teacher(options.teacher, device=options.device)
    player = Player(teacher, options)
    samples = [data.samples[number] for number in np.random.default_rng(options.seed).permutation(len(data.samples))]
    kept = ("preset", "steps", "grid_lr", "until", "without", "seed")
    settings = {name: getattr(options, name) for name in kept}
    began = time.perf_counter()
    pairs = itertools.product(range(min(options.limit, len(samples))), player.fits)
    rows = continued(
        list(pairs),
        lambda pair: player(samples[pair[0]].load(), samples[(pair[0] + 1) % len(samples)].load(), pair[1]),
        "students",
        path=options.rows,
        settings={**settings, "dataset": data.name, "samples": len(samples), "teacher": teacher.identity},
    )
    return {
        "dataset": data.name,
        "sample_ids": [sample.id for sample in samples[: -(-len(rows) // len(player.fits))]],
        "teacher": teacher.identity,
        "settings": {**settings, "locations": player.model.grid, "lr": player.lr, "precision": "fp32, read in fp64"},
        "seconds": time.perf_counter() - began,
        **summary(rows),
    }


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Means over images.

    Returns:
        ``images``: condition → how many; ``moments``: condition → threshold → ``images`` that passed it, and mean and
        error of each measure (grids: thresholds are not shared, so none); ``correlation``: condition → size → see
        `correlation`, of all moments; ``late``: the same of those with a loss of at most `LATE`, grids left out;
        ``ratio``: condition → size → its value at the last moment over that at `LATE` (grids: over that at the first
        moment), mean and error; ``last``: condition → `_last`; ``rounding``: the largest of all.
    """
    runs: dict[str, list[list[Row]]] = {}
    for row in rows:
        runs.setdefault(row["condition"], []).append(row["moments"])
    token = {name: of for name, of in runs.items() if not name.startswith("grid")}
    late = {name: [_late(moments) for moments in of] for name, of in token.items()}
    return {
        "images": {name: len(of) for name, of in runs.items()},
        "moments": {name: _by_threshold(of) for name, of in token.items()},
        "correlation": {name: _correlations(of) for name, of in runs.items()},
        "late": {name: _correlations(of) for name, of in late.items()},
        "ratio": {name: _ratios(of) for name, of in {**runs, **late}.items()},
        "last": {name: _last(of) for name, of in runs.items()},
        "rounding": max(one["rounding"] for row in rows for one in row["moments"]),
    }


def _last(runs: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """Images of which no threshold was passed, the highest of the others' last losses, and the mean step to these."""
    ends = [moments[-1] for moments in runs if moments]
    return {
        "without": len(runs) - len(ends),
        "loss": max((one["loss"] for one in ends), default=None),
        "step": float(np.mean([one["step"] for one in ends])) if ends else None,
    }


def _late(moments: Sequence[Row]) -> list[Row]:
    return [one for one in moments if one["passed"] <= LATE * 1.001]


def _by_threshold(runs: Sequence[Sequence[Row]]) -> dict[str, Any]:
    found: dict[str, list[Row]] = {}
    for one in (one for moments in runs for one in moments):
        found.setdefault(f"{one['passed']:.1e}", []).append(one)
    names = (*SIZES, "spread", "directions", "step")
    return {
        passed: {"images": len(some), **{name: mean_and_error([one[name] for one in some]) for name in names}}
        for passed, some in sorted(found.items(), key=lambda item: -float(item[0]))
    }


def _correlations(runs: Sequence[Sequence[Row]]) -> dict[str, Any]:
    return {name: correlation([[(one["loss"], one[name]) for one in moments] for moments in runs]) for name in SIZES}


def correlation(runs: Sequence[Sequence[tuple[float, float]]]) -> dict[str, Any]:
    """Spearman's correlation of size and loss, image by image: above 0 where regions get smaller as the loss falls.

    Args:
        runs: for each image (loss, size) of its moments.

    Returns:
        ``mean``: mean and error over the images where it is defined, None without any; ``smaller``, ``larger``: images
        with a correlation above and below 0; ``constant``: those whose size never changes, or with less than three
        moments.
    """
    found = []
    for run_ in runs:
        losses, sizes = zip(*run_, strict=True) if run_ else ((), ())
        if len(run_) > 2 and len(set(sizes)) > 1:
            found.append(float(spearmanr(losses, sizes).statistic))
    return {
        "mean": mean_and_error(found) if found else None,
        "smaller": sum(one > 0 for one in found),
        "larger": sum(one < 0 for one in found),
        "constant": len(runs) - len(found),
    }


def _ratios(runs: Sequence[Sequence[Row]]) -> dict[str, list[float] | None]:
    """Of each size: the last over the first of an image's moments."""
    usable = [moments for moments in runs if len(moments) > 1]
    return {
        name: mean_and_error([one[-1][name] / one[0][name] for one in usable]) if usable else None for name in SIZES
    }


def table(records: Sequence[Record]) -> str:
    """Records as markdown, one after the other."""
    meanings = "\n".join(f"- *{name}*: {meaning}" for name, meaning in {**SIZES, **CONDITIONS}.items())
    return "\n\n".join([meanings, *(_table(record) for record in records)])


def _table(record: Record) -> str:
    settings, conditions = record["settings"], list(record["correlation"])
    lowest = "; ".join(
        f"{name} {of['loss']:.0e} after {of['step']:.0f}" if of["step"] is not None else f"{name} none"
        for name, of in record["last"].items()
    )
    paragraphs = (
        f"**{settings['preset']} student**, {settings['locations']} × {settings['locations']} locations, "
        f"{_images(record)}. Highest final loss, and mean number of steps to it: {lowest}. Rounding is at most "
        f"{100 * record['rounding']:.1g} % of the variation between locations.",
        "Size, in locations, when the loss first reaches the value on the left; the target is the image's token:",
        _moments(record, "image"),
        *(
            ("The same with a random target:", _moments(record, "random target"))
            if "random target" in conditions
            else ()
        ),
        "Spearman's correlation of size and loss within an image (positive: smaller as the loss falls; bold: beyond "
        "two standard errors); in brackets the number of images in which regions shrink, grow, stay the same:",
        _compared(record, "correlation", _correlation),
        f"The same for losses of {LATE:g} and below:",
        _compared(record, "late", _correlation),
        f"Size at the lowest loss, relative to the size at {LATE:g} (grids: at the first threshold):",
        _compared(record, "ratio", lambda found: plus_minus(found, 2) if found else "–"),
        f"<sub>`{record['command']}` · {record['date']} · teacher `{record['teacher']}` · lr {settings['lr']:g} "
        f"({settings['grid_lr']:g} for grids) · at most {settings['steps']} steps · {settings['precision']} · seed "
        f"{settings['seed']} · ± is the standard error over images</sub>",
    )
    return "\n\n".join(paragraphs)


def _images(record: Record) -> str:
    """How many; where a run was ended early some conditions lack the last one."""
    least, most = min(record["images"].values()), max(record["images"].values())
    return f"{most} image{'s' * (most > 1)}" if least == most else f"{least} to {most} images"


def _moments(record: Record, condition: str) -> str:
    rows = [
        (
            passed,
            of["images"],
            f"{of['step'][0]:.0f}",
            *(plus_minus(of[name], 1) for name in SIZES),
            f"{100 * of['spread'][0]:.2f} %",
            plus_minus(of["directions"], 2),
        )
        for passed, of in record["moments"][condition].items()
        if passed.startswith("1.0")  # whole decades
    ]
    return markdown(("loss", "images", "step", *SIZES, "spread", "directions"), rows)


def _compared(record: Record, what: str, cell: Callable[[Any], str]) -> str:
    """A row a size, a column a condition."""
    found: Mapping[str, Any] = record[what]
    return markdown(("size", *found), ((name, *(cell(of[name]) for of in found.values())) for name in SIZES))


def _correlation(found: Mapping[str, Any]) -> str:
    counts = f"({found['smaller']}, {found['larger']}, {found['constant']})"
    return f"{signed(found['mean'], 2)} {counts}" if found["mean"] else f"– {counts}"


def plot(records: Sequence[Record]) -> None:
    """Draw sizes against the loss, a row a record."""
    from apm.figures.base import new_figure, save

    shown = [name for name in SIZES if name != "¼ spread"]
    colours = {condition: f"C{number}" for number, condition in enumerate(CONDITIONS)}
    figure = new_figure(13, 2.7 * len(records))
    axes = figure.subplots(len(records), len(shown), squeeze=False)
    for record, row in zip(records, axes, strict=True):
        for name, axis in zip(shown, row, strict=True):
            for condition, moments in record["moments"].items():
                means, errors = zip(*((*of[name], 0)[:2] for of in moments.values()), strict=True)  # of one image none
                losses = [float(passed) for passed in moments]
                axis.errorbar(losses, means, errors, color=colours[condition], marker=".", lw=1, label=condition)
            axis.set_xscale("log")
            axis.invert_xaxis()
            axis.set_title(f"{record['settings']['preset']}, {_images(record)}: {name}", fontsize=7)
            axis.set_xlabel("loss", fontsize=7)
            axis.tick_params(labelsize=6)
        row[0].set_ylabel("locations per region", fontsize=7)
    shown_as = dict(pair for row in axes for pair in zip(*reversed(row[0].get_legend_handles_labels()), strict=True))
    figure.legend(list(shown_as.values()), list(shown_as), loc="outside right upper", fontsize=7, frameon=False)
    save(
        figure,
        ROOT / "docs" / "islands-loss.png",
        settings=f"teacher {records[0]['teacher']} · target: the teacher's token, and controls · each point where the "
        "loss first reaches this value · bars: standard error over images · wavelength: locations per wave",
    )


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--until", type=float, default=1e-8, help="lowest loss examined (default: %(default)s)")
    parser.add_argument("--grid-lr", type=float, default=LR, help="learning rate of the grid's students")
    parser.add_argument(
        "--without",
        nargs="*",
        default=[],
        choices=[*CONDITIONS][1:],
        metavar="CONDITION",
        help="conditions to leave out",
    )


STUDY = Study(
    name="islands_loss",
    question=__doc__,
    measure=measure,
    table=table,
    arguments=_arguments,
    shared={**USUAL, "preset": "small", "steps": 600, "limit": 20, "rows": None},
    side_by_side=True,
    results="islands_loss-*.json",
    document=ROOT / "docs" / "islands.md",
    marker="islands and loss",
    plots=plot,
)

if __name__ == "__main__":
    sys.exit(run(STUDY.main))
