"""`apm glom`: train GLOM on images, look at its columns, probe its levels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apm.errors import UsageError
from apm.glom.config import GLOMConfig, GLOMTraining
from apm.images.files import make_folder
from apm.images.paths import printable
from apm.settings import at_least, between, cosine

from .early import check_data, check_images, check_made
from .groups import command_group
from .options import Debug, Device, MaxPixels, options_of
from .progress import counted
from .render import read_image, say, say_files
from .training import TRAINING, Images, Out, Session, check_checkpoint, session_options, train_network

NETWORK = "The network"
MADE_BY = "apm glom train"

app = command_group("GLOM (Hinton 2021): columns of levels that agree, step by step, on a parse tree of the image.")


@app.command("train")
@options_of(GLOMConfig, "sizes", NETWORK)
@options_of(GLOMTraining, "config", TRAINING)
@session_options
def train_(
    data: Images,
    out: Out,
    sizes: GLOMConfig,
    config: GLOMTraining,
    session: Session,
    debug: Debug = False,
) -> None:
    """Train GLOM to fill in hidden locations of images and to tell locations apart. Labels are not used.

    Progress goes to stderr, the curves to CKPT.log.jsonl. After a kill the same command continues exactly from the last
    checkpoint.

    Exit code: 0 done, 1 done but some images were skipped (each is named on stderr), 2 wrong usage.
    """
    check_checkpoint(out)
    config.check_level(sizes)
    check_data(data)
    from apm.glom.training import GLOMTrainer
    from apm.pretrain.images import open_images

    train_network(
        GLOMTrainer,
        GLOMTrainer.network,
        open_images(data),
        out,
        sizes,
        config,
        session,
        names={"denoising": "hidden locations", "contrast": "contrast"},
        result="held out on {held_out:,}: mean squared error of hidden locations {denoising:.5f}, "
        "contrast {contrast:.5f}",
    )


@app.command()
def show(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The photograph; its central square is used.")],
    checkpoint: Annotated[Path, typer.Option(metavar="CKPT", help="Checkpoint of `apm glom train`.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for pictures, tree and arrays; made if need be.")],
    threshold: Annotated[float, typer.Option(help="Minimum cosine of neighbours in one island.")] = 0.9,
    steps: Annotated[
        int | None, typer.Option(help="Steps in which the columns settle. Default: as in training.")
    ] = None,
    device: Device = "auto",
    max_pixels: MaxPixels = None,
    debug: Debug = False,
) -> None:
    """Show the columns of one image: each level's embeddings as colours over the steps, and the parse tree.

    Writes the levels as a picture and as an animation, the islands and their tree as a picture and as nested JSON, and
    the arrays (npz). Prints the files' names.
    """
    if steps is not None:
        at_least(1)("--steps", steps)
    cosine("--threshold", threshold)
    check_made(checkpoint, MADE_BY)
    check_images(image)
    from apm.devices import pick_device
    from apm.figures.base import output_stem
    from apm.figures.glom import write_show
    from apm.glom.training import load_glom

    model, trained = load_glom(checkpoint, device=pick_device(device))
    photograph = read_image(image, max_pixels)
    make_folder(out)
    files = write_show(
        model,
        photograph,
        out / output_stem(image),
        steps=steps or trained["settling"] or model.config.steps,
        threshold=threshold,
        settings={
            "image": printable(image.name),
            "GLOM": f"{model.config.levels} levels of {model.config.dim}",
            "trained": f"{trained['step']} steps",
        },
    )
    say_files(files)


@app.command()
def probe(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A Parquet file with the columns image and label.")],
    checkpoint: Annotated[Path, typer.Option(metavar="CKPT", help="Checkpoint of `apm glom train`.")],
    train_on: Annotated[
        int, typer.Option("--train", help="Number of training images; the others are for testing.")
    ] = 8000,
    limit: Annotated[int | None, typer.Option(help="Use this many images only.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps in which the columns settle. Default: as in training.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split and of the fits.")] = 0,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the record there, as JSON.")] = None,
    device: Device = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
    debug: Debug = False,
) -> None:
    """Fit a linear classifier on each level's embeddings, on the pixels, and on an untrained network.

    Prints a table. Labels are used only by the probe; the network is not changed.
    """
    for name, value in (("--steps", steps), ("--limit", limit)):
        if value is not None:
            at_least(1)(name, value)
    between(0, 2**32 - 1)("--seed", seed)  # scikit-learn's range
    check_made(checkpoint, MADE_BY)
    if not data.is_file():
        raise UsageError(f"{printable(data)}: no such file; a probe needs a Parquet file with images and labels.")
    from apm.benchmarks.runs.environment import write_record
    from apm.benchmarks.studies.glom_probe import probe_levels
    from apm.benchmarks.studies.linear_probe import table
    from apm.devices import pick_device
    from apm.glom.training import load_glom

    model, trained = load_glom(checkpoint, device=pick_device(device))
    with counted("probe", wanted=not quiet) as far:
        record = probe_levels(
            model,
            data,
            steps=steps or trained["settling"] or model.config.steps,
            train=train_on,
            limit=limit,
            seed=seed,
            on_probe=far,
        )
    say(table(record))
    if out is not None:
        write_record({"checkpoint": checkpoint.name, "trained": trained, **record}, out)
