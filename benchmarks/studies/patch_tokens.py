"""Does a field fitted to the class token alone recover the teacher's patch tokens?

``python -m apm.benchmarks.studies.patch_tokens --root DIR --rows rows.jsonl --record FILE``. A student is overfit to
the teacher's token of a photograph, and its field is read at the centres of the cells of the teacher's grid, which lies
in the same space. How close is it to the grid? Both readouts are tried: the object query, and the paper's mean.
Controls: fields that know nothing of the photograph's layout, a field fitted to the grid, and the teacher's own
patches, shuffled. All steps and readings are in float32, the last reading in float64. ``--rows FILE`` keeps a row per
photograph: the same command resumes from it. No label is used.
"""

from __future__ import annotations

import hashlib
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apm.errors import UsageError
from apm.student.field import resample
from apm.student.model import APM
from apm.teachers import load_teacher
from apm.teachers.base import Teacher
from apm.test_time.inputs import student_inputs
from apm.test_time.label_maps import LR, STEPS
from apm.test_time.options import StudentOptions
from apm.test_time.queries import ALL, parse_queries
from apm.test_time.trainer import TestTimeTrainer

from ..datasets import open_dataset
from .rows import Row, continued
from .study import ROOT, USUAL, Options, Record, Study, averaged, markdown, plus_minus, run

READOUTS = {"query": "object query", "mean": "mean"}
SOURCES = {
    **{f"token, {key}": f"the field fitted to the token, {name}" for key, name in READOUTS.items()},
    "other token": "the field fitted to another photograph's token, mean",
    "untrained": "the field before its first step",
    "repeated": "the token itself at every location",
    "others": "the mean patch of the other photographs",
    "others, place": "the same, for each location",
    "shuffled": "the photograph's own patches, shuffled",
    "grid": "the field fitted to the grid, in as many steps",
}
OURS = tuple(f"token, {key}" for key in READOUTS)
MEASURES = {
    "cosine": "cosine",
    "correlation": "cosine, means removed",
    "explained": "R², means removed",
    "matched": "matched",
    "matched, centred": "matched, means removed",
}


def measures(found: Tensor, wanted: Tensor) -> dict[str, float]:
    """Compare features found at P places with the teacher's patches there, both (P, D).

    Returns:
        Mean cosine of a place's two features. With each side's mean over the places taken out: the cosine of the two
        fields as one vector each (0 for a field that is the same everywhere), and R², the share of the patches'
        variance that is explained without any scaling. The share of places whose feature has its nearest patch, by
        cosine, at that very place, as they are and with the means taken out; k equally near patches count 1/k each.
    """
    found, wanted = found.double(), wanted.double()
    mine, theirs = found - found.mean(0), wanted - wanted.mean(0)
    if float(mine.norm()) < 1e-9 * float(found.norm()):  # the same everywhere: what is left is rounding
        mine = torch.zeros_like(mine)
    return {
        "cosine": torch.cosine_similarity(found, wanted, dim=1).mean().item(),
        "correlation": torch.cosine_similarity(mine.flatten(), theirs.flatten(), dim=0).item(),
        "explained": 1 - ((mine - theirs).square().sum() / theirs.square().sum()).item(),
        "matched": _matched(found, wanted),
        "matched, centred": _matched(mine, theirs),
    }


def _matched(found: Tensor, wanted: Tensor) -> float:
    near = torch.nn.functional.normalize(found, dim=1) @ torch.nn.functional.normalize(wanted, dim=1).T  # (P, P)
    best = near >= near.amax(dim=1, keepdim=True) - 1e-12
    return (best.diagonal() / best.sum(dim=1)).mean().item()


class Fits:
    """Fits the students of one photograph, and measures all sources."""

    def __init__(self, teacher: Teacher, samples: Sequence[Any], options: Options) -> None:
        """Read every photograph's grid once: the controls are made of the others'."""
        self.teacher, self.samples, self.options = teacher, samples, options
        student = StudentOptions(preset=options.preset, steps=options.steps, seed=options.seed, queries=options.queries)
        config = student.model(teacher.dim)
        adapt = replace(student.training(teacher.device), precision="fp32")
        by_grid = replace(adapt, distil="grid", lr=options.grid_lr, queries=None)
        self.lr = adapt.lr
        self.trainers = {
            "query": TestTimeTrainer(replace(config, readout="query"), adapt, device=options.device),
            "mean": TestTimeTrainer(replace(config, readout="mean"), adapt, device=options.device),
            "grid": TestTimeTrainer(replace(config, readout="mean"), by_grid, device=options.device),
        }
        self.config = self.trainers["mean"].model
        self.drawn = APM(self.config, seed=options.seed).double()
        size = options.grid_size
        self.grids = torch.stack([teacher.encode_grid(one.load(), size=size).cpu() for one in samples])
        self.total = self.grids.double().sum(0)  # (h', w', D)
        height, width = self.grids.shape[1:3]
        rows, cols = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (height, width))
        self.points = torch.cartesian_prod(rows, cols)  # of the cells' centres

    def __call__(self, number: int) -> Row:
        """Measures of each source, and how near the students came to what they were fitted to."""
        image, other = (self.samples[n % len(self.samples)].load() for n in (number, number + 1))
        seen = student_inputs([image], self.teacher, self.config)
        token, strange = seen.tokens.cpu(), student_inputs([other], self.teacher, self.config).tokens.cpu()
        wanted = self.grids[number].flatten(0, 1)  # (P, D)
        others = ((self.total - self.grids[number]) / (len(self.grids) - 1)).flatten(0, 1)
        order = torch.from_numpy(np.random.default_rng([self.options.seed, number]).permutation(len(wanted)))
        found = {
            "repeated": token.expand(len(wanted), -1),
            "others": others.mean(0).expand(len(wanted), -1),
            "others, place": others,
            "shuffled": wanted[order],
        }
        losses = {}
        for readout in READOUTS:
            key = f"token, {readout}"
            found[key], losses[key] = self._fitted(readout, seen.pixels, token)
        found["other token"], losses["other token"] = self._fitted("mean", seen.pixels, strange)
        grid = resample(self.grids[number][None], self.config.grid)
        found["grid"], losses["grid"] = self._fitted("grid", seen.pixels, token, grid)
        found["untrained"] = self._untrained(seen.pixels)
        return {"measures": {name: measures(found[name], wanted) for name in SOURCES}, "losses": losses}

    def _fitted(self, name: str, pixels: Tensor, token: Tensor, grid: Tensor | None = None) -> tuple[Tensor, float]:
        """A student's features at the cells' centres (P, D), and its last loss."""
        result = self.trainers[name].adapt(pixels, token, grids=grid, keep_field=True)
        assert result.folded is not None
        return result.folded.double().read(self.points)[0].cpu(), result.final_losses[0].item()

    @torch.no_grad()
    def _untrained(self, pixels: Tensor) -> Tensor:
        """Features (P, D) of the student as it was drawn."""
        rows, cols = (self.points * self.config.grid - 0.5).unbind(dim=1)
        return self.drawn.field(pixels.double(), rows, cols)[0]


def measure(options: Options) -> Record:
    """Open photographs and teacher, fit and measure."""
    teacher = load_teacher(options.teacher, device=options.device)
    data = open_dataset("folder", options.root, limit=options.limit, seed=options.seed)
    if len(data.samples) < 2:
        raise UsageError("Two photographs or more are needed: the controls are made of the others.")
    fits = Fits(teacher, data.samples, options)
    kept = ("preset", "steps", "queries", "grid_lr", "grid_size", "seed")
    settings = {**{name: getattr(options, name) for name in kept}, "lr": fits.lr, "precision": "fp32"}
    names = "\n".join(one.id for one in data.samples)
    made_of = {**settings, "teacher": teacher.identity, "photographs": hashlib.sha256(names.encode()).hexdigest()}
    rows = continued(range(len(data.samples)), fits, "photographs", path=options.rows, settings=made_of)
    return {
        "photographs": len(rows),
        "teacher": teacher.identity,
        "teacher_grid": list(fits.grids.shape[1:3]),
        "settings": {**settings, "locations": fits.config.grid},
        **summary(rows),
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> Record:
    """Means with standard errors over photographs; the token's fields less each control, paired; last losses."""

    found = [row["measures"] for row in rows]
    above = [
        {ours: {s: {m: of[ours][m] - of[s][m] for m in MEASURES} for s in SOURCES if s not in OURS} for ours in OURS}
        for of in found
    ]
    losses = {name: float(np.mean([row["losses"][name] for row in rows])) for name in rows[0]["losses"]}
    return {"measures": averaged(found), "above": averaged(above), "losses": losses}


def table(record: Record) -> str:
    """Print a record as markdown: every source, and the token's fields less the controls, paired."""
    settings, losses, grid = record["settings"], record["losses"], record["teacher_grid"]
    rows = [
        (title, *(plus_minus(record["measures"][name][one], 3) for one in MEASURES)) for name, title in SOURCES.items()
    ]
    above = record["above"]["token, mean"]
    less = "; ".join(
        f"minus the field {words} {plus_minus(above[control]['correlation'], 3)}"
        for control, words in (
            ("other token", "fitted to another photograph's token"),
            ("untrained", "before its first step"),
        )
    )
    paragraphs = (
        markdown(("features at the patches' locations", *MEASURES.values()), rows),
        f"Cosine with means removed of the field fitted to the token by its mean, paired by photograph: {less}. "
        f"Final loss: token by object query {losses['token, query']:.1e}, token by mean "
        f"{losses['token, mean']:.1e}, grid {losses['grid']:.1e}. By chance {1 / (grid[0] * grid[1]):.3f} of the "
        "locations match.",
        f"<sub>`{record['command']}` · {record['date']} · {record['photographs']} photographs · teacher "
        f"`{record['teacher']}`, grid {grid[0]} × {grid[1]} · {settings['preset']} student, {settings['locations']} × "
        f"{settings['locations']} locations, {settings['steps']} steps (the token: {settings['queries']} locations per "
        f"step), lr {settings['lr']:g} ({settings['grid_lr']:g} for the grid) · {settings['precision']} · seed "
        f"{settings['seed']} · {record['environment']['processor']} · ± is the standard error over photographs</sub>",
    )
    return "\n\n".join(paragraphs)


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--grid-lr", type=float, default=LR, help="learning rate of the grid's student")
    parser.add_argument("--grid-size", type=int, help="input size of the teacher's grid in pixels")
    parser.add_argument("--queries", type=parse_queries, default=ALL, help="locations per step when fitting the token")


STUDY = Study(
    name="patch_tokens",
    question=__doc__,
    measure=measure,
    table=table,
    arguments=_arguments,
    shared={**USUAL, "preset": "small", "steps": STEPS, "limit": None, "rows": None},
    results="patch-tokens.json",
    document=ROOT / "docs" / "islands.md",
    marker="patch-tokens",
)

if __name__ == "__main__":
    sys.exit(run(STUDY.main))
