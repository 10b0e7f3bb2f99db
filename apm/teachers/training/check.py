"""What a checkpoint of the embedded teacher is chosen by: images, and sharp photographs, never trained on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apm.teachers.training.data import HOLDOUT, Sharp, Source, at_size


@torch.no_grad()
def answers(stage: nn.Module, images: Tensor, allowed: Tensor, size: int) -> Tensor:
    """The best of the `allowed` concepts for each of `images` (n, side, side, 3) uint8, seen at `size` pixels: (n,)."""
    stage.eval()
    best = []
    for part in images.split(128):
        pixels = at_size(part, size).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            logits = stage(pixels)
        best.append(allowed[logits[:, allowed].argmax(1)])
    stage.train()
    return torch.cat(best)


def mixed_check(stage: nn.Module, sources: list[Source], sharp: Sharp, size: int) -> dict[str, float]:
    """What a checkpoint is chosen by: shares in [0, 1] on images that were never trained on.

    `tiny` and `sharp`: top-1 of Tiny ImageNet's held-out images, and of imagenette's at full sharpness, among the
    labels of both sets. `drift`: share of sharp photographs of other things that are taken for one of imagenette's ten.
    `score` = tiny + sharp / 2 − drift / 2.
    """
    tiny, imagenette = (next(s for s in sources if s.name == name) for name in ("tiny-imagenet", "imagenette"))
    seen = torch.unique(torch.cat([tiny.labels, imagenette.labels]))
    rows = torch.arange(0, len(tiny.images), HOLDOUT)
    correct = (answers(stage, tiny.images[rows], seen, size) == tiny.labels[rows]).float().mean().item()
    known = (answers(stage, sharp.images, seen, size) == sharp.labels).float().mean().item()
    foreign = answers(stage, sharp.others, seen, size)
    drift = torch.isin(foreign, torch.unique(imagenette.labels)).float().mean().item()
    score = correct + known / 2 - drift / 2
    return {
        name: round(value, 4)
        for name, value in zip(("tiny", "sharp", "drift", "score"), (correct, known, drift, score), strict=True)
    }
