"""What TTT-MAE gains by adapting several images in parallel: `python -m apm.benchmarks.studies.mae_students`.

Adapts the same images one at a time and in groups, each image with weights of its own, and reports images per second,
how far the answers differ, and the memory on a GPU. The network comes from a checkpoint, or is random with the default
sizes of `apm mae` and a head of 200 classes: the cost of a step does not depend on the weights. The images are noise.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser
from dataclasses import replace

import numpy as np
import torch

from apm.classifier import pick_device
from apm.errors import UsageError
from apm.mae.config import HeadConfig, MAEConfig
from apm.mae.model import MaskedAutoencoder
from apm.mae.test_time import Adapted, TestTimeAdapter, TestTimeSettings
from apm.mae.training import load_mae

from .study import ROOT, Options, Record, Study, markdown, numbers, run


def measure(options: Options) -> Record:
    """Time each number of students, `options.rounds` times in turn, after one round that is not counted.

    Raises:
        UsageError: fewer than one round; a checkpoint without a head.
    """
    groups = sorted({1, *options.students})
    if options.rounds < 1:
        raise UsageError(f"--rounds must be 1 or more, not {options.rounds}.")
    device = pick_device(options.device)
    if options.checkpoint is None:
        model = MaskedAutoencoder(MAEConfig().with_head(HeadConfig(), 200), seed=options.seed)
        model = model.to(device).eval().requires_grad_(False)
    else:
        model = load_mae(options.checkpoint, device=device).model
    count = options.limit or max(groups)
    size = model.config.image_size
    pixels = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(options.seed))
    settings = TestTimeSettings(steps=options.steps, masks=options.masks)
    seconds: dict[int, list[float]] = {group: [] for group in groups}
    answers: dict[int, Adapted] = {}
    memory: dict[int, int] = {}
    for number in range(1 + options.rounds):
        for group in groups:
            adapter = TestTimeAdapter(model, replace(settings, students=group), seed=options.seed)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            begun = time.perf_counter()
            answers[group] = adapter.adapt(pixels)
            answers[group].logits.cpu()  # waits for a GPU
            if number:
                seconds[group].append(time.perf_counter() - begun)
            memory[group] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    alone = answers[1].logits
    return {
        "images": count,
        "checkpoint": None if options.checkpoint is None else options.checkpoint.rpartition("/")[2],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "image_size": size,
        "patch_size": model.config.patch_size,
        "steps": options.steps,
        "masks": options.masks,
        "rounds": options.rounds,
        "seed": options.seed,
        "students": [
            {
                "students": group,
                "seconds": seconds[group],
                "images_per_second": count / float(np.median(seconds[group])),
                "largest_difference": float((answers[group].logits - alone).abs().max()),
                "memory": memory[group] or None,
            }
            for group in groups
        ],
    }


def table(record: Record) -> str:
    """A row for each number of students."""
    first = record["students"][0]["images_per_second"]
    rows = [
        [
            row["students"],
            f"{row['images_per_second']:.3g}",
            f"{row['images_per_second'] / first:.2f} ×",
            f"{row['largest_difference']:.1g}",
            "–" if row["memory"] is None else f"{row['memory'] / 2**30:.2f} GiB",
        ]
        for row in record["students"]
    ]
    titles = ["students side by side", "images/s", "against one at a time", "logits apart by at most", "memory"]
    environment = record["environment"]
    return (
        f"{markdown(titles, rows, text=0)}\n\n{record['images']} images of {record['image_size']} pixels in patches of "
        f"{record['patch_size']}, {record['parameters'] / 1e6:.1f} million weights, {record['steps']} steps of "
        f"{record['masks']} masks, median of {record['rounds']} rounds; {environment['device_name']}, "
        f"{environment['threads']} threads."
    )


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--checkpoint", help="of apm mae, with a head (default: one that is drawn)")
    parser.add_argument(
        "--students",
        type=numbers,
        default=[2, 4, 8],
        metavar="N,…",
        help="numbers of parallel students, compared with 1",
    )
    parser.add_argument("--masks", type=int, default=128, help="masks per step (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="number of timed rounds (default: %(default)s)")


STUDY = Study(
    name="mae_students",
    question=__doc__,
    measure=measure,
    table=table,
    arguments=_arguments,
    shared={"seed": 0, "device": "cpu", "steps": 20, "limit": None},
    results="mae-students.json",
    document=ROOT / "docs" / "mae.md",
    marker="students",
)

if __name__ == "__main__":
    sys.exit(run(STUDY.main))
