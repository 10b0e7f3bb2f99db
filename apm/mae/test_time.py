"""TTT-MAE (Gandelsman et al. 2022): the encoder tuned to reconstruct the one image, then asked for its class.

For each image by itself all weights begin as they were trained. At each step the image is masked in M ways, and SGD
with momentum follows the mean reconstruction error of the masked patches. Encoder and mask token are tuned; decoder,
head and positions are not. The model is never changed: tuned weights stand in for its own, and are dropped.

Several students may be adapted side by side, in groups of a fixed size: a last group that is not full is filled with
copies, so that an image's answer depends neither on its neighbours nor on their number. It may depend on its place in
the group by rounding, where the machine's batched products do; one at a time, the default, it has the very same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from apm.errors import UsageError
from apm.mae.config import kept_places
from apm.mae.model import MaskedAutoencoder
from apm.settings import at_least, check_values, not_negative, positive, setting, share_of

Weights = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class TestTimeSettings:
    """The published settings.

    Raises:
        UsageError: a value that cannot work.
    """

    __test__ = False  # of no interest to pytest

    steps: int = setting(20, "Steps of SGD.", check=at_least(0))
    masks: int = setting(128, "Ways in which the image is masked at each step.", check=at_least(1))
    masked: float = setting(0.75, "Share of the patches that is masked.", check=share_of("the patches"))
    lr: float = setting(5e-3, "Learning rate of SGD.", check=positive)
    momentum: float = setting(0.9, "Momentum of SGD.", check=not_negative)
    students: int = setting(1, "Images adapted side by side.", check=at_least(1))
    chunk: int = setting(128, "Masks of an image computed at a time: fewer take less memory.", check=at_least(1))

    def __post_init__(self) -> None:
        """Check each value."""
        check_values(self)


@dataclass(frozen=True)
class Adapted:
    """What came of B images.

    Attributes:
        logits: (B, C) after the last step.
        step_logits: (B, K + 1, C) before each of K steps and after the last; None where not asked for.
        first_losses: (B,) reconstruction error before the first step; NaN without steps.
        last_losses: (B,) the same before the last step, of other masks.
    """

    logits: Tensor
    step_logits: Tensor | None
    first_losses: Tensor
    last_losses: Tensor


def tuned_names(model: MaskedAutoencoder) -> list[str]:
    """The weights that are tuned: the encoder's, but for the fixed positions, and the mask token."""
    names = (name for name, _ in model.named_parameters() if name.startswith("encoder.") or name == "mask_token")
    return [name for name in names if name != "encoder.pos_embed"]


def mask_orders(pixels: Tensor, places: int, masks: int, step: int, *, seed: int = 0) -> Tensor:
    """Orders (M, N) of one image's patches at one step, drawn from the pixels (3, S, S), seed and step alone."""
    key = hashlib.sha256(np.ascontiguousarray(pixels.cpu().numpy()).tobytes()).digest()
    generator = np.random.default_rng([seed, step, int.from_bytes(key[:16], "little")])
    return torch.from_numpy(generator.random((masks, places)).argsort(1))


class TestTimeAdapter:
    """Adapts a masked autoencoder with a head to images, each by itself.

    Args:
        model: frozen; it is not changed.
        settings: how.
        seed: of the masks.
    """

    __test__ = False  # of no interest to pytest

    def __init__(self, model: MaskedAutoencoder, settings: TestTimeSettings, *, seed: int = 0) -> None:
        if model.head is None:
            raise UsageError("TTT-MAE needs a masked autoencoder with a head: `apm mae probe` trains one.")
        self.model, self.settings, self.seed = model, settings, seed
        self._kept = kept_places(model.config.places, settings.masked)
        own = dict(model.named_parameters())
        self._own: Weights = {name: own[name].detach() for name in tuned_names(model)}
        many = settings.students > 1  # torch has no fused attention for several sets of weights at once
        model.fuse(model.mask_token.device.type == "cuda" and not many)
        self._slopes: Callable[..., tuple[Weights, Tensor]] = grad_and_value(self._loss)
        self._answer: Callable[..., Tensor] = self._logits
        if many:
            self._slopes, self._answer = vmap(self._slopes), vmap(self._answer)

    def adapt(self, pixels: Tensor, *, record_steps: bool = False) -> Adapted:
        """Adapt to B images.

        Args:
            pixels: (B, 3, S, S) float32, normalised as `apm.images.load.student_input` does.
            record_steps: also answer before each step.
        """
        size = self.settings.students
        found = []
        for group in pixels.split(size):
            count = len(group)
            filled = torch.cat([group, group[-1:].expand(size - count, -1, -1, -1)])
            found.append([one[:count] for one in self._group(filled, every=record_steps)])
        answers, first, last = (torch.cat(each) for each in zip(*found, strict=True))
        return Adapted(answers[:, -1], answers if record_steps else None, first, last)

    @torch.no_grad()
    def _group(self, pixels: Tensor, *, every: bool) -> tuple[Tensor, Tensor, Tensor]:
        """One full group (G, 3, S, S): answers (G, 1 or K + 1, C), losses at the first and at the last step (G,)."""
        settings, place = self.settings, next(iter(self._own.values())).device
        pixels, alone = pixels.to(place), settings.students == 1
        tuned = self._own if alone else {n: w.expand(len(pixels), *w.shape).clone() for n, w in self._own.items()}
        speed: Weights = {}
        losses: list[Tensor] = []
        answers = [self._ask(tuned, pixels)] if every else []
        for step in range(settings.steps):
            orders = torch.stack(
                [mask_orders(p, self.model.config.places, settings.masks, step, seed=self.seed) for p in pixels]
            ).to(place)
            slopes, loss = self._slope(tuned, pixels, orders)
            losses.append(loss)
            speed = {n: s if step == 0 else settings.momentum * speed[n] + s for n, s in slopes.items()}
            tuned = {n: w - settings.lr * speed[n] for n, w in tuned.items()}
            if every:
                answers.append(self._ask(tuned, pixels))
        if not every:
            answers = [self._ask(tuned, pixels)]
        unknown = torch.full((len(pixels),), torch.nan)
        first, last = (losses[0].cpu(), losses[-1].cpu()) if losses else (unknown, unknown)
        return torch.stack(answers, dim=1), first, last

    def _slope(self, tuned: Weights, pixels: Tensor, orders: Tensor) -> tuple[Weights, Tensor]:
        """Gradient of each student's loss, over its masks `orders` (G, M, N), and the losses (G,)."""
        total: Weights = {}
        losses = torch.zeros(len(pixels), device=pixels.device)
        for part in orders.split(self.settings.chunk, dim=1):
            if self.settings.students == 1:
                slopes, loss = self._slopes(tuned, pixels[0], part[0])
            else:
                slopes, loss = self._slopes(tuned, pixels, part)
            share = part.shape[1] / orders.shape[1]
            total = {n: s * share + total[n] if total else s * share for n, s in slopes.items()}
            losses += loss * share
        return total, losses

    def _ask(self, tuned: Weights, pixels: Tensor) -> Tensor:
        """Logits (G, C) of the whole images."""
        return self._answer(tuned, pixels[0])[None] if self.settings.students == 1 else self._answer(tuned, pixels)

    def _loss(self, tuned: Weights, pixels: Tensor, orders: Tensor) -> Tensor:
        errors: Tensor = functional_call(self.model, tuned, (pixels[None], orders, self._kept))
        return errors.mean()

    def _logits(self, tuned: Weights, pixels: Tensor) -> Tensor:
        answer: Tensor = functional_call(_Asked(self.model), {f"model.{n}": w for n, w in tuned.items()}, pixels[None])
        return answer[0]


class _Asked(torch.nn.Module):
    """A model whose forward pass is its answer, as `torch.func.functional_call` needs it."""

    def __init__(self, model: MaskedAutoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.logits(images)
