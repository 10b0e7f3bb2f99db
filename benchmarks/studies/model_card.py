# ruff: noqa: E501  (rows of markdown tables)
"""Writes the embedded teacher's model card from the records of its training and of its runs.

    python -m apm.benchmarks.studies.model_card FOLDER --run NAME=RUN … [--everyday RECORD]

`FOLDER` holds what `apm.teachers.training.embedded` wrote (`recipe.json`, `training.json`, `measured.json`, the weights);
each run is a folder of `apm bench … --method zero-shot`. Every figure of the card comes from one of them.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apm.images.files import write_atomically

from ..runs.records import Records
from ..tables.build import make_tables
from . import everyday
from .study import RESULTS, argument_parser, read_record, run

CARD = """\
# The embedded teacher

A small image–text model in open_clip's local-dir form, so that `apm` runs for real with no download. It is no CLIP: it has
seen {classes} classes of small images, and everyday words reach it only through them. For work that matters take a real
teacher (`--teacher ViT-B-16/openai`).

Load it with `apm.load_teacher("embedded")`, or with open_clip alone:

    open_clip.create_model_and_transforms("local-dir:FOLDER")
    open_clip.get_tokenizer("local-dir:FOLDER", bpe_path="FOLDER/bpe_vocab.txt.gz")

## What it is

| | |
|---|---|
| image tower | timm `{tower}`, average pooling, linear projection to {dim}; input {image_size}×{image_size} |
| text tower | transformer, {layers} layers of width {width}, context {context} tokens, vocabulary cut from CLIP's to {vocabulary} |
| weights | {megabytes:.1f} MB, float16 |
| logit scale | {logit_scale}, calibrated on {held_out_count} held-out training images |
| token scale | root mean square {deviation} a number, about that of OpenAI's CLIP |

## Data and their licences

| data | images used | licence |
|---|---|---|
| Tiny ImageNet (Stanford CS231n), 200 ImageNet classes at 64×64, 350 a class | {n_tiny} | ImageNet's terms: non-commercial research and education |
| imagenette (fast.ai), 10 ImageNet classes, brought to 64×64 | {n_nette} | Apache-2.0; the images under ImageNet's terms |
| CIFAR-10 (Krizhevsky 2009), 1,000 a class at 32×32 | {n_cifar} | none stated by its author |
| digits of scikit-learn (UCI Optical Recognition), training half | {n_digits} | CC BY 4.0 |
| soft targets: ten largest outputs of MobileNetEdgeTPU 1.0 on the first two sets | | the network: Apache-2.0 |
| byte-pair merges of CLIP's tokenizer, cut | | MIT |

Every 64th image of each set was held out from training. No image of the sets below was trained on.

## Recipe

`apm.teachers.training.embedded` in three stages: the image tower with a learned prototype per concept (cross-entropy among
the labelled concepts, plus cross-entropy to the soft targets over the 1000 ImageNet classes, plus cross-entropy among
everyday words); then, with the tower left as it is, imagenette's prototypes refined on its sharp images against one another,
and a direction for every word of `apm/teachers/training/lexicon.txt`; then the text tower on names, words and CLIP's 80
templates, at the end with its errors weighed by how images differ. There are no images of astronauts, or of most other things that the lexicon names: its words stand
for mixtures of trained classes.

    {command}

{training}

`recipe.json`:

    {recipe}

## Figures

Zero-shot top-1, one prompt per class, float32. Each row: its run's accuracy ± standard error, in percent, the number of
images, and the command. A few settings of the last two stages (the number of text steps, the weight of the last term, what
is taken out of the prototypes, how words are favoured) were chosen among two to four while looking at the validation images
of the first two rows and at these everyday photographs: the figures are a little optimistic.

| images | classes | n | top-1 | command |
|---|---:|---:|---:|---|
{figures}

{everyday}

{nearest:.1%} of its {texts} training texts (bare) lie nearest to their own target.

Commit {commit}, {processor}, {threads} threads, {versions}.

## Limits

Small, centred objects of {classes} classes are its world. Its probabilities are calibrated on Tiny ImageNet alone. All its
training images were made alike (64 pixels, JPEG, random resolution), because an earlier version told its training sets apart
by sharpness and JPEG traces, and took nearly every clean photograph for one of imagenette's ten classes. On photographs of
anything else, and on text beyond its lexicon, its answers are guesses. It carries the biases of its data; people in them are
recognised by clothes and things, which must not be used to judge people.
"""


def figure(name: str, run: Path) -> str:
    """One row of the table of figures, from a run folder with one cell and one method."""
    records = Records.open(run)
    (cell,) = records.cells.values()
    (table,) = make_tables([records], published=False)
    (score,) = table.rows[0].cells.values()
    command = shlex.join(records.run["sessions"][0]["command"])
    return f"| {name} | {cell['classes']} | {score.n} | {score.accuracy:.2f} ± {score.stderr:.2f} | `{command}` |"


def everyday_words(record: dict[str, Any]) -> str:
    """What the study of everyday words found, in a sentence and its table."""
    return (
        f"Everyday words, each photograph offered {', '.join(record['words'])} and imagenette's ten labels "
        f"(`{record['command']}`):\n\n{everyday.STUDY.table(record)}"
    )


def card(folder: Path, runs: dict[str, Path], record: dict[str, Any]) -> str:
    """The card's text.

    Args:
        folder: the finished teacher with the records of its training.
        runs: title → run folder.
        record: of `apm.benchmarks.studies.everyday`.
    """

    def read(name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
        return content

    recipe, measured, training = read("recipe.json"), read("measured.json"), read("training.json")
    config = read("open_clip_config.json")["model_cfg"]
    session = Records.open(next(iter(runs.values()))).run["sessions"][0]
    counts = training["images"]
    return CARD.format(
        classes=len((folder / "labels.txt").read_text(encoding="utf-8").splitlines()),
        tower=recipe["tower"],
        dim=config["embed_dim"],
        image_size=config["vision_cfg"]["image_size"],
        layers=config["text_cfg"]["layers"],
        width=config["text_cfg"]["width"],
        context=config["text_cfg"]["context_length"],
        vocabulary=config["text_cfg"]["vocab_size"],
        megabytes=(folder / "open_clip_model.safetensors").stat().st_size / 1e6,
        logit_scale=measured["logit_scale"],
        held_out_count=measured["held_out_count"],
        deviation=measured["token_deviation"],
        n_tiny=counts["tiny-imagenet"],
        n_nette=counts["imagenette"],
        n_cifar=counts["cifar10"],
        n_digits=counts["digits"],
        command=training["command"],
        training=training["summary"],
        recipe=json.dumps(recipe),
        figures="\n".join(figure(name, run) for name, run in runs.items()),
        everyday=everyday_words(record),
        nearest=measured["texts_nearest_to_their_target"],
        texts=measured["texts"],
        commit=session["git_commit"],
        processor=session["processor"],
        threads=session["threads"],
        versions=", ".join(f"{k} {session['versions'][k]}" for k in ("python", "torch", "open_clip_torch", "timm")),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argument_parser("model_card", __doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", action="append", required=True, metavar="NAME=RUN")
    parser.add_argument("--everyday", type=Path, default=RESULTS / everyday.STUDY.results, metavar="RECORD")
    options = parser.parse_args(arguments)
    runs = {name: Path(path) for name, _, path in (run.rpartition("=") for run in options.run)}
    write_atomically(options.folder / "README.md", card(options.folder, runs, read_record(options.everyday)).encode())


if __name__ == "__main__":
    sys.exit(run(main))
