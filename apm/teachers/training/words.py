"""Everyday words in the image stage: "dog" must hold its own against "church", though no image is labelled "dog".

A word of `lexicon.txt` covers several classes, and its direction is the mean of their prototypes. At every step some
words stand in for the classes that they cover, beside all other classes that have labelled images, and the images must
find the right one among these.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apm.labels import imagenet_names
from apm.teachers.training.data import CIFAR_START, CIFAR_WORDS, CONCEPTS
from apm.teachers.training.text import read_lexicon


def word_members() -> Tensor:
    """Which concepts each line of the lexicon covers: (W, CONCEPTS) of 0 and 1, no two rows equal."""
    index = {name: number for number, name in enumerate(imagenet_names())}
    index |= {word: CIFAR_START + number for number, word in enumerate(CIFAR_WORDS)}
    covers = dict.fromkeys(read_lexicon().values())
    members = torch.zeros(len(covers), CONCEPTS)
    for row, names in enumerate(covers):
        members[row, [index[name] for name in names]] = 1
    return torch.unique(members, dim=0)


def draw_labels(members: Tensor, seen: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The labels of one step: at most `count` words of which no two share a concept, and the seen classes left over.

    Args:
        members: (W, CONCEPTS), see `word_members`.
        seen: indices of the classes that have labelled images.
        count: how many words at most.
        generator: decides which words.

    Returns:
        (L, CONCEPTS) of 0 and 1: row i covers the concepts of label i, each concept at most once.
    """
    chosen: list[Tensor] = []
    covered = torch.zeros(CONCEPTS)
    for row in torch.randperm(len(members), generator=generator).tolist():
        if len(chosen) < count and not (members[row] * covered).any():
            chosen.append(members[row])
            covered = covered + members[row]
    rest = seen[covered[seen] == 0]
    return torch.cat([torch.stack(chosen), F.one_hot(rest, CONCEPTS).float()])


def word_loss(tokens: Tensor, prototypes: Tensor, concepts: Tensor, labels: Tensor, frequency: Tensor) -> Tensor:
    """Cross-entropy among a step's labels, summed over the images that one of them covers.

    Args:
        tokens: (B, dim), unit vectors times the scale of the logits.
        prototypes: (CONCEPTS, dim), unit vectors.
        concepts: (B,) what each image is labelled with.
        labels: (L, CONCEPTS), see `draw_labels`.
        frequency: (CONCEPTS,) how often a training image shows each; balances the softmax.
    """
    label_of = torch.where(labels.any(0), labels.argmax(0), -1)[concepts]
    rows = (label_of >= 0).nonzero().squeeze(1)
    directions = F.normalize(labels @ prototypes, dim=-1)  # (L, dim)
    logits = tokens[rows] @ directions.T + (labels @ frequency).clamp_min(1e-9).log()
    return F.cross_entropy(logits, label_of[rows], reduction="sum")
