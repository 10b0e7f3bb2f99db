"""OGA, online Gaussian adaptation (Fuchs et al., 2025): Gaussians with one covariance, estimated from a cache.

The cache holds the surest images of each predicted class. Their class means and common covariance give each class a
likelihood, which multiplies the teacher's probabilities. An answer depends on the images before: the run seeds and
records their order.

As published, a class's mean divides the sum of its entries by the number that it could hold and not by the number that
it holds, so that it is too short until the cache is full. The published code takes 32 images at a time and enters them
all before it answers the first; here they are taken one by one, so that an answer does not depend on how a run happens
to cut the stream.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from apm.errors import UsageError
from apm.test_time.targets import entropies

from .base import Batch, Json, MethodOptions, Prediction, display_name, make_settings, settings_record
from .features import answer_each
from .published import Published


@dataclass(frozen=True, kw_only=True)
class OGASettings:
    """The published settings."""

    shots: int = 8
    """Images kept per predicted class."""
    tau: float = 0.05
    """Weight of the log-likelihood beside the teacher's log-probability."""

    def __post_init__(self) -> None:
        if self.shots < 1:
            raise UsageError(f"OGA's shots must be 1 or more, not {self.shots}.")


class CachedGaussians:
    """The state of a stream. Memory: up to C·8·D numbers at the default setting, and a few times D².

    The scatter of the entries around their class means is kept up to date, class by class, in place of being summed
    over all entries for each image.

    Args:
        text: (C, D) of unit length.
        shots: entries kept per class.
    """

    def __init__(self, text: Tensor, shots: int) -> None:
        classes, dim = text.shape
        self.shots = shots
        self.means, self.precision = text.clone(), dim * torch.eye(dim, device=text.device)
        self.counts = torch.zeros(classes, dtype=torch.long)
        self._entropies = torch.full((classes, shots), math.log(classes))
        self._kept = text.new_zeros(classes, shots, dim)
        self._filled = torch.zeros(classes, shots, dtype=torch.bool)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64, device=text.device)  # XᵀX of the centred entries X
        self._sum = torch.zeros(dim, dtype=torch.float64, device=text.device)  # of X
        self._projected: tuple[Tensor, Tensor] | None = None

    def update(self, features: Tensor, probabilities: Tensor) -> None:
        """Enter images, (B, D) and (B, C), and estimate anew if any was taken in."""
        changed = set()
        for feature, entropy, predicted in zip(
            features, entropies(probabilities).tolist(), probabilities.argmax(dim=1).tolist(), strict=True
        ):
            slot = int(self._entropies[predicted].argmax())  # the first of equals
            if entropy < self._entropies[predicted, slot]:
                if predicted not in changed:
                    self._count_in(predicted, -1)
                    changed.add(predicted)
                self._entropies[predicted, slot] = entropy
                self._kept[predicted, slot] = feature
                self._filled[predicted, slot] = True
        for owner in changed:
            self.counts[owner] = self._filled[owner].sum()
            if self.counts[owner] >= 2:
                self.means[owner] = self._kept[owner].sum(dim=0) / self.shots
            self._count_in(owner, 1)
        if changed:
            self._projected = None
            if self.counts.max() > 2:
                self.precision = self._estimate_precision()

    def log_likelihood(self, features: Tensor) -> Tensor:
        """Of images (B, D) under each class, up to a constant: (B, C)."""
        if self._projected is None:
            projected = self.means @ self.precision  # (C, D)
            self._projected = projected, (projected * self.means).sum(dim=1)
        projected, squares = self._projected
        own = ((features @ self.precision) * features).sum(dim=1, keepdim=True)  # (B, 1)
        return features @ projected.T - 0.5 * (squares + own)

    def _count_in(self, owner: int, sign: int) -> None:
        """Add the centred entries of a class to the scatter, or take them out of it."""
        centred = (self._kept[owner][self._filled[owner]] - self.means[owner]).double()
        self._scatter.addmm_(centred.T, centred, alpha=sign)
        self._sum.add_(centred.sum(dim=0), alpha=sign)

    def _estimate_precision(self) -> Tensor:
        """The inverse of the entries' covariance around their class means, shrunk while there are few: (D, D)."""
        n, dim = int(self.counts.sum()), len(self._sum)
        scatter = (self._scatter - self._sum.outer(self._sum / n)).float()  # (n − 1)·M
        if n > 4 * dim:
            return pseudo_inverse(scatter / (n - 1))
        shrunk = scatter + scatter.trace() / (n - 1) * torch.eye(dim, device=scatter.device)
        return dim * pseudo_inverse(shrunk)


def pseudo_inverse(matrix: Tensor) -> Tensor:
    """`torch.linalg.pinv` of a symmetric matrix (D, D) with no negative eigenvalue, without its eigenvalues if it may.

    The pseudo-inverse is the inverse where no eigenvalue is below D·ε times the largest. The Frobenius norms of matrix
    and inverse are bounds on the largest eigenvalue and on one over the smallest.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not failed:
        inverse = torch.cholesky_inverse(factor)
        if matrix.norm() * inverse.norm() * len(matrix) * torch.finfo(matrix.dtype).eps < 1:
            return inverse
    return torch.linalg.pinv(matrix, hermitian=True)


PUBLISHED = Published(source="OGA: one setting; images one by one, where the authors take 32 at a time")


class OGA:
    """A stream method: the cache grows with every image until `reset`."""

    published = PUBLISHED
    stream = True
    gradients = False

    def __init__(self, options: MethodOptions) -> None:
        self.name = display_name("oga", options)
        self._chosen = make_settings(OGASettings, "oga", options)
        self.settings: Mapping[str, Json] = settings_record(self._chosen)
        self.reset()

    def reset(self) -> None:
        """Forget every image."""
        self._state: CachedGaussians | None = None

    def predict(self, batch: Batch) -> Prediction:
        """Classify the images in their order, each after it has been entered into the cache."""
        text, scale, chosen = batch.head.features, batch.head.logit_scale, self._chosen
        state = self._state = self._state or CachedGaussians(text, chosen.shots)

        def step(views: Tensor) -> Tensor:
            logits = scale * views @ text.T  # (1, C)
            state.update(views, logits.softmax(dim=1))
            return (logits.log_softmax(dim=1) + chosen.tau * state.log_likelihood(views))[0]

        return Prediction(logits=answer_each(batch.tokens().unsqueeze(1), len(text), step))
