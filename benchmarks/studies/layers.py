"""What islands in a fixed model's layers follow: `python -m apm.benchmarks.studies.layers --root COCO --rows FILE`.

COCO contains ``images/*.jpg`` and ``masks/*.png`` (category numbers, 0: unlabelled). The layers of ``--source`` (as in
`apm islands`) are computed for each photograph's central square and measured as there: AMI of their k-means clusters
with superpixels, and contrast at the superpixels' edges. In addition, upsampled bilinearly, they are cut by k-means
into as many parts as the mask has categories: AMI with the mask, and boundary F. All of this is compared with controls:
the same network with random weights, shuffled patches, another image, plain colours, coordinates. Masks are used only
for scoring and for the number of clusters. ``--rows`` keeps a row per image: the same command resumes from it.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from apm.errors import UsageError
from apm.student import islands
from apm.student.field import resample
from apm.teachers import load_layers, load_teacher
from apm.teachers.layer_sources import parse_source
from apm.teachers.layers import LayerSource
from apm.test_time.layer_fields import LayerSeen, observe_layers

from .islands_masks import Judge
from .rows import Row, continued
from .scenes import Scene, photographs
from .study import ROOT, USUAL, Options, Record, Study, averaged, markdown, mean_and_error, plus_minus, run, signed

COLUMNS = {
    "AMI mask": "AMI, mask",
    "AMI other mask": "AMI, another's mask",
    "F mask": "F, mask",
    "AMI image": "AMI, superpixels",
    "AMI other image": "AMI, another's superpixels",
    "contrast image": "contrast, superpixels",
    "contrast other image": "contrast, another's superpixels",
}
COMPARED = ("AMI mask", "F mask", "contrast image")


class Looker:
    """Looks at scenes and scores every layer under every condition."""

    def __init__(self, source: LayerSource, untrained: LayerSource | None, options: Options) -> None:
        self.source, self.untrained, self.options = source, untrained, options

    def __call__(self, scene: Scene, other: Scene) -> Row:
        """Score one scene: layer → condition → measure."""
        options = self.options
        seen = observe_layers(
            scene.square,
            other.square,
            self.source,
            self.untrained,
            threshold=options.threshold,
            parts=options.parts,
            seed=options.seed,
        )
        judge = Judge(scene.truth, other.truth, options.parts, options.threshold, options.tolerance)
        return {
            "name": scene.name,
            "number": judge.number,
            "layers": {one.title: self._scores(one, judge) for one in seen},
        }

    def _scores(self, seen: LayerSeen, judge: Judge) -> dict[str, dict[str, float]]:
        found = {}
        for condition, field in seen.fields.items():
            between = resample(torch.from_numpy(field).float(), self.options.places)
            cut = islands.clusters(between.reshape(self.options.places, self.options.places, -1), judge.number)
            scores = judge.labels(cut, cut)
            found[condition] = {
                **seen.measured[condition],
                "AMI mask": scores["AMI, true number"],
                "AMI other mask": scores["AMI, true number, another's mask"],
                "F mask": scores["F, true number"],
            }
        return found


def measure(options: Options) -> Record:
    """Score the scenes."""
    if options.root is None:
        raise UsageError("--root, a folder with images and masks, is needed.")
    name = parse_source(options.source)
    teacher = load_teacher(options.teacher, device=options.device) if name.kind == "teacher" else None
    source = load_layers(name.text, teacher=teacher, size=options.pixels, device=options.device)
    untrained = source.at_random(options.seed) if name.seed is None else None
    scenes = [one for one in photographs(options.root, options.places) if one.usable]
    kept = ("pixels", "parts", "threshold", "tolerance", "places", "seed")
    settings = {
        **{name: getattr(options, name) for name in kept},
        "source": source.identity,
        "weights": source.weights.words,
        "frames": source.frames,
        "usable": len(scenes),
    }
    looker = Looker(source, untrained, options)
    rows = continued(
        range(min(options.limit, len(scenes))),
        lambda number: looker(scenes[number], scenes[(number + 1) % len(scenes)]),
        "photographs",
        path=options.rows,
        settings=settings,
    )
    return {"settings": settings, **summary(rows)}


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Means and standard errors over scenes.

    Returns:
        ``layers``: layer → condition → measure; ``differences``: layer → control → measure, the image's less the
        control's, paired.
    """
    layers = [row["layers"] for row in rows]
    less = [
        {
            layer: {
                control: {measure: of["image"][measure] - values[measure] for measure in COMPARED}
                for control, values in of.items()
                if control != "image"
            }
            for layer, of in one.items()
        }
        for one in layers
    ]
    return {
        "images": len(rows),
        "number": mean_and_error([row["number"] for row in rows]),
        "layers": averaged(layers),
        "differences": averaged(less),
    }


def table(record: Record) -> str:
    """A record as markdown: every layer under every condition, then what it has more than each control."""
    settings = record["settings"]
    rows = [
        (layer, condition, *(plus_minus(values[name], 3) for name in COLUMNS))
        for layer, conditions in record["layers"].items()
        for condition, values in conditions.items()
    ]
    video = f", the photograph repeated {settings['frames']} times" if settings["frames"] else ""
    size = f" at {settings['pixels']} pixels" if settings["pixels"] else ""
    paragraphs = (
        f"**`{settings['source'].partition('@')[0]}`, weights {settings['weights']}**{video}; {record['images']} "
        f"photographs{size}. Masks: k-means with as many clusters as the mask has categories, "
        f"{plus_minus(record['number'], 1)}; superpixels: {settings['parts']} superpixels and as many clusters.",
        markdown(("layer", "condition", *COLUMNS.values()), rows, text=2),
        "The image's own value minus … (paired; bold: beyond two standard errors):",
        _differences(record["differences"]),
        f"<sub>`{record['command']}` · {record['date']} · source `{settings['source']}` · masks at "
        f"{settings['places']} × {settings['places']} locations, boundaries within {100 * settings['tolerance']:g} % "
        f"of the diagonal · seed {settings['seed']} · ± is the standard error over images</sub>",
    )
    return "\n\n".join(paragraphs)


def _differences(found: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> str:
    controls = list(next(iter(found.values())))
    rows = [
        (layer, COLUMNS[measure], *(signed(of[control][measure]) for control in controls))
        for layer, of in found.items()
        for measure in COMPARED
    ]
    return markdown(("layer", "measure", *controls), rows, text=2)


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--source", default="teacher:2,3,4", help="as in apm islands (default: %(default)s)")
    parser.add_argument("--pixels", type=int, help="side of the model's input (default: its own)")
    parser.add_argument("--places", type=int, default=48, help="locations per side of the masks (default: %(default)s)")
    parser.add_argument(
        "--tolerance", type=float, default=0.02, help="tolerance for boundaries, as a share of the diagonal"
    )
    parser.add_argument("--threshold", type=float, default=0.9, help="minimum cosine of neighbours in one region")
    parser.add_argument("--parts", type=int, default=12, help="number of clusters and of superpixels")


STUDY = Study(
    name="layers",
    question=__doc__,
    measure=measure,
    table=table,
    arguments=_arguments,
    shared={**USUAL, "limit": 100, "rows": None},
    results="layers-*.json",
    document=ROOT / "docs" / "islands.md",
    marker="layers",
)

if __name__ == "__main__":
    sys.exit(run(STUDY.main))
