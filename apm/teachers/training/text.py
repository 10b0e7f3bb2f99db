"""The text stage of the embedded teacher: names and everyday words → the image stage's prototypes.

A target is a unit vector: the prototype of one concept, or the direction of a word of `lexicon.txt`, which covers
several (`apm.teachers.training.words`). The text tower reads the word in any of CLIP's templates, or bare, and must
come nearest to the word's own target among all of them.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apm.teachers.training.data import CIFAR_START, CIFAR_WORDS, DIGIT_NAMES, DIGIT_START

LEXICON = Path(__file__).with_name("lexicon.txt")
DIGIT_PHRASES = (
    "{}",
    "the digit {}",
    "the number {}",
    "a handwritten {}",
    "handwritten {}",
    "handwritten digit {}",
    "digit {}",
    "number {}",
)
EXTRA_TEMPLATES = ("{}", "{}.", "a {}", "the {}", "an image of a {}.", "a photo of {}.", "a picture of a {}.")


@dataclass(frozen=True)
class Vocabulary:
    """Texts with their targets: `words[i]` points at row `target[i]` of `targets` (T, dim), unit vectors.

    `frequent` marks words that batches draw more often: the labels the image tower has really learned.
    """

    words: tuple[str, ...]
    target: Tensor
    targets: Tensor
    frequent: Tensor


def read_lexicon(path: Path = LEXICON) -> dict[str, tuple[str, ...]]:
    """Word → class names, from lines `word, word: class | class`. Raises ValueError for a line of another form."""
    entries: dict[str, tuple[str, ...]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        words, colon, classes = line.partition(":")
        if not colon or not classes.strip():
            raise ValueError(f"{path.name}: no classes in the line {line!r}")
        for word in words.split(","):
            entries[word.strip()] = tuple(name.strip() for name in classes.split("|"))
    return entries


def vocabulary(
    prototypes: Tensor, class_names: list[str], seen: set[int], directions: Mapping[str, Tensor]
) -> Vocabulary:
    """Every text of the stage with its target.

    Args:
        prototypes: (concepts, dim), any length.
        class_names: the 1000 ImageNet names; two of them occur twice, then the seen class wins.
        seen: concept indices that had labelled training images.
        directions: everyday word → unit vector (dim,).
    """
    unit = F.normalize(prototypes.detach().float(), dim=-1)
    concept: dict[str, int] = {}
    for index, name in enumerate(class_names):
        if name not in concept or index in seen:
            concept[name] = index
    plain = {word: CIFAR_START + i for i, word in enumerate(CIFAR_WORDS)}
    texts: dict[str, Tensor] = {name: unit[index] for name, index in concept.items()}
    frequent = {name for name, index in concept.items() if index in seen}
    texts.update({word: unit[index] for word, index in plain.items()})
    frequent.update(plain)
    texts.update(directions)
    frequent.update(directions)
    for value, name in enumerate(DIGIT_NAMES):
        for phrase in DIGIT_PHRASES:
            for spelling in (name, str(value)):
                texts[phrase.format(spelling)] = unit[DIGIT_START + value]
                frequent.add(phrase.format(spelling))
    words = tuple(texts)
    targets, target = torch.unique(torch.stack([texts[w] for w in words]), dim=0, return_inverse=True)
    return Vocabulary(words, target, targets, torch.tensor([w in frequent for w in words]))


def write_bpe(texts: list[str], path: Path, *, common: int = 2000) -> int:
    """Cuts open_clip's byte-pair merges to the `common` most frequent ones and those that `texts` need.

    Words of `texts` are then tokenised exactly as by the full list. Writes `path` (gzip, open_clip's form) and returns
    the vocabulary's size.
    """
    from open_clip.tokenizer import SimpleTokenizer

    full = SimpleTokenizer()
    by_result: dict[str, list[tuple[str, str]]] = {}
    for pair in full.bpe_ranks:
        by_result.setdefault("".join(pair), []).append(pair)
    needed: set[tuple[str, str]] = {pair for pair, rank in full.bpe_ranks.items() if rank < common}

    def need(token: str) -> None:
        for pair in by_result.get(token, ()):
            if pair not in needed:
                needed.add(pair)
                for part in pair:
                    need(part)

    for text in texts:
        for token in full.encode(text):
            need(full.decoder[token])
    kept = sorted(needed, key=lambda pair: full.bpe_ranks[pair])
    lines = ["#version: cut from open_clip's bpe_simple_vocab_16e6", *(" ".join(pair) for pair in kept)]
    with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
        packed.write("\n".join(lines).encode())
    return SimpleTokenizer(bpe_path=str(path)).vocab_size


def train_text(
    tower: nn.Module,
    tokenizer: Any,
    words: Vocabulary,
    templates: tuple[str, ...],
    *,
    steps: int,
    batch: int = 256,
    lr: float = 1e-3,
    spread: Tensor | None = None,
    scale: float = 30.0,
    seed: int = 0,
) -> float:
    """Trains `tower` (tokens (B, context) → (B, dim)) in place; returns the last loss.

    Loss: cross-entropy over all targets at cosine × `scale`, plus one minus the cosine to the own target; with `spread`
    (dim, dim) plus 0.3 × the squared distance to it in these units: an error in a direction in which images differ
    changes answers, one in another does not. Half of a batch are frequent words, half any; a third of the texts stand
    bare, since a user's own template may be anything.
    """
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(tower.parameters(), lr=lr, weight_decay=0.02, betas=(0.9, 0.98))
    frequent = words.frequent.nonzero().squeeze(1)
    forms = (*templates, *EXTRA_TEMPLATES)
    tower.train()
    loss = torch.tensor(float("nan"))
    for step in range(steps):
        progress = step / steps
        for group in optimiser.param_groups:
            group["lr"] = lr * (progress / 0.05 if progress < 0.05 else (1 - progress) / 0.95)
        often = frequent[torch.randint(len(frequent), (batch // 2,), generator=generator)]
        index = torch.cat([often, torch.randint(len(words.words), (batch - len(often),), generator=generator)])
        form = torch.randint(len(forms), (batch,), generator=generator)
        bare = torch.rand(batch, generator=generator) < 0.33
        texts = [
            words.words[i] if b else forms[f].format(words.words[i])
            for i, f, b in zip(index.tolist(), form.tolist(), bare.tolist(), strict=True)
        ]
        with torch.autocast("cpu", torch.bfloat16):
            tokens = tower(tokenizer(texts))
        tokens = F.normalize(tokens.float(), dim=-1)
        cosines = tokens @ words.targets.T
        target = words.target[index]
        loss = F.cross_entropy(scale * cosines, target) + (1 - cosines.gather(1, target[:, None])).mean()
        if spread is not None:
            loss = loss + 0.3 * ((tokens - words.targets[target]) @ spread).square().sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimiser.step()
        if (step + 1) % 200 == 0:
            print(f"text step {step + 1} loss {loss.item():.4f}", flush=True)
    tower.eval()
    return loss.item()
