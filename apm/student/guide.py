"""The colours at a location as a part of its query: an extension of the paper's `[T ; p(y, x)]`, off by default.

All queries of an image hold the same column, so a field can bend only where the position code does. With a short
Fourier code of the image's own colours (as FeatUp's implicit form has, Fu et al. 2024) it can change where the image
does.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from apm.images.load import IMAGENET_MEAN, IMAGENET_STD

FREQUENCIES = 4
"""Sines and cosines of π, 2π, 4π, 8π times each channel in [0, 1]: the last tell apart colours an eighth apart."""
WIDTH = 3 * 2 * FREQUENCIES
DETAIL = 4
"""Samples per side of a cell of the student's grid at which colours are kept."""


def guide_of(images: Tensor, grid: int) -> Tensor:
    """Shrink images to what the codes are read from.

    Args:
        images: (B, 3, S, S), ImageNet-normalised.
        grid: the student's cells a side.

    Returns:
        (B, 3, G, G) in [0, 1], G `DETAIL` places a cell, or S where the image has fewer pixels than that.
    """
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return F.adaptive_avg_pool2d(images * std + mean, min(DETAIL * grid, images.shape[-1]))


def colour_code(guide: Tensor, rows: Tensor, cols: Tensor, grid: int) -> Tensor:
    """Code the colours at locations: bilinear between the guide's samples, constant past its edge.

    Args:
        guide: (B, 3, G, G) of `guide_of`.
        rows: (Q,) in cells of the student's grid, as for `apm.student.position.position_code`.
        cols: (Q,) likewise.
        grid: the student's cells a side.

    Returns:
        (B, Q, WIDTH) in the guide's type.
    """
    places = torch.stack((cols, rows), dim=1).to(guide)  # x before y, as grid_sample has them
    places = ((places + 0.5) * (2 / grid) - 1)[None, None].expand(len(guide), -1, -1, -1)  # (B, 1, Q, 2) in [-1, 1]
    found = F.grid_sample(guide, places, mode="bilinear", padding_mode="border", align_corners=False)
    colours = found[:, :, 0].mT  # (B, Q, 3)
    angles = colours[..., None] * (math.pi * 2.0 ** torch.arange(FREQUENCIES, device=guide.device)).to(guide)
    return torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(2)
