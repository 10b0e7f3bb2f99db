"""Whether maps point at the object: `python -m apm.benchmarks.studies.pointing --root DIR`.

The pointing game (Zhang et al. 2016) on images in which the object's position is known: a photograph of one class,
reduced and pasted at a random position on a photograph of another class. A map scores a hit if its maximum lies in the
pasted square. The class of the pasted photograph only selects which label's map is read; nothing that adapts sees it.
``--sheet`` and ``--demo`` draw the maps and their maxima.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from apm.errors import UsageError
from apm.figures.base import bare, new_figure, save
from apm.images.load import load_image
from apm.teachers import load_teacher
from apm.teachers.base import Teacher
from apm.test_time.island_fields import square_of
from apm.test_time.label_maps import LR, STEPS, peak
from apm.test_time.options import StudentOptions
from apm.test_time.queries import ALL
from apm.text.zeroshot import ZeroShotHead

from ..datasets import open_dataset
from ..tables.stats import mcnemar, standard_error
from .composites import Composite, Mapper, composites, paste
from .study import ROOT, USUAL, Options, Record, Study, each, markdown, plus_minus, run

SOURCES = {
    "teacher's grid": "map of the label in the teacher's grid, upsampled bilinearly (upper baseline)",
    "field, grid": "map of the label in the field of a student fitted to the grid",
    "field, both": "the same, fitted to the grid and the token",
    "field, token": "the same, fitted to the token alone, which has no information about locations",
    "attention, both": "attention of the object query, mean of the heads, fitted to grid and token; independent of the "
    "label",
    "attention, token": "the same, fitted to the token alone",
    "centre": "the centre of every image",
    "random": "a random location",
}
COLUMNS = ("teacher's grid", "field, grid", "field, both", "field, token", "attention, both")
WHOLE = (0.0, 0.0, 1.0, 1.0)
PHOTOGRAPHS = {
    "chelsea.png": "cat",
    "coffee.png": "cup of coffee",
    "rocket.jpg": "rocket",
    "astronaut.png": "astronaut",
}
"""Of scikit-image, all in the public domain or CC0, and what is on them."""
LABELS = ("cat", "dog", "horse", "cup of coffee", "teapot", "banana", "astronaut", "rocket", "car", "ship")

MakeMapper = Callable[[ZeroShotHead], Mapper]


def measure(options: Options) -> Record:
    """Paste the composites, play, and count."""
    teacher, make = _teacher_and_mapper(options)
    data = open_dataset("folder", options.root)
    made = composites(data.samples, options.limit, canvas=options.canvas, side=options.side, seed=options.seed)
    began = time.perf_counter()
    mapper = make(ZeroShotHead.build(teacher, data.class_names, data.templates))
    found = play(made, mapper, seed=options.seed)
    token = mapper.trainers["field, token"].config
    kept = ("preset", "steps", "lr", "canvas", "side", "size", "seed")
    return {
        "dataset": data.name,
        "composites": len(found["hits"]["random"]),
        "classes": len(data.class_names),
        "class_names": list(data.class_names),
        "templates": list(data.templates),
        "teacher": teacher.identity,
        "teacher_grid": list(teacher.encode_grid(made[0].image).shape[:2]),
        "settings": {
            **{name: getattr(options, name) for name in kept},
            "locations": mapper.grid,
            "token_steps": token.steps,
            "token_lr": token.lr,
            "precision": mapper.trainers["field, both"].precision,
        },
        "scores": scores(found["hits"]),
        "token_says": found["token_says"],
        "seconds": time.perf_counter() - began,
    }


def _teacher_and_mapper(options: Options) -> tuple[Teacher, MakeMapper]:
    teacher = load_teacher(options.teacher, device=options.device)
    given = {name: getattr(options, name) for name in ("preset", "steps", "lr", "seed")}
    student = StudentOptions(**given, queries=ALL)
    model, training = student.model(teacher.dim), student.training(teacher.device)
    return teacher, lambda head: Mapper(teacher, head, model, training, size=options.size, device=options.device)


def play(made: Sequence[Composite], mapper: Mapper, *, seed: int = 0) -> dict[str, Any]:
    """Play the game on every composite, or until Ctrl-C on those done by then.

    Returns:
        ``hits``: for each source whether it hit, a list in the composites' order; ``token_says``: share of composites
        whose token the teacher gives the pasted class, the other photograph's, or a third one.
    """
    rng = np.random.default_rng([seed, 1])

    def one(composite: Composite) -> tuple[str, dict[str, bool]]:
        maps = mapper(composite.image)
        places = {source: peak(values) for source, values in maps.of(composite.label).items()}
        places["centre"] = (0.5, 0.5)
        places["random"] = (float(rng.random()), float(rng.random()))
        answer = int(mapper.head.logits(maps.token)[0].argmax())
        said = {composite.label: "pasted", composite.background: "background"}.get(answer, "neither")
        return said, {source: composite.holds(places[source]) for source in SOURCES}

    done = each(made, one, "composites")
    said = [answer for answer, _ in done]
    return {
        "hits": {source: [hits[source] for _, hits in done] for source in SOURCES},
        "token_says": {name: said.count(name) / len(done) for name in ("pasted", "background", "neither")},
    }


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


def table(record: Record) -> str:
    """Print a record as markdown."""
    settings, says = record["settings"], record["token_says"]
    rows = []
    for source, row in record["scores"].items():
        ps = ("–" if source == other else _p(row[f"p_{other}"]) for other in ("random", "centre"))
        rows.append((source, f"{plus_minus((100 * row['score'], 100 * row['stderr']), 1)} %", *ps))
    meanings = "\n".join(f"- *{source}*: {meaning}" for source, meaning in SOURCES.items())
    share = (settings["side"] / settings["canvas"]) ** 2
    paragraphs = (
        markdown(("map", "hit rate", "p against random", "p against the centre"), rows),
        meanings,
        f"{record['composites']} composites, {record['classes']} classes; the pasted square covers "
        f"{100 * share:.1f} % of the image. The teacher's token answers with the pasted "
        f"class on {100 * says['pasted']:.0f} % of them, with the other photograph's class on "
        f"{100 * says['background']:.0f} %.",
        f"<sub>`{record['command']}` · {record['date']} · teacher `{record['teacher']}`, its grid "
        f"{record['teacher_grid'][0]} × {record['teacher_grid'][1]} · {settings['preset']} student, "
        f"{settings['locations']} × {settings['locations']} locations, {settings['steps']} steps, lr "
        f"{settings['lr']:g} (the token alone: {settings['token_steps']} and {settings['token_lr']:g}), "
        f"{settings['precision']} · maps read at {settings['size']} × {settings['size']} · seed {settings['seed']} "
        "· ± is the binomial standard error, p by McNemar's test</sub>",
    )
    return "\n\n".join(paragraphs)


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def sheet(path: Path, root: Path | None, make: MakeMapper, teacher: Any, *, seed: int = 0) -> Path:
    """Draw maps of ten photographs of a folder of images, as they are: one of each class as far as there are ten."""
    data = open_dataset("folder", root)
    head = ZeroShotHead.build(teacher, data.class_names, data.templates)
    order = np.random.default_rng(seed).permutation(len(data.samples)).tolist()
    first: dict[int, int] = {}
    for number in order:
        first.setdefault(data.samples[number].label, number)
    chosen = [*first.values(), *(number for number in order if number not in first.values())][:10]
    shown = [
        Composite(square_of(data.samples[n].load()).resize((224, 224)), WHOLE, data.samples[n].label, -1)
        for n in sorted(chosen, key=lambda n: data.samples[n].label)
    ]
    return draw(path, shown, make(head))


def demo(path: Path, make: MakeMapper, teacher: Any, *, seed: int = 0) -> Path:
    """Draw maps of scikit-image's photographs, each pasted on the next one."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    images = [load_image(folder / name).image for name in PHOTOGRAPHS]
    names = list(PHOTOGRAPHS.values())
    rng = np.random.default_rng(seed)
    shown = []
    for number, image in enumerate(images):
        under = (number + 1) % len(images)
        labels = {"label": LABELS.index(names[number]), "background_label": LABELS.index(names[under])}
        shown.append(paste(image, images[under], canvas=224, side=96, rng=rng, **labels))
    templates = teacher.default_templates or ("a photo of a {}.",)
    return draw(path, shown, make(ZeroShotHead.build(teacher, LABELS, templates)))


def draw(path: Path, shown: Sequence[Composite], mapper: Mapper) -> Path:
    """Draw one row an image: the image, then the maps of its label, a cross where each is largest."""
    if not shown:
        raise UsageError("There is no image to draw.")
    figure = new_figure(1.3 * (len(COLUMNS) + 1), 1.42 * len(shown) + 0.2)
    axes = figure.subplots(len(shown), len(COLUMNS) + 1, squeeze=False)
    for number, (row, one) in enumerate(zip(axes, shown, strict=True)):
        maps = mapper(one.image).of(one.label)
        row[0].imshow(one.image)
        row[0].set_ylabel(mapper.head.labels[one.label], fontsize=7)
        for cell, source in zip(row[1:], COLUMNS, strict=True):
            values = maps[source].numpy() if "attention" in source else maps[source].sigmoid().numpy()
            grey = np.asarray(one.image.convert("L").convert("RGB"), dtype=float) / 255
            cell.imshow(0.35 + 0.6 * grey)
            extent = (0, one.image.width, one.image.height, 0)
            cell.imshow(values, extent=extent, cmap="magma", alpha=0.65, interpolation="nearest")
            y, x = peak(maps[source])
            hit = one.holds((y, x))
            cell.plot(x * one.image.width, y * one.image.height, "+", color="cyan", markersize=9, markeredgewidth=1.8)
            told = "" if one.box == WHOLE else (" · inside" if hit else " · OUTSIDE")
            top = f"max {values.max():.2f}" if "attention" not in source else ""
            cell.set_xlabel(f"{top}{told}".strip(" ·"), fontsize=6, labelpad=1)
            if number == 0:
                cell.set_title(source, fontsize=8)
        bare(row)
        for cell in row:
            if one.box != WHOLE:
                top_, left, bottom, right = (edge * one.image.width for edge in one.box)
                cell.plot([left, right, right, left, left], [top_, top_, bottom, bottom, top_], color="white", lw=1)
    config = mapper.trainers["field, both"]
    return save(
        figure,
        path,
        settings=f"teacher {mapper.teacher.identity} · {len(mapper.head.labels)} labels · student of {mapper.grid} × "
        f"{mapper.grid} locations, {config.config.steps} steps, lr {config.config.lr:g}, {config.precision}, seed "
        f"{config.config.seed} · probability of the row's label at {mapper.size} × {mapper.size} locations (softmax "
        "over the labels of logit scale × cosine), attention: mean of the heads · each map from its minimum (dark) to "
        "its maximum (bright); + marks the maximum",
        dpi=100,
    )


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--sheet", type=Path, help="draw maps of ten photographs into this PNG instead of measuring")
    parser.add_argument("--demo", type=Path, help="the same with photographs of scikit-image pasted on one another")
    parser.add_argument("--composites", type=int, dest="limit", default=200, help="as --limit")
    parser.add_argument("--canvas", type=int, default=224, help="side of the images, in pixels")
    parser.add_argument("--side", type=int, default=96, help="side of the pasted squares, in pixels")
    parser.add_argument("--size", type=int, default=32, help="locations per side of the maps")
    parser.add_argument("--lr", type=float, default=LR)


def _picture(options: Options) -> None:
    teacher, make = _teacher_and_mapper(options)
    demo(ROOT / "docs" / "explain-demo.png", make, teacher, seed=options.seed)


STUDY = Study(
    name="pointing",
    question=__doc__,
    measure=measure,
    table=table,
    arguments=_arguments,
    shared={**USUAL, "preset": "small", "steps": STEPS, "limit": 200},
    results="pointing-*.json",
    document=ROOT / "docs" / "explain.md",
    marker="pointing",
    pictures=_picture,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Play, or draw."""
    options = STUDY.read(arguments)
    if not (options.sheet or options.demo):
        STUDY.run(options)
        return
    teacher, make = _teacher_and_mapper(options)
    if options.demo:
        print(demo(options.demo, make, teacher, seed=options.seed))
    if options.sheet:
        print(sheet(options.sheet, options.root, make, teacher, seed=options.seed))


if __name__ == "__main__":
    sys.exit(run(main))
