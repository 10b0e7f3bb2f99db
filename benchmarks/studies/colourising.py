"""The error of a student trained on grey images against photographs' own colours, compared with simple baselines.

``python -m apm.benchmarks.studies.colourising CKPT --root IMAGES --other FOLDER… --record FILE`` measures: IMAGES are
the training images, of which the held-out part is used; each FOLDER is a data set that the student was not trained on.
Every predictor's a and b of CIE Lab are applied to the photograph as in `apm colourise`, and the picture is compared
with the original: ΔE76, mean over pixels, and the root mean squared distance in (a, b).

Baselines: grey; the training images' mean a, b, overall and at each of the student's locations; a linear map from the
lightness at the locations to a, b there (ridge, on the same training images); and the student itself given the grey of
another photograph of the set. ``--pictures FILE --images IMAGE…`` draws grey, coloured and original.
"""

from __future__ import annotations

import hashlib
import math
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from apm.errors import ImageError, UsageError
from apm.figures import base as figures
from apm.images.load import load_image
from apm.pretrain.colouring import check_student, chroma, colourise, lab, whole, with_chroma
from apm.pretrain.config import PretrainConfig
from apm.pretrain.images import ImageSource, open_images
from apm.pretrain.loop import read_log
from apm.pretrain.student import Student

from .study import ROOT, Options, Record, Study, averaged, each, markdown, plus_minus, run

Floats = NDArray[np.float32]
NAMES = {
    "grey": "grey",
    "constant": "mean colour",
    "place": "mean at each location",
    "linear": "linear map",
    "other": "student, another image's grey",
    "student": "**student**",
}
BASELINES = ("grey", "constant", "place", "linear")
PENALTIES = tuple(10.0**power for power in range(1, 9))


def readable(source: ImageSource) -> Iterator[Image.Image]:
    """The images that training counts, in its order."""
    return (image for _, image in source.read() if not isinstance(image, ImageError))


def reduced(image: Image.Image, side: int) -> Image.Image:
    """An image whose longer side is `side` pixels at most."""
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.BICUBIC)
    return small


def at_places(image: Image.Image, places: int) -> Floats:
    """Mean L, a, b (places, places, 3) of an image, over `places` × `places` equal cells."""
    planes = np.moveaxis(lab(np.asarray(image)), -1, 0)
    size = (places, places)
    pooled = (Image.fromarray(np.ascontiguousarray(one)).resize(size, Image.Resampling.BOX) for one in planes)
    return np.stack([np.asarray(one) for one in pooled], axis=-1)


class Baselines:
    """What is said of a photograph's a, b (P, P, 2) without a student.

    Args:
        train: Lab (n, P, P, 3) of training images at the student's places.
    """

    def __init__(self, train: Floats) -> None:
        from sklearn.linear_model import RidgeCV

        self.places = train.shape[1]
        self.place = train[..., 1:].mean(0)
        self.constant = np.broadcast_to(self.place.mean((0, 1)), self.place.shape)
        light = train[..., 0].reshape(len(train), -1)
        self._centre = light.mean(0)
        self._linear = RidgeCV(PENALTIES).fit(light - self._centre, train[..., 1:].reshape(len(train), -1))
        self.penalty = float(self._linear.alpha_)

    def __call__(self, image: Image.Image) -> dict[str, Floats]:
        """The a, b of each baseline."""
        light = at_places(image, self.places)[..., 0].reshape(1, -1) - self._centre
        linear = self._linear.predict(light).reshape(self.place.shape).astype(np.float32)
        return {"grey": np.zeros_like(self.place), "constant": self.constant, "place": self.place, "linear": linear}


@dataclass(frozen=True)
class Errors:
    """Of one photograph: by predictor, mean ΔE76 and mean squared distance in (a, b); mean chroma of two pictures."""

    delta_e: dict[str, float]
    squared: dict[str, float]
    chroma: dict[str, float]


def compare(image: Image.Image, guesses: dict[str, Floats]) -> Errors:
    """Lay each predictor's a, b on a photograph, and measure how far its colours are from the photograph's own."""
    own = lab(np.asarray(image))
    found = {name: lab(np.asarray(with_chroma(image, guess))) for name, guess in guesses.items()}
    return Errors(
        {name: float(np.linalg.norm(one - own, axis=-1).mean()) for name, one in found.items()},
        {name: float(np.square(one - own)[..., 1:].sum(-1).mean()) for name, one in found.items()},
        {name: float(np.linalg.norm(one[..., 1:], axis=-1).mean()) for name, one in (("own", own), *found.items())},
    )


def measure_set(images: Sequence[Image.Image], student: Student, baselines: Baselines, what: str) -> list[Errors]:
    """Compare all predictors on the photographs of one set."""

    def said(image: Image.Image) -> Floats:
        columns = student.columns(whole(image, student.config.image_size)[None])
        return chroma(student, columns, student.config.grid)[0]

    def one(number: int) -> Errors:
        image, other = images[number], images[(number + len(images) // 2) % len(images)]
        return compare(image, {**baselines(image), "other": said(other), "student": said(image)})

    return each(range(len(images)), one, what, minimum=2)


def summary(name: str, rows: Sequence[Errors]) -> Record:
    """What a set's record holds: means, their errors, and by how much each predictor is above the student."""
    delta = [row.delta_e for row in rows]
    above = [{key: one[key] - one["student"] for key in NAMES if key != "student"} for one in delta]
    squared = {key: float(np.mean([row.squared[key] for row in rows])) for key in NAMES}
    return {
        "name": name,
        "images": len(rows),
        "delta_e": averaged(delta),
        "above_student": averaged(above),
        "rms": {key: math.sqrt(value) for key, value in squared.items()},
        "explained": {key: 1 - value / squared["grey"] for key, value in squared.items()},
        "chroma": {key: float(np.mean([row.chroma[key] for row in rows])) for key in ("own", "student")},
    }


def measure(options: Options) -> Record:
    """Measure a checkpoint on the held-out part of its training images, and on other sets.

    Raises:
        UsageError: checkpoint or images are missing, the student's input was not grey, or the images are not those that
            it was trained on.
    """
    if not options.checkpoint or not options.root:
        raise UsageError("A checkpoint and --root, the images that it was trained on, are needed.")
    student = Student.load(options.checkpoint)
    check_student(student)
    settings, source = student.record["settings"], open_images(options.root)
    if source.fingerprint != settings["data"]:
        raise UsageError(f"{options.root} does not hold the images that the student was trained on.")
    config = PretrainConfig(**{name: settings[name] for name in settings.keys() & PretrainConfig.__dataclass_fields__})
    train, held_out = config.split(settings["images"])
    rng = np.random.default_rng([options.seed, 4])
    fitted = set(rng.permutation(train)[: options.fit].tolist())
    tested = set(rng.permutation(held_out)[: options.limit].tolist())
    places, fit, test = student.config.grid, [], []
    for number, image in enumerate(readable(source)):
        if number in fitted:
            fit.append(at_places(image, places))
        elif number in tested:
            test.append(reduced(image, options.side))
    baselines = Baselines(np.stack(fit))
    found = {"held out": measure_set(test, student, baselines, "held-out images")}
    for folder in options.other:
        images = [reduced(image, options.side) for image in readable(open_images(folder))]
        chosen = [images[number] for number in np.sort(rng.permutation(len(images))[: options.limit])]
        found[Path(folder).name] = measure_set(chosen, student, baselines, f"images of {Path(folder).name}")
    others = [row for name, rows in found.items() if name != "held out" for row in rows]
    rows = [summary(name, rows) for name, rows in found.items()] + ([summary("these others", others)] if others else [])
    return {
        "checkpoint": student.record,
        "file": hashlib.sha256(options.checkpoint.read_bytes()).hexdigest()[:16],
        "parameters": sum(p.numel() for p in student.model.parameters()),
        "train_images": len(train),
        "fitted_images": len(fit),
        "penalty": baselines.penalty,
        "side": options.side,
        "seed": options.seed,
        "mean_colour": baselines.constant[0, 0].tolist(),
        "sets": rows,
        "curves": read_log(options.checkpoint.with_name(options.checkpoint.name + ".log.jsonl")),
    }


def table(record: Record) -> str:
    """Markdown tables: ΔE76 of every predictor, and what else is to be known of each set."""
    titles = ("images", "n", *NAMES.values(), "best without student − student")
    rows, more = [], []
    for one in record["sets"]:
        best = min(BASELINES, key=lambda name: float(one["delta_e"][name][0]))
        shown = [plus_minus(one["delta_e"][name], 2) for name in NAMES]
        gain = f"{plus_minus(one['above_student'][best], 2)} ({NAMES[best]})"
        rows.append((one["name"], one["images"], *shown, gain))
        colours = (f"{one['chroma'][name]:.1f}" for name in ("own", "student"))
        more.append((one["name"], *(f"{one['rms'][name]:.2f}" for name in NAMES), *colours))
    settings, step = record["checkpoint"]["settings"], record["checkpoint"]["step"]
    note = (
        f"± standard error over images; the last column is paired by image. {record['train_images']:,} training "
        f"images, {step:,} steps of {settings['batch_size']} images at {settings['locations'] or 'all'} locations, "
        f"{record['parameters'] / 1e6:.1f} million weights, seed {settings['seed']}; baselines fitted on "
        f"{record['fitted_images']:,} of these images. Larger images are reduced to {record['side']} pixels. "
        f"The mean colour is a = {record['mean_colour'][0]:.1f}, b = {record['mean_colour'][1]:.1f}. The training took "
        f"{record['curves'][-1]['seconds'] / 60:.0f} minutes on {record['environment']['threads']} thread of "
        f"{record['environment']['processor']}, shared with other work."
    )
    distance = "Root mean squared distance in (a, b), and mean chroma √(a² + b²):"
    names = ("images", *NAMES.values(), "chroma, originals", "chroma, student")
    return "\n\n".join((markdown(titles, rows), note, distance, markdown(names, more)))


def draw(student: Student, images: Sequence[Path], path: Path) -> None:
    """Draw grey, coloured and original of some photographs, a column each."""
    figure = figures.new_figure(1.5 * len(images) + 0.4, 4.4)
    axes = figure.subplots(3, len(images), squeeze=False)
    for column, file in enumerate(images):
        original = reduced(load_image(file).image, 400)
        shown = (original.convert("L").convert("RGB"), colourise(student, original), original)
        for axis, picture, title in zip(axes[:, column], shown, ("grey", "coloured", "original"), strict=True):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
            if not column:
                axis.set_ylabel(title, fontsize=8)
    figures.save(figure, path, settings=f"{student.describe()}; none of these photographs is in the training set")


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--other", type=Path, nargs="+", default=[], help="other data sets, one row each")
    parser.add_argument("--limit", type=int, default=1000, help="images per set (default: %(default)s)")
    parser.add_argument("--fit", type=int, default=5000, help="training images for baselines (default: %(default)s)")
    parser.add_argument("--side", type=int, default=128, help="pixels of the longer side (default: %(default)s)")
    parser.add_argument("--pictures", type=Path, help="draw --images into this file instead of measuring")
    parser.add_argument("--images", type=Path, nargs="+", default=[])


STUDY = Study(
    name="colourising",
    question=__doc__,
    measure=measure,
    table=table,
    arguments=_arguments,
    shared={"root": None, "seed": 0},
    results="colourising.json",
    document=ROOT / "docs" / "colourise.md",
    marker="colourising",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or draw."""
    options = STUDY.read(arguments)
    if not options.pictures:
        STUDY.run(options)
        return
    if not options.checkpoint or not options.images:
        raise UsageError("--pictures needs a checkpoint and --images.")
    student = Student.load(options.checkpoint)
    check_student(student)
    draw(student, options.images, options.pictures)


if __name__ == "__main__":
    sys.exit(run(main))
