"""Everyday words: "dog" must hold its own against "church", though no image is labelled "dog".

A word of `lexicon.txt` covers several classes. In the image stage its direction is the mean of their prototypes: at
every step some words stand in for the classes that they cover, beside all other classes that have labelled images, and
the images must find the right one among these (`draw_labels`, `word_loss`). When the tower is finished, each word gets
a direction of its own, for which `fit_words` starts at that mean.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apm.labels import imagenet_names
from apm.teachers.training.data import CIFAR_START, CIFAR_WORDS, CONCEPTS, IMAGENET
from apm.teachers.training.text import read_lexicon


def word_members() -> tuple[dict[str, int], Tensor]:
    """Which concepts each word of the lexicon covers.

    Returns:
        word → row, and members (W, CONCEPTS) of 0 and 1, no two rows equal: words that mean the same share a row.

    Raises:
        ValueError: the lexicon names a class that does not exist.
    """
    index = {name: number for number, name in enumerate(imagenet_names())}
    index |= {word: CIFAR_START + number for number, word in enumerate(CIFAR_WORDS)}
    lexicon = read_lexicon()
    members = torch.zeros(len(lexicon), CONCEPTS)
    for row, (word, names) in enumerate(lexicon.items()):
        unknown = [name for name in names if name not in index]
        if unknown:
            raise ValueError(f"the lexicon's {word!r} names unknown classes {unknown}")
        members[row, [index[name] for name in names]] = 1
    members, rows = torch.unique(members, dim=0, return_inverse=True)
    return dict(zip(lexicon, rows.tolist(), strict=True)), members


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
    chosen = members[_disjoint(members, count, generator)]
    covered = chosen.sum(0)
    rest = seen[covered[seen] == 0]
    return torch.cat([chosen, F.one_hot(rest, CONCEPTS).float()])


def _disjoint(members: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Rows of `members` in random order, at most `count`, of which no two share a concept."""
    chosen: list[int] = []
    covered = torch.zeros(members.shape[1])
    for row in torch.randperm(len(members), generator=generator).tolist():
        if len(chosen) < count and not (members[row] * covered).any():
            chosen.append(row)
            covered = covered + members[row]
    return torch.tensor(chosen)


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


def fit_words(
    tokens: Tensor,
    concepts: Tensor,
    prototypes: Tensor,
    members: Tensor,
    frequency: Tensor,
    *,
    scale: float,
    seed: int,
    steps: int = 600,
    words: int = 24,
    batch: int = 512,
    lr: float = 2e-3,
    favour: float = 2.0,
) -> Tensor:
    """A direction for every word, with the tower and all prototypes left as they are.

    Each step offers some words and a random third of the seen classes. An image belongs to its own class where that is
    offered, else to the word that covers it: "dog" learns to win against "English Springer Spaniel" on a Labrador, and
    to lose on a spaniel. Logits are raised by the logarithm of a label's frequency, for a word that of the mean class
    that it covers, over `favour`. A word is thereby the more probable the more it covers, as everyday words are.

    Args:
        tokens: (n, dim), unit vectors of training images.
        concepts: (n,) what each is labelled with.
        prototypes: (CONCEPTS, dim), unit vectors.
        members: (W, CONCEPTS), see `word_members`.
        frequency: (CONCEPTS,) how often `tokens` show each concept.
        scale: multiplies cosines.
        seed: of everything that is drawn.
        steps, words, batch, lr: of AdamW; words offered and images at a step.
        favour: how much more probable a word is than the frequencies say.

    Returns:
        (W, dim), unit vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = F.normalize(members @ prototypes, dim=-1).requires_grad_()
    optimiser = torch.optim.AdamW([directions], lr=lr, weight_decay=0.0)
    seen = (frequency[:IMAGENET] > 0).nonzero().squeeze(1)
    log_class = frequency.clamp_min(1e-9).log()
    mean_class = members @ frequency / (members @ (frequency > 0).float()).clamp_min(1)
    log_word = (mean_class / favour).clamp_min(1e-9).log()
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = lr * (1 - step / steps)
        chosen = _disjoint(members, words, generator)
        offered = seen[torch.rand(len(seen), generator=generator) < 1 / 3]
        rows = torch.randint(len(tokens), (batch,), generator=generator)
        place = torch.where(members[chosen].any(0), members[chosen].argmax(0), -1)
        place[offered] = len(chosen) + torch.arange(len(offered))
        own = place[concepts[rows]]
        rows, own = rows[own >= 0], own[own >= 0]
        labels = torch.cat([F.normalize(directions[chosen], dim=-1), prototypes[offered]])
        raised = torch.cat([log_word[chosen], log_class[offered]])
        loss = F.cross_entropy(scale * tokens[rows] @ labels.T + raised, own)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return F.normalize(directions.detach(), dim=-1)
