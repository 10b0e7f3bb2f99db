"""Prototypes of the classes of which there are sharp images, refined on these.

The image stage sees every image at 64 pixels, so that sharpness tells no class. Imagenette's images are there sharp,
too, and its ten prototypes are refined on them against one another. What the ten have in common must not change: it
would be sharpness, and draw every sharp photograph to them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def refine(
    prototypes: Tensor,
    tokens: Tensor,
    concepts: Tensor,
    *,
    scale: float,
    seed: int,
    steps: int = 300,
    batch: int = 512,
    lr: float = 2e-3,
) -> Tensor:
    """Prototypes that tell sharp images of a few classes apart better; all others stay as they are.

    Args:
        prototypes: (CONCEPTS, dim), unit vectors.
        tokens: (n, dim), unit vectors of sharp images.
        concepts: (n,) what each is labelled with.
        scale: multiplies cosines.
        seed: of the batches.
        steps, batch, lr: of Adam, whose rate falls linearly to zero.

    Returns:
        (CONCEPTS, dim), unit vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    classes, own = torch.unique(concepts, return_inverse=True)
    directions = prototypes[classes].clone().requires_grad_()
    optimiser = torch.optim.Adam([directions], lr=lr)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = lr * (1 - step / steps)
        rows = torch.randint(len(tokens), (batch,), generator=generator)
        loss = F.cross_entropy(scale * tokens[rows] @ F.normalize(directions, dim=-1).T, own[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    change = F.normalize(directions.detach(), dim=-1) - prototypes[classes]
    refined = prototypes.clone()
    refined[classes] = F.normalize(prototypes[classes] + change - change.mean(0), dim=-1)
    return refined
