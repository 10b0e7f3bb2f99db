"""`apm mae`: train a masked autoencoder on images, and heads on it with labels."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apm.errors import UsageError
from apm.images.paths import printable
from apm.mae.config import HeadConfig, HeadTraining, Kind, MAEConfig, MAETraining

from .early import check_data
from .groups import command_group
from .options import Debug, options_of
from .render import notice
from .training import TRAINING, Images, Out, Session, check_checkpoint, session_options, train_network

if TYPE_CHECKING:
    from apm.mae.published import Start
    from apm.pretrain.cache import GridCache

NETWORK, HEAD = "The network", "The head"
SOURCES = "a checkpoint of apm mae, MAE's published file, timm:NAME or timm:NAME@FILE"

app = command_group(
    "Masked autoencoders (He et al. 2022) and heads, for the methods vit-probe and ttt-mae of apm bench."
)

Labelled = Annotated[
    Path,
    typer.Argument(
        help="A folder of class folders, or a Parquet file with the columns image and label and the classes' names.",
        metavar="DATA",
    ),
]
Base = Annotated[str, typer.Option(help=f"Initial encoder and decoder: {SOURCES}.", metavar="SOURCE")]
OptionalBase = Annotated[
    str | None,
    typer.Option(help=f"Start from these weights instead of random ones: {SOURCES}.", metavar="SOURCE"),
]
AllowTest = Annotated[
    bool, typer.Option("--allow-test", help="Also accept data whose name says that it is for testing.")
]


@app.command("train")
@options_of(MAEConfig, "sizes", NETWORK)
@options_of(MAETraining, "config", TRAINING)
@session_options
def train_(
    data: Images,
    out: Out,
    sizes: MAEConfig,
    config: MAETraining,
    session: Session,
    base: OptionalBase = None,
    debug: Debug = False,
) -> None:
    """Train a masked autoencoder: hide most patches of an image and predict them from the others, without labels.

    With --base the sizes are those of that checkpoint. Progress goes to stderr, the curves to CKPT.log.jsonl. After a
    kill the same command continues exactly from the last checkpoint. Under torchrun the processes share each batch.

    Exit code: 0 done, 1 done but some images were skipped (each is named on stderr), 2 wrong usage.
    """
    check_checkpoint(out)
    check_data(data)
    start = _start(base, sizes)
    chosen = replace(start.sizes if start else sizes, classes=0)

    from apm.mae.training import MAETrainer
    from apm.pretrain.images import open_images

    train_network(
        partial(MAETrainer, start=start),
        MAETrainer.network,
        open_images(data),
        out,
        chosen,
        config,
        session,
        names={"reconstruction": "masked patches"},
        result="held out on {held_out:,}: mean squared error of masked patches {reconstruction:.5f}",
    )


@app.command()
@options_of(HeadConfig, "head", HEAD)
@options_of(HeadTraining, "config", TRAINING)
@session_options
def probe(
    data: Labelled,
    base: Base,
    out: Out,
    head: HeadConfig,
    config: HeadTraining,
    session: Session,
    allow_test: AllowTest = False,
    debug: Debug = False,
) -> None:
    """Train a head on labels with a frozen encoder: the ViT probe, from which TTT-MAE starts too.

    Exit code: 0 done, 1 done but some images were skipped (each is named on stderr), 2 wrong usage.
    """
    _train_head("probe", data, base, out, head, config, session, allow_test)


@app.command()
@options_of(HeadConfig, "head", HEAD)
@options_of(HeadTraining, "config", TRAINING)
@session_options
def finetune(
    data: Labelled,
    base: Base,
    out: Out,
    head: HeadConfig,
    config: HeadTraining,
    session: Session,
    allow_test: AllowTest = False,
    debug: Debug = False,
) -> None:
    """Train head and encoder together on labels.

    Exit code: 0 done, 1 done but some images were skipped (each is named on stderr), 2 wrong usage.
    """
    _train_head("finetune", data, base, out, head, config, session, allow_test)


@app.command()
@options_of(HeadConfig, "head", HEAD)
@options_of(MAEConfig, "sizes", NETWORK)
@options_of(HeadTraining, "config", TRAINING)
@session_options
def joint(
    data: Labelled,
    out: Out,
    head: HeadConfig,
    sizes: MAEConfig,
    config: HeadTraining,
    session: Session,
    base: OptionalBase = None,
    allow_test: AllowTest = False,
    debug: Debug = False,
) -> None:
    """Train head, encoder and decoder at once, on labels and on masked patches.

    Exit code: 0 done, 1 done but some images were skipped (each is named on stderr), 2 wrong usage.
    """
    _train_head("joint", data, base, out, head, config, session, allow_test, sizes)


def _start(base: str | None, sizes: MAEConfig) -> Start | None:
    """The weights to begin with, without a head: each training has its own."""
    if base is None:
        return None
    from apm.mae.published import read_start

    found = read_start(base, sizes)
    return replace(found, weights={n: w for n, w in found.weights.items() if not n.startswith("head.")})


def _train_head(
    kind: Kind,
    data: Path,
    base: str | None,
    out: Path,
    head: HeadConfig,
    config: HeadTraining,
    session: Session,
    allow_test: bool,
    sizes: MAEConfig | None = None,
) -> None:
    check_checkpoint(out)
    from apm.benchmarks.datasets.training import class_of_each

    classes, class_names = class_of_each(data, allow_test=allow_test)
    start = _start(base, sizes or MAEConfig())
    if start is not None and kind == "probe" and not start.has_decoder:
        notice("The base has no decoder, so a random one is kept: the probe works as it is, but ttt-mae cannot use it.")
    chosen = (start.sizes if start else sizes or MAEConfig()).with_head(head, len(class_names))
    digest = hashlib.sha256(json.dumps([class_names, sorted(classes.items())]).encode()).hexdigest()[:16]

    from apm.mae.training import HeadTrainer
    from apm.pretrain.images import open_images

    def make(out: Path, cache: GridCache, *arguments: Any, **options: Any) -> HeadTrainer:
        import numpy as np

        if unknown := [name for name in cache.names if name not in classes]:
            raise UsageError(f"{len(unknown)} image(s) have no class, first {printable(unknown[0])}.")
        labels = np.array([classes[name] for name in cache.names], dtype=np.int64)
        return HeadTrainer(out, cache, *arguments, labels=labels, class_names=class_names, start=start, **options)

    names = {"cross_entropy": "cross-entropy", "accuracy": "accuracy"}
    if kind == "joint":
        names["reconstruction"] = "masked patches"
    train_network(
        make,
        HeadTrainer.network,
        open_images(data),
        out,
        chosen,
        replace(config, kind=kind),
        session,
        names=names,
        result="held out on {held_out:,}: accuracy {accuracy:.2%}, cross-entropy {cross_entropy:.4f}",
        data={"labels": digest},
    )
