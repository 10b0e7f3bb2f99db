"""Can a student replace layers of its teacher?

``python -m apm.benchmarks.studies.layer_skipping --root TABLE.parquet --work DIR --record FILE``. For each pair i:j of
``--pairs`` the teacher's layers after i (0: the image) up to j are left out and replaced by something trained on other
images; the teacher's remaining layers run on its output (`apm.pretrain.stand_in`). How close is the final token to the
whole teacher's, is the top label the same, and how many operations are saved?

Replacements: the student as in the paper, which knows its input only through the trigger column; the same with the
input at its location in each query (``--local`` of ``apm pretrain --target-layer``); a linear map (ridge regression)
from the input at each location, shared by all locations, plus the mean token of each location over the training images;
that mean token alone; and nothing: the input is passed on, pooled and padded with zeros if layer j is coarser and wider
(like the shortcuts of He et al. 2015). Operations are counted, not estimated. Students are kept in ``--work``; training
resumes after a kill. No label of an image is used.
"""

from __future__ import annotations

import itertools
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from apm.errors import ImageError, UsageError
from apm.images.load import MAX_PIXELS
from apm.labels import label_set
from apm.pretrain.cache import GridCache, build_cache
from apm.pretrain.config import PretrainConfig
from apm.pretrain.images import ImageSource, open_images
from apm.pretrain.layers import LayerTokens, LayerTrainer
from apm.pretrain.stand_in import ShortTower, StandInSizes, at_their_places
from apm.teachers import load_teacher
from apm.teachers.cut_towers import Layers
from apm.text.zeroshot import ZeroShotHead

from .linear_maps import Linear, skipped
from .operations import measured_flops
from .study import ROOT, USUAL, Options, Record, Study, each, markdown, plus_minus, run

PAIRS = "0:2,0:3,0:4,2:3,2:4,3:4"
KINDS = {
    "column": "student",
    "local": "student, local",
    "linear": "linear map",
    "mean": "mean token of each location",
    "skipped": "nothing",
}
_BATCH = 32


@dataclass(frozen=True)
class First(ImageSource):
    """The first images of a source."""

    count: int

    def __len__(self) -> int:
        return min(self.count, super().__len__())

    def read(self, start: int = 0, *, max_pixels: int = MAX_PIXELS) -> Iterator[tuple[str, Image.Image | ImageError]]:
        """As of the source."""
        yield from itertools.islice(super().read(start, max_pixels=max_pixels), len(self) - start)


def first_of(source: ImageSource, count: int | None) -> ImageSource:
    """The first `count` images, or all."""
    if count is None:
        return source
    return First(source.place, source.files, source.rows, f"{source.fingerprint}, first {count}", source.dead, count)


class Between:
    """Two layers, and everything that stands in for those between them."""

    def __init__(self, made_of: LayerTokens, cache: GridCache, first: int, last: int, options: Options) -> None:
        """Train and fit, or take up what was trained."""
        layers = made_of.layers
        shape, given_side = layers.shapes[last], layers.shapes[first].side
        towers: dict[str, ShortTower] = {}
        for kind in ("column", "local"):
            path = options.work / f"{first}-{last}-{kind}.safetensors"
            sizes = StandInSizes.between(layers, first, last, preset=options.preset, local=kind == "local")
            data = {"teacher": layers.teacher.identity, "from_layer": first, "target_layer": last}
            how: dict[str, Any] = {"tokens": made_of, "data": data, "precision": options.precision}
            trainer = LayerTrainer(path, cache, sizes, config_of(options), **how)
            trainer.run(evaluate_every=options.steps, save_every=50)
            towers[kind] = ShortTower.load(path, layers)
        mean, self.variance = trainer.token_means(), trainer.moments[1]

        def local(given: Tensor) -> Tensor:
            return at_their_places(given, given_side, shape.side, shape.prefix)

        def pairs(numbers: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
            given, wanted = trainer.pair(numbers)
            return local(given), wanted - mean

        linear = Linear(pairs, trainer.train)
        self.penalty = linear.penalty
        towers["linear"] = ShortTower(layers, first, last, lambda given: mean + linear(local(given)))
        towers["mean"] = ShortTower(layers, 0, last, lambda given: mean.expand(len(given), -1, -1))
        if first:
            towers["skipped"] = ShortTower(layers, first, last, lambda x: skipped(x, layers.shapes[first], shape))
        self.towers = towers


def config_of(options: Options) -> PretrainConfig:
    """How the students are trained."""
    return PretrainConfig(
        steps=options.steps,
        batch_size=options.batch_size,
        lr=options.lr,
        warmup=options.steps // 10,
        locations=options.locations,
        held_out=options.held_out,
        seed=options.seed,
        rgb_weight=0.0,
    )


def measure(options: Options) -> Record:
    """Train what stands in, and measure it on the held-out images.

    Raises:
        UsageError: images or the folder to work in are missing; layers that the teacher has not.
    """
    if not options.root or not options.work:
        raise UsageError("--root, the images, and --work, a folder for what is trained, are needed.")
    teacher = load_teacher(options.teacher, device=options.device)
    layers = Layers(teacher)
    for first, last in options.pairs:
        layers.check(first, last)
    names = label_set(options.label_set, teacher_labels=teacher.default_labels)
    head = ZeroShotHead.build(teacher, names, teacher.default_templates or ("a photo of a {}.",))
    tokens = LayerTokens(layers, *sorted({layer for pair in options.pairs for layer in pair}))
    source = first_of(open_images(options.root), options.limit)
    cache = build_cache(source, tokens, options.work / "cache", size=layers.image_size)
    train, held_out = config_of(options).split(len(cache.names))
    seen = {True: cache.inputs(held_out), False: _teachers_pixels(source, cache, held_out, layers)}
    whole = torch.cat([teacher.encode_image(part) for part in seen[False].split(_BATCH)])

    def measured(pair: tuple[int, int]) -> dict[str, Any]:
        between, found = Between(tokens, cache, *pair, options), {}
        held = {layer: _until(layers, seen, layer) for layer in {0, *pair}}
        for name, tower in between.towers.items():
            found[name] = _measured(tower, held[tower.first], held[tower.last], whole, head, between.variance)
            one = seen[tower.first == 0][:1]
            found[name] |= _cost(lambda tower=tower, one=one: tower.answer(one), options)  # type: ignore[misc]
        return {"from": pair[0], "to": pair[1], "penalty": between.penalty, "stand_ins": found}

    kept = ("preset", "steps", "batch_size", "lr", "locations", "precision", "held_out", "seed", "label_set")
    return {
        "data": options.root.name,
        "train_images": len(train),
        "held_out_images": len(held_out),
        "teacher": teacher.identity,
        "layers": layers.count,
        "labels": len(names),
        "settings": {name: getattr(options, name) for name in kept},
        **_cost(lambda: teacher.encode_image(seen[False][:1]), options),
        "pairs": each(options.pairs, measured, "pairs of layers", minimum=len(options.pairs)),
    }


def _teachers_pixels(source: ImageSource, cache: GridCache, held_out: NDArray[np.int64], layers: Layers) -> Tensor:
    """Of the held-out images, what the teacher is given (n, 3, S, S)."""
    wanted = {cache.names[number] for number in held_out}
    found = {name: layers.pixels(one) for name, one in source.read() if name in wanted and isinstance(one, Image.Image)}
    return torch.stack([found[cache.names[number]] for number in held_out])


def _until(layers: Layers, seen: Mapping[bool, Tensor], layer: int) -> Tensor:
    """What the teacher holds after a layer of all held-out images, of layer 0 what the student sees."""
    if layer == 0:
        return seen[True]
    return torch.cat([layers.until(part, layer) for part in seen[False].split(_BATCH)])


@torch.no_grad()
def _measured(
    tower: ShortTower, given: Tensor, wanted: Tensor, whole: Tensor, head: ZeroShotHead, variance: float
) -> dict[str, Any]:
    """How near layer j's tokens are to the teacher's, and the final token to the whole one's: with standard errors."""
    errors, cosines, same = [], [], []
    for some, right, answer in zip(*(one.split(_BATCH) for one in (given, wanted, whole)), strict=True):
        found = tower.stand_in(some)
        errors.append((found - right).square().mean((1, 2)) / variance)
        token = tower.layers.finish(found, tower.last)
        cosines.append(torch.cosine_similarity(token, answer))
        same.append((head.logits(token).argmax(1) == head.logits(answer).argmax(1)).double())
    return {
        name: _mean(torch.cat(values))
        for name, values in (("unexplained", errors), ("cosine", cosines), ("agreement", same))
    }


def _mean(values: Tensor) -> list[float]:
    return [values.mean().item(), values.std().item() / len(values) ** 0.5]


def _cost(work: Callable[[], object], options: Options) -> dict[str, float]:
    """Operations, and where they are asked for seconds, of one image."""
    return {"operations": measured_flops(work), **({"seconds": seconds_of(work)} if options.seconds else {})}


def seconds_of(work: Callable[[], object], times: int = 30) -> float:
    """Median of the seconds that it takes, after a few calls."""
    found = []
    for number in range(times + 3):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
        if number < 3:
            found.clear()
    return float(np.median(found))


def table(record: Record) -> str:
    """Print a record as markdown: each pair of layers with all that stands in for those between."""
    settings, timed = record["settings"], "seconds" in record
    rows = []
    for pair in record["pairs"]:
        for name, one in pair["stand_ins"].items():
            rows.append(
                (
                    f"{pair['from'] or 'image'} → {pair['to']}",
                    KINDS[name],
                    plus_minus(one["unexplained"], 3),
                    plus_minus(one["cosine"], 3),
                    f"{plus_minus([100 * value for value in one['agreement']], 1)} %",
                    f"{100 * (1 - one['operations'] / record['operations']):.0f} %",
                    *([f"{100 * (1 - one['seconds'] / record['seconds']):.0f} %"] if timed else []),
                )
            )
    titles = (
        *(
            "from → to layer",
            "replacement",
            "unexplained",
            "cosine of the token",
            "same top label",
        ),
        *("operations saved", *(["time saved"] if timed else [])),
    )
    took = f", {1000 * record['seconds']:.1f} ms on {record['environment']['threads']} thread" if timed else ""
    return (
        f"{markdown(titles, rows, text=2)}\n\n"
        f"{record['held_out_images']} held-out and {record['train_images']:,} training images of {record['data']}. "
        f"Teacher `{record['teacher']}`, {record['layers']} layers, {record['operations'] / 1e6:.0f} million "
        f"operations per image{took}; top label of {record['labels']} (label set {settings['label_set']}). "
        "Unexplained: squared error of the later layer's tokens as a share of their variance over the training "
        "images.\n\n"
        f"<sub>`{record['command']}` · {record['date']} · {settings['preset']} student, {settings['steps']} steps of "
        f"{settings['batch_size']} images at {settings['locations'] or 'all'} locations, AdamW {settings['lr']:g}, "
        f"{settings['precision']}, seed {settings['seed']} · {record['environment']['processor']} · ± is the standard "
        "error over images</sub>"
    )


def _pairs(text: str) -> list[tuple[int, int]]:
    try:
        found = [tuple(int(number) for number in pair.split(":")) for pair in text.split(",")]
    except ValueError:
        found = [()]
    if any(len(pair) != 2 for pair in found):
        raise ArgumentTypeError(f"pairs of layers such as 0:4,2:6, not {text}")
    return [(first, last) for first, last in found]


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder for trained students and their caches")
    parser.add_argument(
        "--pairs", type=_pairs, default=_pairs(PAIRS), help=f"pairs i:j, separated by commas (default: {PAIRS})"
    )
    parser.add_argument("--label-set", default="teacher", help="label set for the top label (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="images per step")
    parser.add_argument("--locations", type=int, default=16, help="locations per step")
    parser.add_argument("--lr", type=float, default=PretrainConfig.lr)
    parser.add_argument(
        "--held-out", type=float, default=0.25, help="share of the images held out (default: %(default)s)"
    )
    parser.add_argument("--seconds", action="store_true", help="also measure the time; only on an idle machine")


STUDY = Study(
    name="layer_skipping",
    question=__doc__,
    measure=measure,
    table=table,
    arguments=_arguments,
    shared={**USUAL, "preset": "small", "steps": 500, "precision": "fp32", "limit": 1600},
    results="layer-skipping.json",
    document=ROOT / "docs" / "pretraining.md",
    marker="layer-skipping",
)

if __name__ == "__main__":
    sys.exit(run(STUDY.main))
