"""How a masked autoencoder and the probe on it were trained: from their checkpoints and the ends of their logs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apm.errors import UsageError
from apm.images.paths import printable
from apm.mae.config import HeadConfig, HeadTraining, MAEConfig, MAETraining
from apm.mae.published import NETWORK, read_start
from apm.mae.training import load_mae
from apm.pretrain.checkpoint import read_network
from apm.settings import settings_of

from .rows import logged

BASE_SIZES = tuple(name for name, one in settings_of(MAEConfig).items() if one.option)


def training(checkpoint: Path, base: Path) -> dict[str, Any]:
    """How a probe and the autoencoder that it stands on were trained, and what their logs say at the end.

    Raises:
        UsageError: no probe, no such files, or the probe stands on another autoencoder.
    """
    probe, whole = load_mae(checkpoint), read_network(base, NETWORK)
    if probe.kind != "probe":
        raise UsageError(f"{printable(checkpoint)} is no checkpoint of `apm mae probe`.")
    if read_start(base, whole.student).digest != probe.settings["start"]:
        raise UsageError(f"{printable(checkpoint)} was not trained on {printable(base)}.")
    sizes = {name: getattr(whole.student, name) for name in BASE_SIZES}
    head = {name: getattr(probe.model.config, name) for name in settings_of(HeadConfig)}
    counts = {name: sum(one.numel() for one in part.parameters()) for name, part in probe.model.named_children()}
    return {
        "autoencoder": {
            "command": command_of("train", base, "", {**sizes, **whole.settings}, MAEConfig, MAETraining),
            "step": whole.step,
            **_kept(whole.settings),
            **_last(base),
        },
        "probe": {
            "command": command_of(
                "probe", checkpoint, f" --base {base.name}", {**head, **probe.settings}, HeadConfig, HeadTraining
            ),
            "step": probe.step,
            "weights": probe.digest,
            "classes": len(probe.class_names),
            **_kept(probe.settings),
            **_last(checkpoint),
        },
        "sizes": {**sizes, **head},
        "parameters": counts,
    }


def command_of(verb: str, path: Path, more: str, values: Mapping[str, Any], *kinds: type) -> str:
    """The command of a training, with the options that are not as they are by default."""
    defaults = {field.name: field.default for kind in kinds for field in dataclasses.fields(kind)}
    asked = [name for kind in kinds for name, one in settings_of(kind).items() if one.option]
    given = "".join(f" --{name.replace('_', '-')} {values[name]}" for name in asked if values[name] != defaults[name])
    return f"apm mae {verb} DATA{more} --out {path.name} --precision {values['precision']}{given}"


def _kept(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: settings[name] for name in ("steps", "batch_size", "lr", "seed", "images", "held_out", "precision")}


def _last(checkpoint: Path) -> dict[str, Any]:
    """What the log of a training says last of the held-out images."""
    row = logged(checkpoint)[-1]
    return {name: value for name, value in row.items() if name.startswith("held_out_")} | {"logged": row["step"]}


def text(trained: Mapping[str, Any], more: str) -> str:
    """Commands, sizes and what the logs say at the end, then `more`."""
    whole, probe, sizes, counts = (trained[name] for name in ("autoencoder", "probe", "sizes", "parameters"))
    return (
        f"    {whole['command']}\n    {probe['command']}\n\n"
        f"Images of {sizes['image_size']} pixels in patches of {sizes['patch_size']}; encoder of {_blocks(sizes, '')} "
        f"({counts['encoder'] / 1e6:.2f} million weights), decoder of {_blocks(sizes, 'decoder_')} "
        f"({counts['decoder'] / 1e6:.2f}), head of {_blocks(sizes, 'head_')} ({counts['head'] / 1e6:.2f}). "
        f"Autoencoder: {_made(whole)}; held-out error of masked patches {whole['held_out_reconstruction']:.4f}. "
        f"Probe: {_made(probe)}; held-out accuracy "
        f"{100 * probe['held_out_accuracy']:.2f} % of {probe['classes']} classes, cross-entropy "
        f"{probe['held_out_cross_entropy']:.3f}.{more}"
    )


def _blocks(sizes: Mapping[str, Any], part: str) -> str:
    depth = sizes[f"{part}depth"]
    return f"{depth} block{'s' * (depth != 1)}, {sizes[f'{part}width']} wide"


def _made(of: Mapping[str, Any]) -> str:
    held = round(of["held_out"] * of["images"])
    return (
        f"{of['step']:,} of {of['steps']:,} steps of {of['batch_size']} images, lr {of['lr']:g}, seed {of['seed']}, on "
        f"{of['images'] - held:,} images with {held:,} held out"
    )
