"""`apm glom`: train GLOM on images, look at its columns, probe its levels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from apm.errors import UsageError, unknown
from apm.images.paths import printable

from . import training as shared
from .groups import Group
from .options import Debug, MaxPixelsOfImage
from .progress import counted
from .render import failure, notice, notice_if_slow, say
from .training import FILES, TRAINING, TrainingProgress, check_training, train

NETWORK = "The network"

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="GLOM (Hinton 2021): columns of levels that agree, step by step, on a parse tree of the image.",
)


@app.command("train")
def train_(
    data: Annotated[
        Path,
        typer.Argument(help="Images in and below a folder, or Parquet files with a column image.", metavar="DATA"),
    ],
    out: shared.Out,
    image_size: Annotated[int, typer.Option(help="Side of the images in pixels.", rich_help_panel=NETWORK)] = 64,
    patch_size: Annotated[int, typer.Option(help="Side of a place in pixels.", rich_help_panel=NETWORK)] = 8,
    dim: Annotated[int, typer.Option(help="Numbers of an embedding.", rich_help_panel=NETWORK)] = 128,
    levels: Annotated[int, typer.Option(help="Levels of a column.", rich_help_panel=NETWORK)] = 5,
    expansion: Annotated[
        int, typer.Option(help="Hidden width of the nets, in units of --dim.", rich_help_panel=NETWORK)
    ] = 4,
    consensus: Annotated[
        str,
        typer.Option(help="Whom a place hears: all, others (hardly itself) or none.", rich_help_panel=NETWORK),
    ] = "all",
    radius: Annotated[
        float | None,
        typer.Option(help="Places farther apart do not hear each other. Default: all do.", rich_help_panel=NETWORK),
    ] = None,
    top_down: Annotated[
        bool, typer.Option(help="Whether the level above is heard at all.", rich_help_panel=NETWORK)
    ] = True,
    steps: shared.Steps = 3000,
    batch_size: Annotated[int, typer.Option(help="Images a step.", rich_help_panel=TRAINING)] = 32,
    lr: shared.LearningRate = 1e-3,
    warmup: shared.Warmup = 100,
    weight_decay: shared.WeightDecay = 0.01,
    settling: Annotated[
        int | None,
        typer.Option(help="Steps in which the columns settle. Default: twice the levels.", rich_help_panel=TRAINING),
    ] = None,
    hidden: Annotated[float, typer.Option(help="Share of the places that is hidden.", rich_help_panel=TRAINING)] = 0.5,
    read_level: Annotated[
        int, typer.Option(help="Level that pixels are read from; -1 the highest.", rich_help_panel=TRAINING)
    ] = 0,
    contrast_weight: Annotated[float, typer.Option(help="Weight of the contrast.", rich_help_panel=TRAINING)] = 0.1,
    contrast_columns: Annotated[
        int, typer.Option(help="Columns that are contrasted in a step.", rich_help_panel=TRAINING)
    ] = 256,
    temperature: Annotated[float, typer.Option(help="Temperature of the contrast.", rich_help_panel=TRAINING)] = 0.1,
    agree: Annotated[
        float,
        typer.Option(help="Cosine from which on two places agree and do not repel.", rich_help_panel=TRAINING),
    ] = 0.7,
    held_out: shared.HeldOut = 0.05,
    seed: Annotated[
        int, typer.Option(help="Seed of weights, split, order, hidden places.", rich_help_panel=TRAINING)
    ] = 0,
    precision: Annotated[
        str, typer.Option(help="Number format of the matrix products: auto, fp32 or bf16.", rich_help_panel=TRAINING)
    ] = "auto",
    device: shared.Device = "auto",
    evaluate_every: shared.EvaluateEvery = 100,
    save_every: shared.SaveEvery = 200,
    cache: Annotated[
        Path | None, typer.Option(help="Where the images are kept. Default: CKPT.cache.", rich_help_panel=FILES)
    ] = None,
    max_pixels: shared.MaxPixels = None,
    quiet: shared.Quiet = False,
    debug: Debug = False,
) -> None:
    """Train GLOM: fill in hidden places of images, and tell each place from others by what is said of it. No labels.

    Progress goes to stderr, the curves to CKPT.log.jsonl. The same command after a kill goes on exactly where the last
    checkpoint was.

    Exit code: 0 done, 1 done but some images were skipped (each is named on stderr), 2 wrong usage.
    """
    check_training(out, evaluate_every, save_every, max_pixels)
    from typing import get_args

    from apm.classifier import pick_device
    from apm.glom.model import GLOMConfig
    from apm.glom.training import NETWORK as KIND
    from apm.glom.training import GLOMTrainer, GLOMTraining
    from apm.images.load import MAX_PIXELS
    from apm.pretrain.cache import build_cache
    from apm.pretrain.checkpoint import check_settings, read_network
    from apm.pretrain.images import open_images
    from apm.student.config import Precision

    if precision not in get_args(Precision):
        raise unknown("precision", precision, get_args(Precision))
    sizes = GLOMConfig(
        image_size=image_size,
        patch_size=patch_size,
        dim=dim,
        levels=levels,
        expansion=expansion,
        consensus=consensus,  # type: ignore[arg-type]
        radius=radius,
        top_down=top_down,
    )
    config = GLOMTraining(
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        warmup=warmup,
        weight_decay=weight_decay,
        settling=settling,
        hidden=hidden,
        read_level=read_level,
        contrast_weight=contrast_weight,
        contrast_columns=contrast_columns,
        temperature=temperature,
        agree=agree,
        held_out=held_out,
        seed=seed,
    )
    config.check_level(sizes)
    place = pick_device(device)
    source = open_images(data)
    if out.exists():  # told now, and not after many images are read
        check_settings(out, read_network(out, KIND), sizes, {"data": source.fingerprint})
    notice_if_slow(precision, place)
    with TrainingProgress(len(source), "images", wanted=not quiet) as progress:
        images = build_cache(
            source,
            None,
            cache or out.with_name(out.name + ".cache"),
            size=image_size,
            max_pixels=MAX_PIXELS if max_pixels is None else max_pixels,
            on_image=progress.image,
        )
    trainer = GLOMTrainer(
        out,
        images,
        sizes,
        config,
        data={"data": source.fingerprint},
        precision=precision,  # type: ignore[arg-type]
        device=place,
    )
    train(trainer, {"denoising": "hidden places", "contrast": "contrast"}, evaluate_every, save_every, wanted=not quiet)
    for _, error in images.skipped:
        failure(f"{error}: skipped")
    errors, contrast = trainer.held_out_losses()
    say(
        f"{out}: {trainer.step:,} steps on {len(trainer.train):,} images; held out on {len(trainer.held_out):,}: mean "
        f"squared error of hidden places {errors:.5f}, contrast {contrast:.5f}"
    )
    if images.skipped:
        raise typer.Exit(1)


@app.command()
def show(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The photograph; its central square is used.")],
    checkpoint: Annotated[Path, typer.Option(metavar="CKPT", help="Checkpoint of `apm glom train`.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for pictures, tree and arrays; made if need be.")],
    threshold: Annotated[float, typer.Option(help="Cosine from which on neighbours are of one island.")] = 0.9,
    steps: Annotated[
        int | None, typer.Option(help="Steps in which the columns settle. Default: as in training.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    max_pixels: MaxPixelsOfImage = None,
    debug: Debug = False,
) -> None:
    """Look at the columns of one image: each level's embeddings in colours over the steps, and the parse tree.

    Writes the levels as a picture and as an animation, the islands and their tree as a picture and as nested JSON, and
    the arrays (npz). Prints the files' names.
    """
    if steps is not None and steps < 1:
        raise UsageError(f"--steps must be 1 or more, not {steps}.")
    if not -1 <= threshold <= 1:
        raise UsageError(f"--threshold is a cosine, from -1 to 1, not {threshold}.")
    from apm.classifier import pick_device
    from apm.figures.base import output_stem
    from apm.figures.glom import write_show
    from apm.glom.training import load_glom
    from apm.images.files import make_folder
    from apm.images.load import MAX_PIXELS, load_image

    model, trained = load_glom(checkpoint, device=pick_device(device))
    loaded = load_image(image, max_pixels=MAX_PIXELS if max_pixels is None else max_pixels)
    for note in loaded.notes:
        notice(note)
    make_folder(out)
    files = write_show(
        model,
        loaded.image,
        out / output_stem(image),
        steps=steps or trained["settling"] or model.config.steps,
        threshold=threshold,
        settings={
            "image": printable(image.name),
            "GLOM": f"{model.config.levels} levels of {model.config.dim}",
            "trained": f"{trained['step']} steps",
        },
    )
    for file in files:
        say(str(file))


@app.command()
def probe(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A Parquet file with the columns image and label.")],
    checkpoint: Annotated[Path, typer.Option(metavar="CKPT", help="Checkpoint of `apm glom train`.")],
    train_on: Annotated[int, typer.Option("--train", help="Images to fit on; the others test.")] = 8000,
    limit: Annotated[int | None, typer.Option(help="Use this many images only.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps in which the columns settle. Default: as in training.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split and of the fits.")] = 0,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the record there, as JSON.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
    debug: Debug = False,
) -> None:
    """Fit a linear classifier on each level's embeddings, beside the pixels and a network that was not trained.

    Prints a table. Labels serve the probe alone: the network is not changed.
    """
    for name, value in (("--steps", steps), ("--limit", limit)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be 1 or more, not {value}.")
    from apm.benchmarks.runs.environment import write_record
    from apm.benchmarks.studies.glom_probe import probe_levels
    from apm.benchmarks.studies.linear_probe import table
    from apm.classifier import pick_device
    from apm.glom.training import load_glom

    model, trained = load_glom(checkpoint, device=pick_device(device))
    if not data.is_file():
        raise UsageError(f"{printable(data)}: no such file; a probe needs a Parquet file with images and labels.")
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
    if out is not None:
        write_record({"checkpoint": checkpoint.name, "trained": trained, **record}, out)
    say(table(record))
