"""How well a trained GLOM fills in hidden locations, compared with a convolutional autoencoder of the same size.

``python -m apm.benchmarks.studies.glom_reconstruction CKPT --root TRAINED_ON --record FILE`` measures on the held-out
images of the training. The autoencoder (`autoencoder.py`) is trained first, for as many steps as the GLOM, on the same
images in the same order with the same locations hidden; after a kill the same command resumes. Untrained baselines:
grey, the mean colour of the visible locations, and their colours weighted by 1 / distance². Errors are in units of
ImageNet's variance.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path

import torch
from torch import Tensor

from apm.glom.training import denoising_errors, hide
from apm.pretrain.cache import GridCache

from .autoencoder import (
    Autoencoder,
    AutoencoderSizes,
    AutoencoderTrainer,
    filling_errors,
    pixels_hidden,
    train_until,
    width_of_size,
)
from .glom_images import Holes, Trained, arguments, held_out, read_trained, said
from .study import ROOT, Options, Record, Study, each, markdown, mean_and_error, plus_minus, run

NAMES = {
    "grey": "grey",
    "mean": "mean colour of the visible locations",
    "near": "colours of the visible locations, weighted by 1 / distance²",
    "untrained": "GLOM, untrained",
    "autoencoder": "convolutional autoencoder",
    "glom": "GLOM",
}


def simple_fillings(holes: Holes, side: int) -> dict[str, Tensor]:
    """Whole images (B, 3, S, S) by name, made of the visible places' mean colours."""
    grid = holes.images.shape[-1] // side
    colours = torch.nn.functional.avg_pool2d(holes.images, side).flatten(2)  # (B, 3, N)
    axis = torch.arange(grid, dtype=torch.float32)
    where = torch.cartesian_prod(axis, axis)
    far = torch.cdist(where, where)
    weights = (~holes.hidden)[:, None] / far.square().clamp(min=1)  # (B, N, N): of visible places, for each place
    near = torch.einsum("bcj,bij->bci", colours, weights / weights.sum(-1, keepdim=True))
    seen = (~holes.hidden)[:, None].float()
    mean = (colours * seen).sum(-1, keepdim=True) / seen.sum(-1, keepdim=True)  # (B, 3, 1)

    def whole(values: Tensor) -> Tensor:
        maps = values.expand(-1, -1, grid * grid).unflatten(2, (grid, grid))
        return maps.repeat_interleave(side, 2).repeat_interleave(side, 3)

    return {"grey": torch.zeros_like(holes.images), "mean": whole(mean), "near": whole(near)}


@torch.no_grad()
def errors(trained: Trained, untrained: Trained, rival: Autoencoder, holes: Holes) -> dict[str, Tensor]:
    """Mean squared error (B,) of the hidden pixels, by name."""
    side = trained.model.config.patch_size
    fillings = simple_fillings(holes, side)
    fillings["autoencoder"] = rival(holes.images.masked_fill(pixels_hidden(holes.hidden, side), 0.0))
    found = {name: filling_errors(filled, holes.images, holes.hidden, side) for name, filled in fillings.items()}
    for name, one in (("untrained", untrained), ("glom", trained)):
        levels = one.model(hide(one.model, holes.images, holes.hidden), steps=one.settling)
        read = levels[:, :, one.config.read_level]
        found[name] = denoising_errors(one.model, read, holes.images, holes.hidden)
    return found


def train_rival(trained: Trained, cache: GridCache, path: Path, *, data: str) -> AutoencoderTrainer:
    """Train the autoencoder, or go on, up to the step that the GLOM is at."""
    glom = trained.model.config
    sizes = AutoencoderSizes(
        width=width_of_size(sum(value.numel() for value in trained.model.parameters())),
        image_size=glom.image_size,
        patch_size=glom.patch_size,
    )
    rival = AutoencoderTrainer(path, cache, sizes, trained.config, data={"data": data}, precision="fp32")

    def told(step: int) -> None:
        if step % 100 == 0 or step == trained.step:
            print(f"autoencoder: step {step} of {trained.step}", file=sys.stderr, flush=True)

    train_until(rival, trained.step, on_step=told)
    return rival


def measure(options: Options) -> Record:
    """Train what the GLOM is compared with, and compare on held-out images."""
    from apm.glom.model import GLOM

    trained = read_trained(options)
    cache = trained.images(options)
    path = options.autoencoder or options.checkpoint.with_suffix(".autoencoder.safetensors")
    rival = train_rival(trained, cache, path, data=trained.settings["data"])
    model = rival.model.eval()
    untrained = Trained(GLOM(trained.model.config, seed=1), trained.config, 0, trained.settings)
    batches = list(held_out(trained, cache, options.limit))
    found = each(batches, lambda holes: errors(trained, untrained, model, holes), "batches")
    rows = {name: torch.cat([one[name] for one in found]) for name in NAMES}
    return {
        "glom": trained.record,
        "autoencoder": {
            "width": model.config.width,
            "parameters": sum(value.numel() for value in model.parameters()),
            "step": rival.step,
        },
        "settling": trained.settling,
        "hidden": trained.config.hidden,
        "images": len(rows["glom"]),
        "errors": {name: mean_and_error(values) for name, values in rows.items()},
        "above_glom": {name: mean_and_error(values - rows["glom"]) for name, values in rows.items() if name != "glom"},
    }


def table(record: Record) -> str:
    """One row a filling, from worst to best, and how it was made."""
    found, above, rival = record["errors"], record["above_glom"], record["autoencoder"]
    rows = (
        (NAMES[name], plus_minus(found[name], 4), "–" if name == "glom" else plus_minus(above[name], 4))
        for name in sorted(found, key=lambda name: -found[name][0])
    )
    return (
        f"{markdown(('hidden locations filled with', 'mean squared error', 'minus GLOM, paired'), rows)}\n\n"
        f"{record['images']:,} held-out images, {100 * record['hidden']:.0f} % of the locations hidden, "
        f"{record['settling']} settling steps; ± standard error over images. Autoencoder: {rival['parameters']:,} "
        f"parameters, {rival['step']:,} steps with the same settings. {said(record)}"
    )


def _arguments(parser: ArgumentParser) -> None:
    arguments(parser)
    parser.add_argument(
        "--autoencoder", type=Path, metavar="FILE", help="the autoencoder's checkpoint (default: beside CKPT)"
    )


STUDY = Study(
    name="glom_reconstruction",
    question=__doc__,
    measure=measure,
    table=table,
    arguments=_arguments,
    shared={"root": None, "limit": None},
    results="glom-reconstruction.json",
    document=ROOT / "docs" / "glom.md",
    marker="reconstruction",
)

if __name__ == "__main__":
    sys.exit(run(STUDY.main))
