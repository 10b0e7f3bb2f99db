"""Train the embedded teacher: ``python -m apm.teachers.training.embedded --data DATA --photographs FOLDER --out OUT``.

Three stages, because two processor cores are slow and names are few:

1. *Image stage.* The image tower (timm's, as open_clip's `TimmModel`) learns together with one unit vector for every
   concept, its prototype: cross-entropy over the labelled concepts; over everyday words, each the mean of the
   prototypes that it covers (`apm.teachers.training.words`); and over all 1000 ImageNet classes towards the soft
   targets of a public classifier. Images grow during training (48 to 96 pixels): early steps are cheap. Of the
   checkpoints of the last tenth, the one that does best on held-out images *and on sharp photographs* is kept
   (`apm.teachers.training.check`).
2. *Labels*, with the tower left as it is. Imagenette's ten prototypes are refined on its sharp images
   (`apm.teachers.training.refine`), and every everyday word gets a direction of its own
   (`apm.teachers.training.words.fit_words`).
3. *Text stage* (`apm.teachers.training.text`, `apm.teachers.training.export`). The text tower learns to map names and
   everyday words, in any of CLIP's 80 templates or bare, to the prototypes and the words' directions. Then the logit
   scale is calibrated on held-out images.

A checkpoint is written every ``--save-every`` steps; the same command continues from it. Everything is drawn from
``--seed`` and the step's number, so a run that was killed ends with the same weights as one that was not.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apm.images.files import read_json_lines, write_atomically
from apm.teachers.training.check import mixed_check
from apm.teachers.training.data import (
    CIFAR_START,
    CONCEPTS,
    DIGIT_START,
    HOLDOUT,
    IMAGENET,
    Sharp,
    Source,
    augment,
    load_sharp,
    load_sharp_classes,
    load_sources,
)
from apm.teachers.training.export import export, save
from apm.teachers.training.muon import Muon
from apm.teachers.training.patches import use_patches
from apm.teachers.training.refine import refine
from apm.teachers.training.words import draw_labels, fit_words, word_loss, word_members


@dataclass(frozen=True)
class Recipe:
    """What the image stage does. `sizes` are (image side, share of the steps), in order."""

    tower: str = "resnet18"
    dim: int = 256
    steps: int = 5600
    batch: int = 512
    lr: float = 0.06  # Muon's, for the convolutions
    momentum: float = 0.6
    lr_other: float = 2e-3  # AdamW's, for everything else
    warmup: float = 0.05
    smoothing: float = 0.1
    soft_weight: float = 0.3
    word_weight: float = 0.5
    words: int = 24  # everyday words that a step practises at most
    word_images: int = 20_000  # that the words' own directions are fitted to
    scale: float = 16.0  # multiplies cosines in the image stage
    sizes: tuple[tuple[int, float], ...] = field(default=((48, 0.25), (64, 0.45), (80, 0.18), (96, 0.12)))
    image_size: int = 96  # of the finished teacher
    text_steps: int = 3200
    seed: int = 0


class ImageStage(nn.Module):
    """The image tower with one prototype per concept: `visual` → (B, dim), `prototypes` (CONCEPTS, dim)."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        from open_clip.timm_model import TimmModel

        torch.manual_seed(recipe.seed)
        self.visual = TimmModel(recipe.tower, embed_dim=recipe.dim, pool="", proj="linear", image_size=96)
        use_patches(self.visual.trunk.layer4)
        self.prototypes = nn.Parameter(torch.randn(CONCEPTS, recipe.dim) * 0.05)
        self.scale = recipe.scale
        self.to(memory_format=torch.channels_last)

    def tokens(self, pixels: Tensor) -> Tensor:
        """(B, 3, s, s) → unit tokens (B, dim)."""
        return F.normalize(self.visual(pixels).float(), dim=-1)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, s, s) → logits of every concept (B, CONCEPTS)."""
        return self.scale * self.tokens(pixels) @ F.normalize(self.prototypes, dim=-1).T


def candidates(source: str, seen: Tensor) -> Tensor:
    """The concepts an image of `source` is told apart from: CIFAR's "cat" must not compete with "tabby cat"."""
    cifar, digits = torch.arange(CIFAR_START, DIGIT_START), torch.arange(DIGIT_START, CONCEPTS)
    if source == "cifar10":
        return torch.cat([cifar, digits])
    if source == "digits":
        return torch.cat([seen, cifar, digits])
    return torch.cat([seen, digits])


def frequencies(sources: list[Source]) -> Tensor:
    """How often a training image shows each concept: (CONCEPTS,), sum 1."""
    counts = torch.zeros(CONCEPTS)
    for source in sources:
        counts += source.share * torch.bincount(source.labels, minlength=CONCEPTS) / len(source.labels)
    return counts / counts.sum()


def image_loss(logits: Tensor, source: Source, rows: Tensor, seen: Tensor, frequency: Tensor, recipe: Recipe) -> Tensor:
    """Summed over rows: cross-entropy among the candidates, plus cross-entropy to the soft targets over ImageNet.

    The logits of the candidates are raised by the logarithm of their `frequency` (balanced softmax, Ren et al. 2020),
    so that the network has no reason to prefer classes of which it sees more images.
    """
    allowed = candidates(source.name, seen)
    place = torch.full((CONCEPTS,), -1)
    place[allowed] = torch.arange(len(allowed))
    loss = F.cross_entropy(
        logits[:, allowed] + frequency[allowed].log(),
        place[source.labels[rows]],
        label_smoothing=recipe.smoothing,
        reduction="sum",
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


def optimisers(stage: ImageStage, recipe: Recipe) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the convolutions; AdamW for the rest, whose vectors do not decay."""
    others = [p for p in stage.parameters() if p.ndim != 4]
    muon = Muon((p for p in stage.parameters() if p.ndim == 4), lr=recipe.lr, momentum=recipe.momentum)
    adam = torch.optim.AdamW(
        [
            {"params": [p for p in others if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=recipe.lr_other,
        betas=(0.9, 0.98),
    )
    return muon, adam


@dataclass(frozen=True)
class Batch:
    """What a step sees: `rows` of each source, their augmented `pixels` (B, 3, size, size), and the step's `labels`.

    `labels` (L, CONCEPTS) are those of `apm.teachers.training.words.draw_labels`.
    """

    rows: list[Tensor]
    pixels: Tensor
    labels: Tensor


class Course:
    """What the losses of every step need to know of the training sets."""

    def __init__(self, recipe: Recipe, sources: list[Source]) -> None:
        self.recipe, self.sources = recipe, sources
        self.counts = [max(1, round(recipe.batch * s.share)) for s in sources]
        imagenet = [s.labels for s in sources if s.name in ("tiny-imagenet", "imagenette")]
        self.seen = torch.unique(torch.cat(imagenet))
        self.frequency, (_, self.members) = frequencies(sources), word_members()

    def batch(self, step: int) -> Batch:
        """Draw the batch of `step` from the recipe's seed and the step's number alone."""
        recipe = self.recipe
        size = size_at((step + 0.5) / recipe.steps, recipe.sizes)
        generator = torch.Generator().manual_seed(recipe.seed * 7_919 + step)
        rows = [draw(s, step, n, recipe.seed) for s, n in zip(self.sources, self.counts, strict=True)]
        parts = [augment(s.images[r], size, generator, flip=s.flip) for s, r in zip(self.sources, rows, strict=True)]
        labels = draw_labels(self.members, self.seen, recipe.words, generator)
        return Batch(rows, torch.cat(parts).contiguous(memory_format=torch.channels_last), labels)

    def loss(self, stage: ImageStage, batch: Batch) -> Tensor:
        """The mean loss of a batch's images: their own labels, soft targets and everyday words."""
        recipe, sources, rows = self.recipe, self.sources, batch.rows
        with torch.autocast("cpu", torch.bfloat16):
            tokens = recipe.scale * stage.tokens(batch.pixels)
        prototypes = F.normalize(stage.prototypes, dim=-1)
        losses = [
            image_loss(part @ prototypes.T, s, r, self.seen, self.frequency, recipe)
            for part, s, r in zip(tokens.split(self.counts), sources, rows, strict=True)
        ]
        concepts = torch.cat([s.labels[r] for s, r in zip(sources, rows, strict=True)])
        words = word_loss(tokens, prototypes, concepts, batch.labels, self.frequency)
        return torch.stack([*losses, recipe.word_weight * words]).sum() / len(tokens)


def train_images(recipe: Recipe, sources: list[Source], sharp: Sharp, out: Path, *, save_every: int) -> ImageStage:
    """Run the image stage, or what is left of it, and return the best checkpoint of its last tenth.

    Writes `out`/image_stage.pt (to continue from) and `out`/best.pt (weights and their check) every `save_every` steps,
    and a line of `out`/log.jsonl every 25.
    """
    stage = ImageStage(recipe)
    muon, adam = optimisers(stage, recipe)
    checkpoint, first, spent, best = out / "image_stage.pt", 0, 0.0, -math.inf
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        stage.load_state_dict(saved["stage"])
        muon.load_state_dict(saved["muon"])
        adam.load_state_dict(saved["adam"])
        first, spent, best = saved["step"], saved["seconds"], saved["best"]
        print(f"continuing at step {first}", flush=True)
    stage.train()
    started = time.perf_counter()
    course = Course(recipe, sources)
    ahead = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))  # prepares the next step's images
    pending = ahead.submit(course.batch, first)
    for step in range(first, recipe.steps):
        factor = rate_at((step + 0.5) / recipe.steps, recipe.warmup)
        for optimiser, rate in ((muon, recipe.lr), (adam, recipe.lr_other)):
            for group in optimiser.param_groups:
                group["lr"] = rate * factor
        batch = pending.result()
        pending = ahead.submit(course.batch, step + 1)
        loss = course.loss(stage, batch)
        muon.zero_grad()
        adam.zero_grad()
        loss.backward()
        muon.step()
        adam.step()
        done = step + 1
        saving = done % save_every == 0 or done == recipe.steps
        line: dict[str, Any] = {"step": done, "size": batch.pixels.shape[-1], "loss": round(loss.item(), 4)}
        line["seconds"] = round(spent + time.perf_counter() - started)
        line["threads"] = torch.get_num_threads()
        if saving:
            check = mixed_check(stage, sources, sharp, recipe.image_size)
            line |= check
            if done >= 0.9 * recipe.steps and check["score"] > best:
                best = check["score"]
                save({"stage": stage.state_dict(), "step": done, **check}, out / "best.pt")
            state = {"stage": stage.state_dict(), "muon": muon.state_dict(), "adam": adam.state_dict(), "step": done}
            save(state | {"best": best, "seconds": spent + time.perf_counter() - started}, checkpoint)
        if saving or done % 25 == 0:
            print(json.dumps(line), flush=True)
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
    ahead.shutdown(cancel_futures=True)
    stage.load_state_dict(torch.load(out / "best.pt", weights_only=True)["stage"])
    return stage.eval()


@torch.no_grad()
def training_tokens(stage: ImageStage, images: Tensor, recipe: Recipe, *, flip: bool) -> Tensor:
    """Unit tokens (n, dim) of `images` (n, side, side, 3) uint8, augmented at their final size."""
    generator = torch.Generator().manual_seed(recipe.seed)
    tokens = []
    for part in images.split(128):
        pixels = augment(part, recipe.image_size, generator, flip=flip, scale=0.6)
        with torch.autocast("cpu", torch.bfloat16):
            tokens.append(stage.tokens(pixels))
    return torch.cat(tokens)


def refined_prototypes(stage: ImageStage, images: Tensor, concepts: Tensor, recipe: Recipe) -> Tensor:
    """Every concept's prototype (CONCEPTS, dim), a unit vector, refined on sharp `images` (n, side, side, 3) uint8."""
    prototypes = F.normalize(stage.prototypes.detach(), dim=-1)
    tokens = training_tokens(stage, images, recipe, flip=True)
    return refine(prototypes, tokens, concepts, scale=recipe.scale, seed=recipe.seed)


def word_directions(stage: ImageStage, prototypes: Tensor, sources: list[Source], recipe: Recipe) -> dict[str, Tensor]:
    """Everyday word → its direction (dim,), a unit vector, among `prototypes` (CONCEPTS, dim)."""
    rows_of = {s.name: draw(s, 0, round(recipe.word_images * s.share), recipe.seed) for s in sources}
    tokens = torch.cat([training_tokens(stage, s.images[rows_of[s.name]], recipe, flip=s.flip) for s in sources])
    concepts = torch.cat([s.labels[rows_of[s.name]] for s in sources])
    frequency = torch.bincount(concepts, minlength=CONCEPTS) / len(concepts)
    rows, members = word_members()
    fitted = fit_words(tokens, concepts, prototypes, members, frequency, scale=recipe.scale, seed=recipe.seed)
    return {word: fitted[row] for word, row in rows.items()}


def main(arguments: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m apm.teachers.training.embedded",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the three Parquet files")
    parser.add_argument(
        "--photographs", type=Path, required=True, help="folder of sharp photographs that show none of imagenette's ten"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the finished teacher")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--text-steps", type=int, default=Recipe.text_steps)
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--remark", default="", help="a sentence for the model card, on what was unusual in this run")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(steps=options.steps, text_steps=options.text_steps, seed=options.seed)
    write_atomically(options.out / "recipe.json", (json.dumps(asdict(recipe), indent=1) + "\n").encode())
    torch.set_flush_denormal(True)  # early gradients of the deepest filters are so small that they halve the speed
    sources, sharp = load_sources(options.data), load_sharp(options.data, options.photographs)
    stage = train_images(recipe, sources, sharp, options.out, save_every=options.save_every)
    prototypes = refined_prototypes(stage, *load_sharp_classes(options.data), recipe)
    measured = export(
        stage.visual,
        prototypes,
        word_directions(stage, prototypes, sources, recipe),
        sources,
        options.out,
        tower=recipe.tower,
        image_size=recipe.image_size,
        text_steps=recipe.text_steps,
        seed=recipe.seed,
    )
    write_atomically(options.out / "measured.json", (json.dumps(measured, indent=1) + "\n").encode())
    write_atomically(options.out / "training.json", (json.dumps(_describe(options, sources), indent=1) + "\n").encode())
    print(json.dumps(measured), flush=True)


def _describe(options: argparse.Namespace, sources: list[Source]) -> dict[str, Any]:
    """What the model card says of the training itself."""
    log = read_json_lines(options.out / "log.jsonl")
    minutes = round(log[-1]["seconds"] / 60)
    seen = sum(max(1, round(Recipe.batch * s.share)) for s in sources) * log[-1]["step"]
    summary = (
        f"{log[-1]['step']} steps, {seen:,} augmented images, {minutes} minutes for the image stage "
        f"on {log[-1]['threads']} threads ({platform.machine()}, bfloat16 products), torch {torch.__version__}, "
        f"finished {time.strftime('%Y-%m-%d', time.gmtime())}. {options.remark}"
    )
    chosen = f"--steps {options.steps} --text-steps {options.text_steps} --seed {options.seed}"
    return {
        "command": f"python -m apm.teachers.training.embedded --data DATA --photographs PHOTOGRAPHS --out OUT {chosen}",
        "images": {s.name: int((torch.arange(len(s.images)) % HOLDOUT != 0).sum()) for s in sources},
        "summary": summary.strip(),
    }


if __name__ == "__main__":
    main()
