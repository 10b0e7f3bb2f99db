"""Whether maps point at the object: `python -m apm.benchmarks.pointing --root DIR`.

The pointing game (Zhang et al. 2016) on images whose object's place is known because it was put there: a photograph of
one class, made small, pasted at a random place on a photograph of another class. A map scores when its largest value
lies in the pasted square. The class of the pasted photograph says which label's map is read, and nothing else: nothing
that adapts sees it. Writes a JSON record; `--table RECORD` prints it as markdown; `--document` puts record, table
and picture where docs/explain.md has them.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from apm.adapt import AdaptConfig, AdaptResult, TestTimeTrainer
from apm.explain import LR, STEPS, dense_locations, field_maps, label_maps, peak
from apm.grids import resample
from apm.images import student_input
from apm.model import PRESETS, APMConfig
from apm.teachers import load_teacher
from apm.teachers.base import Teacher
from apm.zeroshot import ZeroShotHead

from . import documents
from .datasets import open_dataset
from .environment import describe, write_record
from .islands import square_of
from .stats import mcnemar, standard_error

DOCUMENT = documents.ROOT / "docs" / "explain.md"
PICTURE = documents.ROOT / "docs" / "explain-demo.png"
RECORD = documents.ROOT / "benchmarks" / "results" / "pointing-small.json"
SOURCES = {
    "teacher's grid": "map of the label in the teacher's grid, resampled bilinearly (the upper baseline)",
    "field, grid": "map of the label in the field of a student fitted to the grid",
    "field, both": "the same, fitted to the grid and the token",
    "field, token": "the same, fitted to the token alone: it holds nothing about places",
    "attention, both": "attention of the object query, mean of the heads, fitted to grid and token; knows no label",
    "attention, token": "the same, fitted to the token alone",
    "centre": "the middle of the image, always",
    "random": "a place drawn at random",
}


@dataclass(frozen=True)
class Composite:
    """A photograph pasted on another."""

    image: Image.Image
    box: tuple[float, float, float, float]
    """Of the pasted one: top, left, bottom, right, as shares of the side."""
    label: int
    """Class of the pasted one."""
    background: int
    """Class of the other."""

    def holds(self, place: tuple[float, float]) -> bool:
        """Whether a place (y, x), in shares of the side, lies in the pasted square."""
        top, left, bottom, right = self.box
        return top <= place[0] < bottom and left <= place[1] < right


def paste(
    photograph: Image.Image,
    background: Image.Image,
    *,
    label: int,
    background_label: int,
    canvas: int,
    side: int,
    rng: np.random.Generator,
) -> Composite:
    """Paste the central square of a photograph, `side` pixels wide, on that of another, `canvas` pixels wide."""
    ground = square_of(background).resize((canvas, canvas), Image.Resampling.BICUBIC)
    top, left = (int(v) for v in rng.integers(0, canvas - side + 1, size=2))
    ground.paste(square_of(photograph).resize((side, side), Image.Resampling.BICUBIC), (left, top))
    box = (top / canvas, left / canvas, (top + side) / canvas, (left + side) / canvas)
    return Composite(ground, box, label, background_label)


def composites(
    samples: Sequence[Any], count: int, *, canvas: int = 224, side: int = 96, seed: int = 0
) -> list[Composite]:
    """Paste `count` photographs, drawn without repeats while there are enough, each on one of another class.

    Args:
        samples: with ``label`` and ``load()``, of two classes or more.
        count: how many.
        canvas: side of the images, in pixels.
        side: side of the pasted squares, in pixels.
        seed: of the choice and the places.
    """
    rng = np.random.default_rng(seed)
    labels = np.array([sample.label for sample in samples])
    order = np.concatenate([rng.permutation(len(samples)) for _ in range(-(-count // len(samples)))])[:count]
    made = []
    for number in order.tolist():
        ground = int(rng.choice(np.flatnonzero(labels != labels[number])))
        made.append(
            paste(
                samples[number].load(),
                samples[ground].load(),
                label=int(labels[number]),
                background_label=int(labels[ground]),
                canvas=canvas,
                side=side,
                rng=rng,
            )
        )
    return made


class Mapper:
    """Makes all maps of an image: adapts one student for each kind of target, from the image alone."""

    def __init__(
        self,
        teacher: Teacher,
        head: ZeroShotHead,
        config: APMConfig,
        adapt: AdaptConfig,
        *,
        size: int = 32,
        device: str | torch.device = "cpu",
    ) -> None:
        self.teacher, self.head, self.size, self.grid = teacher, head, size, config.grid
        adapt = replace(adapt, precision="fp32")  # the fields are measured: bfloat16 would round nearly constant ones
        # the token alone has the steps and the rate that `apm classify` takes by default
        token = AdaptConfig(steps=min(50, adapt.steps), precision="fp32", seed=adapt.seed)
        self.trainers = {
            "field, grid": TestTimeTrainer(
                replace(config, readout="mean"), replace(adapt, distil="grid"), device=device
            ),
            "field, both": TestTimeTrainer(config, replace(adapt, distil="both"), device=device),
            "field, token": TestTimeTrainer(config, token, device=device),
        }

    def __call__(self, image: Image.Image) -> Maps:
        """Adapt the students to an image, whose central square is what they and the maps see."""
        token = self.teacher.encode_image(self.teacher.preprocess(image)[None].to(self.teacher.device))
        grid = self.teacher.encode_grid(image)  # (h, w, D)
        targets = resample(grid[None], self.grid)  # (1, N, D)
        results: dict[str, AdaptResult] = {}
        for source, trainer in self.trainers.items():
            pixels = student_input(image, trainer.model.image_size)[None]
            by_grid = trainer.config.distil != "cls"
            results[source] = trainer.adapt(pixels, token, grids=targets if by_grid else None, keep_field=True)
        return Maps(self, token, grid, results)


@dataclass(frozen=True)
class Maps:
    """The maps of one image, for any label."""

    mapper: Mapper
    token: Tensor
    """(1, D) of the teacher."""
    grid: Tensor
    """(h, w, D) of the teacher."""
    results: dict[str, AdaptResult]

    def of(self, label: int) -> dict[str, Tensor]:
        """Maps (size, size) by source; log odds of the label, or attention. Random and centre have none."""
        mapper, size = self.mapper, self.mapper.size
        smooth = resample(self.grid[None], size)[0].reshape(size, size, -1)
        maps = {"teacher's grid": label_maps(smooth, mapper.head, [label]).log_odds[0]}
        rows, cols = dense_locations(mapper.grid, size)
        for source, result in self.results.items():

            def field(rows: Tensor, cols: Tensor, of: AdaptResult = result) -> Tensor:
                return of.features(rows, cols)[0]

            maps[source] = field_maps(field, mapper.grid, size, mapper.head, [label]).log_odds[0]
            if source != "field, grid":  # whose object query is not trained
                attention = result.attention(rows, cols)[0].mean(dim=0)
                maps[source.replace("field", "attention")] = attention.reshape(size, size)
        return maps


def play(
    made: Sequence[Composite], mapper: Mapper, *, seed: int = 0, progress: Callable[[int], None] = lambda done: None
) -> dict[str, Any]:
    """Play the game on every composite, or until Ctrl-C on those done by then.

    Returns:
        ``hits``: for each source whether it hit, a list in the composites' order; ``token_says``: share of composites
        whose token the teacher gives the pasted class, the other photograph's, or a third one.
    """
    rng = np.random.default_rng([seed, 1])
    hits: dict[str, list[bool]] = {source: [] for source in SOURCES}
    said = {"pasted": 0, "background": 0, "neither": 0}
    done = 0
    try:
        for composite in made:
            maps = mapper(composite.image)
            places = {source: peak(values) for source, values in maps.of(composite.label).items()}
            places["centre"] = (0.5, 0.5)
            places["random"] = (float(rng.random()), float(rng.random()))
            answer = int(mapper.head.logits(maps.token)[0].argmax())
            said[{composite.label: "pasted", composite.background: "background"}.get(answer, "neither")] += 1
            for source in SOURCES:
                hits[source].append(composite.holds(places[source]))
            done += 1
            progress(done)
    except KeyboardInterrupt:  # hours may lie behind: what is done is worth having, and says how much it is
        if not done:
            raise
    return {"hits": hits, "token_says": {name: count / done for name, count in said.items()}}


def scores(hits: dict[str, list[bool]]) -> dict[str, dict[str, float]]:
    """Score each source: share of hits, its standard error, McNemar's p against the random place and the centre."""
    table = {}
    for source, found in hits.items():
        mine = np.array(found)
        row = {"score": float(mine.mean()), "stderr": standard_error(float(mine.mean()), len(mine))}
        for baseline in ("random", "centre"):
            other = np.array(hits[baseline])
            row[f"p_{baseline}"] = mcnemar(int((other & ~mine).sum()), int((~other & mine).sum()))
        table[source] = row
    return table


def table(record: dict[str, Any]) -> str:
    """Print a record as markdown."""
    settings, says = record["settings"], record["token_says"]
    lines = ["| map | hits | p against random | p against the centre |", "|---|---:|---:|---:|"]
    for source, row in record["scores"].items():
        ps = " | ".join("–" if source == other else _p(row[f"p_{other}"]) for other in ("random", "centre"))
        lines.append(f"| {source} | {100 * row['score']:.1f} ± {100 * row['stderr']:.1f} % | {ps} |")
    share = (settings["side"] / settings["canvas"]) ** 2
    return "\n".join(
        [
            *lines,
            "",
            *(f"- *{source}*: {meaning}" for source, meaning in SOURCES.items()),
            "",
            f"{record['composites']} composites, {record['classes']} classes; the pasted square covers "
            f"{100 * share:.1f} % of the image. The teacher's token says the pasted class on "
            f"{100 * says['pasted']:.0f} %, the other photograph's on {100 * says['background']:.0f} %.",
            "",
            f"<sub>`{record['command']}` · {record['date']} · teacher `{record['teacher']}`, its grid "
            f"{record['teacher_grid'][0]} × {record['teacher_grid'][1]} · {settings['preset']} student, "
            f"{settings['locations']} × {settings['locations']} locations, {settings['steps']} steps, lr "
            f"{settings['lr']:g} (the token alone: {settings['token_steps']} and {settings['token_lr']:g}), "
            f"{settings['precision']} · maps read at {settings['size']} × {settings['size']} · seed {settings['seed']} "
            "· ± is the binomial standard error, p McNemar's</sub>",
        ]
    )


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def main(arguments: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m apm.benchmarks.pointing", description=__doc__)
    parser.add_argument("--table", type=Path, help="print this record instead of measuring")
    parser.add_argument("--sheet", type=Path, help="draw maps of ten photographs there, .png, instead of measuring")
    parser.add_argument("--demo", type=Path, help="the same with scikit-image's photographs pasted on one another")
    parser.add_argument("--root", type=Path, help="a folder of images, one folder a class")
    parser.add_argument("--teacher", default="embedded")
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--composites", type=int, default=200)
    parser.add_argument("--canvas", type=int, default=224, help="side of the images, in pixels")
    parser.add_argument("--side", type=int, default=96, help="side of the pasted squares, in pixels")
    parser.add_argument("--size", type=int, default=32, help="locations a side of the maps")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--lr", type=float, default=LR)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="where to write the record; standard output without it")
    parser.add_argument(
        "--document", action="store_true", help="write record, table and picture of docs/explain.md, in a clone"
    )
    options = parser.parse_args(arguments)
    if options.table:
        print(table(json.loads(options.table.read_text(encoding="utf-8"))))
        return
    teacher = load_teacher(options.teacher, device=options.device)
    config = APMConfig.preset(options.preset, dim=teacher.dim)
    adapt = AdaptConfig(steps=options.steps, lr=options.lr, seed=options.seed)

    def mapper(head: ZeroShotHead) -> Mapper:
        return Mapper(teacher, head, config, adapt, size=options.size, device=options.device)

    if options.sheet or options.demo:
        from .pointing_figures import demo, sheet

        if options.demo:
            print(demo(options.demo, mapper, teacher, seed=options.seed))
        if options.sheet:
            print(sheet(options.sheet, options.root, mapper, teacher, seed=options.seed))
        return
    if options.document:
        documents.require_clone()
        from .pointing_figures import demo

        options.out = RECORD
        demo(PICTURE, mapper, teacher, seed=options.seed)
    data = open_dataset("folder", options.root)
    head = ZeroShotHead.build(teacher, data.class_names, data.templates)
    made = composites(data.samples, options.composites, canvas=options.canvas, side=options.side, seed=options.seed)
    began = time.perf_counter()
    of = mapper(head)
    found = play(
        made,
        of,
        seed=options.seed,
        progress=lambda done: print(f"\r{done} of {len(made)}", end="", file=sys.stderr, flush=True),
    )
    print(file=sys.stderr)
    record = {
        "command": f"python -m apm.benchmarks.pointing {shlex.join(arguments or sys.argv[1:])}".partition(" --out")[0],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "dataset": data.name,
        "composites": len(found["hits"]["random"]),
        "classes": len(data.class_names),
        "class_names": list(data.class_names),
        "templates": list(data.templates),
        "teacher": teacher.identity,
        "teacher_grid": list(teacher.encode_grid(made[0].image).shape[:2]),
        "settings": {
            "preset": options.preset,
            "locations": config.grid,
            "steps": options.steps,
            "lr": adapt.lr,
            "token_steps": of.trainers["field, token"].config.steps,
            "token_lr": of.trainers["field, token"].config.lr,
            "precision": of.trainers["field, both"].precision,
            "canvas": options.canvas,
            "side": options.side,
            "size": options.size,
            "seed": options.seed,
        },
        "scores": scores(found["hits"]),
        "token_says": found["token_says"],
        "seconds": time.perf_counter() - began,
        "environment": describe(options.device),
    }
    write_record(record, options.out)
    if options.document:
        documents.fill(DOCUMENT, "pointing", table(record))


if __name__ == "__main__":
    main()
