"""What many views add to a field: `python -m apm.benchmarks.studies.pointing_views --root DIR --limit 400`.

The pointing game of the study `pointing`, for a student fitted to the grids of many views (``--grid-views``).
Baselines: a student fitted to the teacher's grid alone, that grid itself, finer grids (with the views' resolution, and
with as many pixels as all views together), and the average of the views without a student. Choose a ``--seed`` that was
not used while anything was tuned. ``--rows FILE`` keeps a row per composite: the same command resumes from it.
"""

from __future__ import annotations

import math
import sys
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from apm.student.cells import Cells
from apm.student.field import resample
from apm.teachers import load_teacher
from apm.teachers.base import Teacher
from apm.test_time.grid_views import GRID_SIDES, view_cells
from apm.test_time.inputs import student_inputs
from apm.test_time.label_maps import LR, STEPS, field_maps, label_maps, peak
from apm.test_time.options import StudentOptions
from apm.test_time.queries import ALL
from apm.test_time.trainer import TestTimeTrainer
from apm.test_time.views import pixels_id
from apm.text.zeroshot import ZeroShotHead

from ..datasets import open_dataset
from ..runs.environment import peak_memory
from ..tables.stats import mcnemar, standard_error
from .composites import Composite, composites
from .rows import Row, continued
from .study import ROOT, USUAL, Options, Record, Study, markdown, mean_and_error, plus_minus, run

OURS = "field, views"
SOURCES = {
    "grid": "the teacher's grid at its default size, upsampled bilinearly",
    "grid, as fine": "its grid at the input size that makes its cells as large as the average view's",
    "grid, same pixels": "its grid at the input size that has as many pixels as all views together",
    "views' average": "the mean of the views' cells that cover each location, without a student",
    "field, grid": "a student fitted to the grid at its default size",
    OURS: "a student fitted to the grids of all views",
    "field, guided": "the same, with colours in the queries (`--guide rgb`)",
}


def measure(options: Options) -> Record:
    """Paste the composites, play, and count."""
    teacher = load_teacher(options.teacher, device=options.device)
    data = open_dataset("folder", options.root)
    made = composites(data.samples, options.limit, canvas=options.canvas, side=options.side, seed=options.seed)
    head = ZeroShotHead.build(teacher, data.class_names, data.templates)
    kept = ("preset", "steps", "lr", "precision", "views", "canvas", "side", "size", "seed")
    settings = {name: getattr(options, name) for name in kept}
    player = Player(teacher, head, options)
    rows = continued(
        made,
        player,
        "composites",
        path=options.rows,
        settings={**settings, "dataset": data.name, "samples": len(data.samples), "teacher": teacher.identity},
    )
    return {
        "dataset": data.name,
        "composites": len(rows),
        "classes": len(data.class_names),
        "templates": list(data.templates),
        "teacher": teacher.identity,
        "teacher_sizes": player.sizes,
        "settings": {**settings, "locations": player.config.grid},
        "scores": scores(rows),
        "peak_bytes": peak_memory(teacher.device),
        "seconds": {name: float(np.mean([row["seconds"][name] for row in rows])) for name in rows[0]["seconds"]},
    }


class Player:
    """Plays one composite with every source."""

    def __init__(self, teacher: Teacher, head: ZeroShotHead, options: Options) -> None:
        self.teacher, self.head, self.options = teacher, head, options
        given = {name: getattr(options, name) for name in ("preset", "steps", "lr", "precision", "seed")}
        student = StudentOptions(**given, distil="grid", queries=ALL)
        self.config, adapt = student.model(teacher.dim), student.training(teacher.device)
        configs = {"grid": self.config, "views": self.config, "guided": replace(self.config, guide="rgb")}
        self.trainers = {name: TestTimeTrainer(one, adapt, device=options.device) for name, one in configs.items()}
        self.sizes = grid_sizes(teacher, options.views)

    def __call__(self, one: Composite) -> Row:
        """Whether each source points at the pasted square, and the seconds that students and views took."""
        began = time.perf_counter()
        identity = pixels_id(one.image)
        cells = view_cells(
            [one.image],
            self.teacher,
            self.config.grid,
            self.options.views,
            seed=self.options.seed,
            sample_ids=[identity],
        )
        seconds = {"views": time.perf_counter() - began}
        maps: dict[str, Tensor] = {}
        for name, size in self.sizes.items():
            maps[name] = self._grid_map(self.teacher.encode_grid(one.image, size=size), one.label)
        maps["views' average"] = self._grid_map(average(cells, self.config.grid), one.label)
        seen = student_inputs([one.image], self.teacher, self.config, grids=True)
        assert seen.grids is not None
        for name, target in (("grid", seen.grids), ("views", cells), ("guided", cells)):
            began = time.perf_counter()
            result = self.trainers[name].adapt(seen.pixels, seen.tokens, grids=target, keep_field=True)
            seconds[f"student, {name}"] = time.perf_counter() - began
            maps[f"field, {name}"] = field_maps(
                lambda rows, cols, result=result: result.features(rows, cols)[0],  # type: ignore[misc]
                self.config.grid,
                self.options.size,
                self.head,
                [one.label],
            ).log_odds[0]
        return {"hits": {name: one.holds(peak(maps[name])) for name in SOURCES}, "seconds": seconds}

    def _grid_map(self, grid: Tensor, label: int) -> Tensor:
        size = self.options.size
        smooth = resample(grid[None], size)[0].reshape(size, size, -1)
        return label_maps(smooth, self.head, [label]).log_odds[0]


def average(cells: Cells, side: int) -> Tensor:
    """Mean (side, side, D) of what one image's views say of each of the student's locations, by what they cover."""
    shares, features = cells.shares[0], cells.features[0]
    return ((shares.T @ features) / shares.sum(dim=0)[:, None]).reshape(side, side, -1)


def grid_sizes(teacher: Teacher, views: int) -> dict[str, int]:
    """Sides in pixels at which a teacher makes the grids that fields of many views are held against, see `SOURCES`."""
    size = teacher.grid_size
    return {
        "grid": size,
        "grid, as fine": whole(size / (sum(GRID_SIDES) / 2)),
        "grid, same pixels": whole(size * math.sqrt(views)),
    }


def whole(size: float) -> int:
    """The nearest multiple of 32 pixels, which the cells of all towers divide."""
    return max(32, 32 * round(size / 32))


def scores(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Share of hits, its standard error, by how much ours is above it with the half width of 95 %, McNemar's p."""
    ours = np.array([row["hits"][OURS] for row in rows])
    table = {}
    for source in SOURCES:
        mine = np.array([row["hits"][source] for row in rows])
        gain, *error = mean_and_error(ours.astype(float) - mine)
        table[source] = {
            "score": float(mine.mean()),
            "stderr": standard_error(float(mine.mean()), len(mine)),
            "gain": gain,
            "half": 1.96 * error[0] if error else math.nan,
            "p": mcnemar(int((mine & ~ours).sum()), int((~mine & ours).sum())),
        }
    return table


def table(record: Record) -> str:
    """Print a record as markdown."""
    settings, seconds, sizes = record["settings"], record["seconds"], record["teacher_sizes"]
    rows = []
    for source, row in record["scores"].items():
        own = source == OURS
        gain = "–" if own else f"{100 * row['gain']:+.1f} ± {100 * row['half']:.1f}"
        p = "–" if own else ("< 0.001" if row["p"] < 0.001 else f"{row['p']:.3f}")
        rows.append((source, f"{plus_minus((100 * row['score'], 100 * row['stderr']), 1)} %", gain, p))
    paragraphs = (
        markdown(("map", "hit rate", f"gain of {OURS}", "p (McNemar)"), rows),
        "\n".join(f"- *{source}*: {meaning}" for source, meaning in SOURCES.items()),
        f"{record['composites']} composites, {record['classes']} classes. Input size of the teacher's grids in pixels: "
        f"{'; '.join(f'{name} {size}' for name, size in sizes.items())}. Seconds per image: "
        f"{'; '.join(f'{name} {value:.2f}' for name, value in seconds.items())}. Peak memory of the process: "
        f"{record['peak_bytes'] / 2**20:.0f} MiB.",
        f"<sub>`{record['command']}` · {record['date']} · teacher `{record['teacher']}` · {settings['views']} views · "
        f"{settings['preset']} student, {settings['locations']} × {settings['locations']} locations, "
        f"{settings['steps']} steps, lr {settings['lr']:g}, {settings['precision']} · maps read at {settings['size']} "
        f"× {settings['size']} · seed {settings['seed']} · ± of a hit rate is its binomial standard error, of a gain "
        "half its 95 % interval</sub>",
    )
    return "\n\n".join(paragraphs)


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--views", type=int, default=16, help="views of an image (default: %(default)s)")
    parser.add_argument("--canvas", type=int, default=224, help="side of the images, in pixels")
    parser.add_argument("--side", type=int, default=96, help="side of the pasted squares, in pixels")
    parser.add_argument("--size", type=int, default=32, help="locations per side of the maps")
    parser.add_argument("--lr", type=float, default=LR)


STUDY = Study(
    name="pointing_views",
    question=__doc__,
    measure=measure,
    table=table,
    arguments=_arguments,
    shared={**USUAL, "preset": "small", "steps": STEPS, "precision": "fp32", "limit": 400, "rows": None},
    results="many-views.json",
    document=ROOT / "docs" / "fields.md",
    marker="pointing-views",
)


if __name__ == "__main__":
    sys.exit(run(STUDY.main))
