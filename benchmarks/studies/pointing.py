"""Whether maps point at the object: `python -m apm.benchmarks.studies.pointing --root DIR`.

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
from pathlib import Path
from typing import Any

import numpy as np

from apm.student.config import PRESETS, APMConfig
from apm.teachers import load_teacher
from apm.test_time.label_maps import LR, STEPS, peak
from apm.test_time.trainer import AdaptConfig
from apm.text.zeroshot import ZeroShotHead

from ..datasets import open_dataset
from ..runs.environment import describe, write_record
from ..tables.stats import mcnemar, standard_error
from . import study as documents
from .composites import Composite, Mapper, composites

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
    parser = argparse.ArgumentParser(prog="python -m apm.benchmarks.studies.pointing", description=__doc__)
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
        "command": f"python -m apm.benchmarks.studies.pointing {shlex.join(arguments or sys.argv[1:])}".partition(
            " --out"
        )[0],
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
