"""DOTA, distributional test-time adaptation (Han et al., 2024): a Gaussian per class, estimated from the stream.

Every image enters every class's mean and covariance, weighted by the class's probability. The classes' mean covariance
makes a linear discriminant, whose say grows with the number of images seen. An answer depends on the images before: the
run seeds and records their order; the answer to an image uses the state before it.

An older release of the method learns from the TRUE label of the least confident images: nothing of the kind is here.
The authors' settings are not known: the defaults are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from apm.errors import UsageError
from apm.test_time.views import MIN_AREA

from .base import Batch, Json, MethodOptions, Prediction, check_share, display_name, make_settings, settings_record
from .features import answer_each, most_confident
from .published import Published

# Images after which the covariances' sum is made anew, so that the rounding of single changes does not add up
RENEWAL = 1000


@dataclass(frozen=True, kw_only=True)
class DOTASettings:
    """Ours, the same for all data sets."""

    views: int = 64
    min_area: float = MIN_AREA
    keep: float = 0.1
    """Share of the views, those of lowest entropy, that are learned from and answered."""
    epsilon: float = 1e-3
    """Share of the identity in the covariance that is inverted."""
    sigma: float = 1e-3
    """Every class's variance before any image."""
    rho: float = 0.02
    """Weight of the discriminant per image seen, …"""
    eta: float = 0.2
    """… and its limit."""
    initial_mean: float | None = 1e-3
    """Every entry of every class's mean before any image; none: the text features, as an older release has it."""
    min_mass: float = 1e-4
    """A class's covariance is left as it is by an image that belongs to it, all views together, by less than this: an
    image then costs what its few likely classes cost. 0: every image enters every class's, as published."""
    memory: float = 4.0
    """Limit on the classes' covariances in GiB: C·D² numbers, 1.0 GiB for 1,000 classes and features of 512."""

    def __post_init__(self) -> None:
        check_share("keep", self.keep)
        check_share("epsilon", self.epsilon)
        if not self.sigma > 0:
            raise UsageError(f"DOTA's sigma, the initial variance, must be above 0, not {self.sigma}.")


class ClassGaussians:
    """The state of a stream. Memory: C·D² numbers.

    Args:
        text: (C, D) of unit length.
        settings: of the method.

    Raises:
        UsageError: that is more than the settings allow.
    """

    def __init__(self, text: Tensor, settings: DOTASettings) -> None:
        classes, dim = text.shape
        needed = classes * dim**2 * 4 / 2**30
        if needed > settings.memory:
            raise UsageError(
                f"DOTA needs {needed:.1f} GiB for the covariances of {classes} classes, but its limit is "
                f"{settings.memory:g}: raise it with dota:memory=…, or leave DOTA out."
            )
        self.settings = settings
        start = settings.initial_mean
        self.means = text.clone() if start is None else torch.full_like(text, start)
        self._whitened = text.new_empty(classes + 1, dim)
        self.counts = text.new_ones(classes)
        start_covariance = settings.sigma * torch.eye(dim, device=text.device)
        self.covariances = start_covariance.repeat(classes, 1, 1)
        self.covariance_sum = classes * start_covariance  # kept up to date in place of being made anew
        self._images = 0
        self._mixed = start_covariance.clone()  # the covariance whose inverse is Λ
        self._factor = start_covariance.sqrt().mT  # its Cholesky's L, column by column as the library writes it
        self._info = torch.zeros((), dtype=torch.int32, device=text.device)

    def discriminant(self, feature: Tensor) -> Tensor:
        """The linear discriminant's logits (C,) of a feature (D,): x·Λμ − μ·Λμ/2."""
        means, own = self._whitened[:-1], self._whitened[-1]
        means.copy_(self.means)
        own.copy_(feature)
        points = self._whitened.T  # (D, C + 1), solved in place: at this size new memory takes as long as half the work
        torch.linalg.solve_triangular(self._factor, points, upper=False, out=points)
        return means @ own - 0.5 * torch.linalg.vector_norm(means, dim=1).square()

    def weight(self, kept: int) -> float:
        """What the discriminant counts beside the teacher's logits for an image of `kept` views."""
        return min(self.settings.rho * float(self.counts.mean()) / kept, self.settings.eta)

    def fit(self, views: Tensor, probabilities: Tensor) -> None:
        """Learn from views (K, D) with their probabilities (K, C)."""
        mass = probabilities.sum(dim=0)  # (C,)
        total = self.counts + mass
        kept = self.counts / total
        owners = (mass >= self.settings.min_mass).nonzero().flatten()
        deviations = views - self.means[owners].unsqueeze(1)  # (M, K, D) from the old means
        weighted = deviations * (probabilities.T[owners] / total[owners].unsqueeze(1)).unsqueeze(2)
        self.covariance_sum.addmm_(weighted.flatten(0, 1).T, deviations.flatten(0, 1))
        shares = kept[owners].tolist()
        for owner, share, left, right in zip(owners.tolist(), shares, weighted.mT, deviations, strict=True):
            self.covariance_sum.add_(self.covariances[owner], alpha=share - 1)
            self.covariances[owner].addmm_(left, right, beta=share)
        self._images += 1
        if self._images % RENEWAL == 0:
            torch.sum(self.covariances, dim=0, out=self.covariance_sum)
        self.means.mul_(kept.unsqueeze(1)).addmm_((probabilities / total).T, views)
        self.counts = total
        epsilon = self.settings.epsilon
        torch.mul(self.covariance_sum, (1 - epsilon) / len(total), out=self._mixed).diagonal().add_(epsilon)
        torch.linalg.cholesky_ex(self._mixed, check_errors=True, out=(self._factor, self._info))


PUBLISHED = Published(source="DOTA: the authors' settings by data set are not known; ours, as common")


class DOTA:
    """A stream method: the classes' distributions are estimated until `reset`."""

    published = PUBLISHED
    stream = True
    gradients = False

    def __init__(self, options: MethodOptions) -> None:
        self.name = display_name("dota", options)
        self._chosen = make_settings(DOTASettings, "dota", options, views=options.views)
        self.settings: Mapping[str, Json] = settings_record(self._chosen)
        self.reset()

    def reset(self) -> None:
        """Forget every image."""
        self.state: ClassGaussians | None = None

    def predict(self, batch: Batch) -> Prediction:
        """Classify the images in their order, each before it is learned from."""
        text, scale, chosen = batch.head.features, batch.head.logit_scale, self._chosen
        state = self.state = self.state or ClassGaussians(text, chosen)

        def step(views: Tensor) -> Tensor:
            logits = scale * views @ text.T  # (V, C)
            kept = most_confident(logits, chosen.keep)
            feature = views[kept].mean(dim=0)
            answer = logits[kept].mean(dim=0) + state.weight(len(kept)) * state.discriminant(feature)
            state.fit(views[kept], logits[kept].softmax(dim=1))
            return answer

        views = batch.views(chosen.views, min_area=chosen.min_area)
        return Prediction(logits=answer_each(views, len(text), step))
