"""AugMix (Hendrycks et al., ICLR 2020) at its lowest severity, as some test-time methods augment their views.

Three chains of one to three simple operations are applied to a crop, mixed with random weights, and the mixture is
mixed with the crop itself. Everything is drawn from the view's own generator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from apm.images.load import normalised

CHAINS, LONGEST = 3, 3
_LEAST, _MOST = 0.01, 0.1
"""Range of an operation's strength, as a share of what it can do: severity 1 of 10."""

Operation = Callable[[Image.Image, float], Image.Image]
"""From an image and a strength in [-1, 1] to an image of the same size."""


def _turned(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


OPERATIONS: tuple[Operation, ...] = (
    lambda image, strength: ImageOps.autocontrast(image),
    lambda image, strength: ImageOps.equalize(image),
    lambda image, strength: ImageOps.posterize(image, 4 - int(4 * abs(strength))),
    lambda image, strength: ImageOps.solarize(image, 256 - int(256 * abs(strength))),
    lambda image, strength: image.rotate(30 * strength, Image.Resampling.BILINEAR),
    lambda image, strength: _turned(image, (1, 0.3 * strength, 0, 0, 1, 0)),
    lambda image, strength: _turned(image, (1, 0, 0, 0.3 * strength, 1, 0)),
    lambda image, strength: _turned(image, (1, 0, image.width / 3 * strength, 0, 1, 0)),
    lambda image, strength: _turned(image, (1, 0, 0, 0, 1, image.height / 3 * strength)),
)
"""Contrast stretched, histogram flattened, fewer bits, bright parts inverted, rotation, shears and shifts."""


def mixed(image: Image.Image, generator: np.random.Generator, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Augment a crop.

    Args:
        image: RGB, at its final size.
        generator: of this view.
        mean, std: three channel means and deviations, for pixels in [0, 1].

    Returns:
        (3, height, width) float32, normalised.
    """
    shares = generator.dirichlet([1.0] * CHAINS)
    total = normalised(image, mean, std) * float(own := generator.beta(1.0, 1.0))
    for share in shares:
        changed = image
        for _ in range(int(generator.integers(1, LONGEST + 1))):
            operation = OPERATIONS[int(generator.integers(len(OPERATIONS)))]
            strength = generator.uniform(_LEAST, _MOST) * (1 if generator.random() < 0.5 else -1)
            changed = operation(changed, float(strength))
        total = total + float((1 - own) * share) * normalised(changed, mean, std)
    return total
