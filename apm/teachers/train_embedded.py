"""Train the embedded teacher: ``python -m apm.teachers.train_embedded --data FOLDER --out FOLDER``.

Two stages, because two processor cores are slow and names are few:

1. *Image stage.* The image tower (timm's, as open_clip's `TimmModel`) learns together with one unit vector for every
   concept, its prototype: cross-entropy over the labelled concepts, and over all 1000 ImageNet classes towards the
   soft targets of a public classifier. Images grow during training (64 to 96 pixels): early steps are cheap.
2. *Text stage* (`apm.teachers.train_text`, `apm.teachers.export_embedded`). The text tower learns to map names and
   everyday words, in any of CLIP's 80 templates or bare, to the prototypes or to the mean of several. Then the logit
   scale is calibrated on held-out images.

A checkpoint is written every ``--save-every`` steps; the same command continues from it. Everything is drawn from
``--seed`` and the step's number, so a run that was killed ends with the same weights as one that was not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apm.teachers.export_embedded import export
from apm.teachers.muon import Muon
from apm.teachers.train_data import (
    CIFAR_START,
    CONCEPTS,
    DIGIT_START,
    HOLDOUT,
    IMAGENET,
    Source,
    augment,
    load_sources,
    normalise,
)


@dataclass(frozen=True)
class Recipe:
    """What the image stage does. `sizes` are (image side, share of the steps), in order."""

    tower: str = "resnet10t"
    dim: int = 256
    steps: int = 3600
    batch: int = 256
    lr: float = 0.06  # Muon's, for the convolutions
    momentum: float = 0.6
    lr_other: float = 2e-3  # AdamW's, for everything else
    warmup: float = 0.05
    smoothing: float = 0.1
    soft_weight: float = 0.3
    scale: float = 16.0  # multiplies cosines in the image stage
    sizes: tuple[tuple[int, float], ...] = field(default=((64, 0.55), (80, 0.2), (96, 0.25)))
    image_size: int = 96  # of the finished teacher
    text_steps: int = 3000
    seed: int = 0


class ImageStage(nn.Module):
    """The image tower with one prototype per concept: `visual` → (B, dim), `prototypes` (CONCEPTS, dim)."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        from open_clip.timm_model import TimmModel

        torch.manual_seed(recipe.seed)
        self.visual = TimmModel(recipe.tower, embed_dim=recipe.dim, pool="", proj="linear", image_size=96)
        self.prototypes = nn.Parameter(torch.randn(CONCEPTS, recipe.dim) * 0.05)
        self.scale = recipe.scale
        self.to(memory_format=torch.channels_last)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, s, s) → logits of every concept (B, CONCEPTS)."""
        tokens = F.normalize(self.visual(pixels).float(), dim=-1)
        return self.scale * tokens @ F.normalize(self.prototypes, dim=-1).T


def candidates(source: str, seen: Tensor) -> Tensor:
    """The concepts an image of `source` is told apart from: CIFAR's "cat" must not compete with "tabby cat"."""
    cifar, digits = torch.arange(CIFAR_START, DIGIT_START), torch.arange(DIGIT_START, CONCEPTS)
    if source == "cifar10":
        return torch.cat([cifar, digits])
    if source == "digits":
        return torch.cat([seen, cifar, digits])
    return torch.cat([seen, digits])


def image_loss(logits: Tensor, source: Source, rows: Tensor, seen: Tensor, recipe: Recipe) -> Tensor:
    """Summed over rows: cross-entropy among the candidates, plus cross-entropy to the soft targets over ImageNet."""
    allowed = candidates(source.name, seen)
    place = torch.full((CONCEPTS,), -1)
    place[allowed] = torch.arange(len(allowed))
    loss = F.cross_entropy(
        logits[:, allowed], place[source.labels[rows]], label_smoothing=recipe.smoothing, reduction="sum"
    )
    soft = source.soft[rows]
    if recipe.soft_weight and soft.any():
        log_p = F.log_softmax(logits[:, :IMAGENET], dim=-1).gather(1, source.soft_index[rows])
        target = soft / soft.sum(1, keepdim=True).clamp_min(1e-6)
        loss = loss - recipe.soft_weight * (target * log_p).sum()
    return loss


def draw(source: Source, step: int, count: int, seed: int) -> Tensor:
    """Which images of `source` a step sees: `count` rows of endless seeded passes over its training part."""
    train = torch.arange(len(source.images))
    train = train[train % HOLDOUT != 0]
    start = step * count
    rows = []
    while count:
        epoch, offset = divmod(start, len(train))
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        part = train[order[offset : offset + count]]
        rows.append(part)
        start, count = start + len(part), count - len(part)
    return torch.cat(rows)


def size_at(progress: float, sizes: tuple[tuple[int, float], ...]) -> int:
    """The image side at `progress` in [0, 1)."""
    passed = 0.0
    for side, share in sizes:
        passed += share
        if progress < passed:
            return side
    return sizes[-1][0]


def rate_at(progress: float, warmup: float) -> float:
    """Learning-rate factor: linear warm-up, then linear to zero."""
    return progress / warmup if progress < warmup else (1 - progress) / (1 - warmup)


@torch.no_grad()
def holdout_accuracy(stage: ImageStage, source: Source, allowed: Tensor, size: int) -> float:
    """Top-1 of the prototypes on the held-out images of `source` among `allowed` concepts, in [0, 1]."""
    stage.eval()
    rows = torch.arange(0, len(source.images), HOLDOUT)
    hits = 0
    for part in rows.split(128):
        pixels = F.interpolate(normalise(source.images[part]), (size, size), mode="bicubic", antialias=True)
        with torch.autocast("cpu", torch.bfloat16):
            logits = stage(pixels.contiguous(memory_format=torch.channels_last))
        hits += int((allowed[logits[:, allowed].argmax(1)] == source.labels[part]).sum())
    stage.train()
    return hits / len(rows)


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Writes beside `path` and renames, so that a kill leaves the old file or the new one."""
    temporary = path.with_suffix(".partial")
    torch.save(state, temporary)
    os.replace(temporary, path)


def train_images(recipe: Recipe, sources: list[Source], out: Path, *, save_every: int) -> ImageStage:
    """Runs the image stage, or what is left of it, and returns the trained towers. Writes `out`/image_stage.pt."""
    stage = ImageStage(recipe)
    convolutions = [p for p in stage.parameters() if p.ndim == 4]
    others = [p for p in stage.parameters() if p.ndim != 4]
    muon = Muon(convolutions, lr=recipe.lr, momentum=recipe.momentum)
    adam = torch.optim.AdamW(
        [
            {"params": [p for p in others if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=recipe.lr_other,
        betas=(0.9, 0.98),
    )
    seen = torch.unique(torch.cat([s.labels for s in sources if s.name in ("tiny-imagenet", "imagenette")]))
    tiny = torch.unique(torch.cat([s.labels for s in sources if s.name == "tiny-imagenet"]))
    checkpoint, first, spent = out / "image_stage.pt", 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        stage.load_state_dict(saved["stage"])
        muon.load_state_dict(saved["muon"])
        adam.load_state_dict(saved["adam"])
        first, spent = saved["step"], saved["seconds"]
        print(f"continuing at step {first}", flush=True)
    counts = [max(1, round(recipe.batch * s.share)) for s in sources]
    stage.train()
    torch.set_flush_denormal(True)  # early gradients of the deepest filters are so small that they halve the speed
    started = time.perf_counter()
    for step in range(first, recipe.steps):
        progress = (step + 0.5) / recipe.steps
        size, factor = size_at(progress, recipe.sizes), rate_at(progress, recipe.warmup)
        for optimiser, rate in ((muon, recipe.lr), (adam, recipe.lr_other)):
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
        generator = torch.Generator().manual_seed(recipe.seed * 7_919 + step)
        rows = [draw(s, step, n, recipe.seed) for s, n in zip(sources, counts, strict=True)]
        pixels = torch.cat(
            [augment(s.images[r], size, generator, flip=s.flip) for s, r in zip(sources, rows, strict=True)]
        )
        with torch.autocast("cpu", torch.bfloat16):
            logits = stage(pixels.contiguous(memory_format=torch.channels_last))
        losses = [
            image_loss(part, s, r, seen, recipe) for part, s, r in zip(logits.split(counts), sources, rows, strict=True)
        ]
        loss = torch.stack(losses).sum() / len(pixels)
        muon.zero_grad()
        adam.zero_grad()
        loss.backward()
        muon.step()
        adam.step()
        done = step + 1
        if done % 50 == 0 or done == recipe.steps:
            seconds = spent + time.perf_counter() - started
            line: dict[str, Any] = {
                "step": done,
                "size": size,
                "loss": round(loss.item(), 4),
                "seconds": round(seconds),
            }
            if done % save_every == 0 or done == recipe.steps:
                line["holdout_tiny"] = round(holdout_accuracy(stage, sources[0], tiny, max(size, 80)), 4)
            print(json.dumps(line), flush=True)
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
        if done % save_every == 0 or done == recipe.steps:
            save_atomically(
                {
                    "stage": stage.state_dict(),
                    "muon": muon.state_dict(),
                    "adam": adam.state_dict(),
                    "step": done,
                    "seconds": spent + time.perf_counter() - started,
                },
                checkpoint,
            )
    return stage.eval()


def main(arguments: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m apm.teachers.train_embedded",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the three Parquet files")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the finished teacher")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--text-steps", type=int, default=Recipe.text_steps)
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--remark", default="", help="a sentence for the model card, on what was unusual in this run")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(steps=options.steps, text_steps=options.text_steps, seed=options.seed)
    (options.out / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1) + "\n")
    sources = load_sources(options.data)
    stage = train_images(recipe, sources, options.out, save_every=options.save_every)
    measured = export(
        stage.visual,
        stage.prototypes,
        sources,
        options.out,
        tower=recipe.tower,
        image_size=recipe.image_size,
        text_steps=recipe.text_steps,
        seed=recipe.seed,
    )
    (options.out / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")
    (options.out / "training.json").write_text(json.dumps(_describe(options, sources), indent=1) + "\n")
    print(json.dumps(measured), flush=True)


def _describe(options: argparse.Namespace, sources: list[Source]) -> dict[str, Any]:
    """What the model card says of the training itself."""
    log = [json.loads(line) for line in (options.out / "log.jsonl").read_text().splitlines()]
    minutes = round(log[-1]["seconds"] / 60)
    seen = sum(max(1, round(Recipe.batch * s.share)) for s in sources) * log[-1]["step"]
    summary = (
        f"{log[-1]['step']} steps, {seen:,} augmented images, {minutes} minutes for the image stage "
        f"on {torch.get_num_threads()} threads ({platform.machine()}, bfloat16 products), torch {torch.__version__}, "
        f"finished {time.strftime('%Y-%m-%d', time.gmtime())}. {options.remark}"
    )
    chosen = f"--steps {options.steps} --text-steps {options.text_steps} --seed {options.seed}"
    return {
        "command": f"python -m apm.teachers.train_embedded --data DATA --out OUT {chosen}",
        "images": {s.name: int((torch.arange(len(s.images)) % HOLDOUT != 0).sum()) for s in sources},
        "summary": summary.strip(),
    }


if __name__ == "__main__":
    main()
