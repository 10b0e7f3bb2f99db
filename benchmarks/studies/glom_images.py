"""What studies of a trained GLOM share: its checkpoint, its images, the held-out ones, and their hidden locations."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apm.errors import UsageError
from apm.glom.config import GLOMTraining
from apm.glom.model import GLOM
from apm.glom.training import load_glom
from apm.pretrain.cache import GridCache, build_cache
from apm.pretrain.images import open_images

from .study import Options

BATCH = 50


@dataclass(frozen=True)
class Trained:
    """A trained GLOM, and how it was trained.

    Attributes:
        model: the network.
        config: of the training.
        step: optimiser steps made, of `config.steps`.
        settings: all of the checkpoint's.
    """

    model: GLOM
    config: GLOMTraining
    step: int
    settings: dict[str, Any]

    @property
    def settling(self) -> int:
        """Steps in which its columns settle."""
        return self.config.settling or self.model.config.steps

    @property
    def record(self) -> dict[str, Any]:
        """The network and its training, for a study's record."""
        return {
            "sizes": dataclasses.asdict(self.model.config),
            "parameters": sum(value.numel() for value in self.model.parameters()),
            "training": {name: value for name, value in self.settings.items() if name not in ("data", "images")},
        }

    def images(self, options: Options) -> GridCache:
        """Open the images that it was trained on.

        Raises:
            UsageError: `options.root` is missing, or holds others.
        """
        if options.root is None:
            raise UsageError("--root, the images that the network was trained on, is needed.")
        source = open_images(options.root)
        if source.fingerprint != self.settings["data"]:
            raise UsageError(f"{options.root} is not what the checkpoint was trained on: its split would be another.")
        folder = options.cache or Path(f"{options.checkpoint}.cache")
        return build_cache(source, None, folder, size=self.model.config.image_size)


def read_trained(options: Options) -> Trained:
    """Read the checkpoint that the arguments name.

    Raises:
        UsageError: none is named, or it cannot be read.
    """
    if options.checkpoint is None:
        raise UsageError("A checkpoint of `apm glom train` is needed.")
    model, settings = load_glom(options.checkpoint)
    fields = {one.name for one in dataclasses.fields(GLOMTraining)}
    config = GLOMTraining(**{name: value for name, value in settings.items() if name in fields})
    return Trained(model, config, settings["step"], settings)


def arguments(parser: ArgumentParser) -> None:
    """Add the arguments that all of them take."""
    parser.add_argument("checkpoint", type=Path, nargs="?", metavar="CKPT", help="checkpoint of `apm glom train`")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="folder for its cached images (default: CKPT.cache)")


@dataclass(frozen=True)
class Holes:
    """Held-out images, and which of their places are hidden."""

    images: Tensor
    """(B, 3, S, S), whole."""
    hidden: Tensor
    """(B, N)."""


def held_out(trained: Trained, cache: GridCache, limit: int | None) -> Iterator[Holes]:
    """The held-out images, or the first `limit` of them, in batches; the same places are hidden at every call."""
    _, numbers = trained.config.split(len(cache.names))
    numbers = numbers[:limit]
    for start in range(0, len(numbers), BATCH):
        part = numbers[start : start + BATCH]
        hidden = trained.config.hidden_places(len(part), trained.model.config.places, draw=(2, start))
        yield Holes(cache.inputs(part).contiguous(), torch.from_numpy(hidden))


def switched(model: GLOM, **parts: Any) -> GLOM:
    """The same weights with parts switched off: ``consensus="none"``, ``top_down=False``."""
    other = GLOM(replace(model.config, **parts), seed=None)
    kept = {name: value for name, value in model.state_dict().items() if name in other.state_dict()}
    other.load_state_dict(kept)
    return other.eval().requires_grad_(False)


def said(record: dict[str, Any]) -> str:
    """The network of a record, its training and the machine, in a sentence."""
    sizes, training, machine = record["glom"]["sizes"], record["glom"]["training"], record["environment"]
    radius = "with all locations" if sizes["radius"] is None else f"within a radius of {sizes['radius']:g}"
    side = sizes["image_size"] // sizes["patch_size"]
    return (
        f"GLOM: {sizes['levels']} levels of {sizes['dim']} dimensions at {side} × {side} locations of "
        f"{sizes['patch_size']} × {sizes['patch_size']} pixels, consensus {radius}; {record['glom']['parameters']:,} "
        f"parameters; {training['step']:,} of {training['steps']:,} steps of {training['batch_size']} images, lr "
        f"{training['lr']:g}, seed {training['seed']}. {record['date']}, {machine['processor']}, {machine['threads']} "
        f"thread{'s' * (machine['threads'] != 1)}. `{record['command']}`"
    )
