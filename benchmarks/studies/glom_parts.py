"""Ablation of a trained GLOM: consensus, its radius, the top-down nets and the number of steps.

``python -m apm.benchmarks.studies.glom_parts CKPT --root TRAINED_ON --record FILE`` measures how well hidden locations
of held-out images are filled in after 1, 2, … steps: by the network as trained, and with parts switched off. A network
that learned with a part may depend on it more than one that never had it: ``--retrain STEPS`` also trains networks
without each part, and one with all, for that many steps each; after a kill the same command resumes.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apm.glom.model import GLOM
from apm.glom.training import GLOMTrainer, denoising_errors, hide
from apm.pretrain.cache import GridCache

from .autoencoder import train_until
from .glom_images import Holes, Trained, arguments, held_out, read_trained, said, switched
from .study import ROOT, Options, Record, Study, each, markdown, mean_and_error, plus_minus, run

VARIANTS: dict[str, dict[str, Any]] = {
    "all parts": {},
    "no consensus": {"consensus": "none"},
    "no top-down": {"top_down": False},
    "neither": {"consensus": "none", "top_down": False},
    "consensus of all places": {"radius": None},
}


@torch.no_grad()
def errors_by_step(model: GLOM, holes: Holes, steps: int, read_level: int) -> Tensor:
    """Mean squared error of hidden places (B, steps), after 1, 2, … steps."""
    states = model.states(hide(model, holes.images, holes.hidden), steps=steps)
    next(states)  # before the first step
    found = [denoising_errors(model, levels[:, :, read_level], holes.images, holes.hidden) for levels in states]
    return torch.stack(found, 1)


def retrained(trained: Trained, cache: GridCache, folder: Path, steps: int) -> dict[str, GLOM]:
    """Networks that are trained from the first step without some part, by name."""
    models = {}
    for name, parts in VARIANTS.items():
        path = folder / f"{name.replace(' ', '-')}.safetensors"
        folder.mkdir(parents=True, exist_ok=True)
        trainer = GLOMTrainer(
            path,
            cache,
            replace(trained.model.config, **parts),
            replace(trained.config, steps=steps),
            data={"data": trained.settings["data"]},
            precision="fp32",
        )

        def told(step: int, name: str = name) -> None:
            if step % 50 == 0:
                print(f"{name}: step {step} of {steps}", file=sys.stderr, flush=True)

        train_until(trainer, steps, save_every=100, on_step=told)
        models[name] = trainer.model.eval().requires_grad_(False)
    return models


def measure(options: Options) -> Record:
    """Measure every variant on the same images with the same places hidden."""
    trained = read_trained(options)
    cache = trained.images(options)
    models: dict[str, dict[str, GLOM]] = {
        "switched off": {name: switched(trained.model, **parts) for name, parts in VARIANTS.items()}
    }
    if options.retrain:
        folder = options.variants or Path(f"{options.checkpoint}.variants")
        models["never there"] = retrained(trained, cache, folder, options.retrain)
    steps = options.settling or trained.settling + 2
    batches = list(held_out(trained, cache, options.limit))

    def one(holes: Holes) -> dict[str, dict[str, Tensor]]:
        level = trained.config.read_level
        return {
            kind: {name: errors_by_step(model, holes, steps, level) for name, model in of.items()}
            for kind, of in models.items()
        }

    found = each(batches, one, "batches")
    return {
        "glom": trained.record,
        "settling": trained.settling,
        "retrained_steps": options.retrain,
        "images": sum(len(holes.images) for holes in batches[: len(found)]),
        "errors": {
            kind: {
                name: [mean_and_error(values) for values in torch.cat([batch[kind][name] for batch in found]).unbind(1)]
                for name in of
            }
            for kind, of in models.items()
        },
    }


def table(record: Record) -> str:
    """A table for each kind: a row a variant, a column a number of steps."""
    titles = {
        "switched off": "Parts switched off in the trained network: mean squared error of hidden locations after …",
        "never there": f"Networks trained without the part for {record['retrained_steps']} steps: the same error after "
        "…",
    }
    parts = [f"{titles[kind]}\n\n{_table(of)}" for kind, of in record["errors"].items()]
    note = (
        f"{record['images']:,} held-out images, the same locations hidden throughout; in training the loss was taken "
        f"after {(record['settling'] + 1) // 2} to {record['settling']} settling steps; ± standard error over images. "
        f"{said(record)}"
    )
    return "\n\n".join([*parts, note])


def _table(of: Mapping[str, list[list[float]]]) -> str:
    steps = len(next(iter(of.values())))
    titles = ("", *(f"{step} step{'s' * (step > 1)}" for step in range(1, steps + 1)))
    return markdown(titles, ((name, *(plus_minus(value, 3) for value in values)) for name, values in of.items()))


def _arguments(parser: ArgumentParser) -> None:
    arguments(parser)
    parser.add_argument("--settling", type=int, help="largest number of steps (default: two more than in training)")
    parser.add_argument("--retrain", type=int, metavar="STEPS", help="also train networks without each part")
    parser.add_argument("--variants", type=Path, metavar="DIR", help="folder for these (default: CKPT.variants)")


STUDY = Study(
    name="glom_parts",
    question=__doc__,
    measure=measure,
    table=table,
    arguments=_arguments,
    shared={"root": None, "limit": None},
    results="glom-parts.json",
    document=ROOT / "docs" / "glom.md",
    marker="parts",
)

if __name__ == "__main__":
    sys.exit(run(STUDY.main))
