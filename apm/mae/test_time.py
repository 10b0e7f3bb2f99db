"""TTT-MAE (Gandelsman et al. 2022): the encoder tuned to reconstruct the one image, then asked for its class.

For each image by itself all weights begin as they were trained. At each step the image is masked in M ways, or M random
crops of it in one way each, and SGD with momentum follows the mean reconstruction error of the masked patches. Encoder
and mask token are tuned; decoder, head and positions are not. The model is never changed: tuned weights stand in for
its own, and are dropped.

Several students may be adapted side by side, in groups of a fixed size: a last group that is not full is filled with
copies, so that an image's answer depends neither on its neighbours nor on their number. It may depend on its place in
the group by rounding, where the machine's batched products do; one at a time, the default, it has the very same bits.
"""

# ruff: noqa: RUF009  (`setting` makes fields)
from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from apm.errors import UsageError
from apm.images.crops import crop_box
from apm.images.load import IMAGENET_MEAN, IMAGENET_STD, normalised
from apm.mae.config import kept_places
from apm.mae.model import MaskedAutoencoder
from apm.settings import at_least, check_values, not_negative, positive, setting, share_of

Weights = dict[str, Tensor]
Crops = Literal["copies", "random"]
CROP_AREA = 0.2
"""Smallest share of the image's area in a random crop."""


@dataclass(frozen=True, kw_only=True)
class TestTimeSettings:
    """The published settings.

    Raises:
        UsageError: a value that cannot work.
    """

    __test__ = False  # not a test, though its name begins like one

    steps: int = setting(20, "Steps of SGD.", check=at_least(0))
    masks: int = setting(128, "Ways in which the image is masked at each step.", check=at_least(1))
    crops: Crops = setting(
        "copies", "What is masked: copies of what is looked at, or random crops of the image.", choices=get_args(Crops)
    )
    masked: float = setting(0.75, "Share of the patches that are masked.", check=share_of("the patches"))
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
        step_losses: (B, K + 1) before each step and after the last, of other masks each; None where not asked for.
    """

    logits: Tensor
    step_logits: Tensor | None
    first_losses: Tensor
    last_losses: Tensor
    step_losses: Tensor | None


def tuned_names(model: MaskedAutoencoder) -> list[str]:
    """The weights that are tuned: the encoder's, but for the fixed positions, and the mask token."""
    names = (name for name, _ in model.named_parameters() if name.startswith("encoder.") or name == "mask_token")
    return [name for name in names if name != "encoder.pos_embed"]


def mask_orders(pixels: Tensor, places: int, masks: int, step: int, *, seed: int = 0) -> Tensor:
    """Orders (M, N) of one image's patches at one step, drawn from the pixels (3, S, S), seed and step alone."""
    key = hashlib.sha256(np.ascontiguousarray(pixels.cpu().numpy()).tobytes()).digest()
    generator = np.random.default_rng([seed, step, int.from_bytes(key[:16], "little")])
    return torch.from_numpy(generator.random((masks, places)).argsort(1))


def random_crops(image: Image.Image, size: int, count: int, step: int, *, seed: int = 0) -> Tensor:
    """Random crops of a whole image (`count`, 3, size, size), drawn from its pixels, seed and step alone.

    As torchvision's RandomResizedCrop: a share of the area from `CROP_AREA` to 1, 3:4 to 4:3, bicubic; not mirrored.

    Args:
        image: RGB, of any shape.
        size: side of the crops in pixels.
        count: how many.
        step: of the adaptation.
        seed: of the run.
    """
    key = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest()
    generator = np.random.default_rng([seed, step, 1, int.from_bytes(key[:16], "little")])
    boxes = [crop_box(*image.size, generator, CROP_AREA) for _ in range(count)]
    cut = (image.crop(box).resize((size, size), Image.Resampling.BICUBIC) for box in boxes)
    return torch.stack([normalised(one, IMAGENET_MEAN, IMAGENET_STD) for one in cut])


class TestTimeAdapter:
    """Adapts a masked autoencoder with a head to images, each by itself.

    Args:
        model: frozen; it is not changed.
        settings: how.
        seed: of the masks.
    """

    __test__ = False  # not a test, though its name begins like one

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

    def adapt(
        self, pixels: Tensor, images: Sequence[Image.Image] | None = None, *, record_steps: bool = False
    ) -> Adapted:
        """Adapt to B images.

        Args:
            pixels: what is looked at of them, (B, 3, S, S) float32, normalised as `apm.images.load.student_input` does.
            images: the whole images, RGB, which random crops are of; needed for these alone.
            record_steps: also answer before each step, and tell each step's error.
        """
        size = self.settings.students
        if self.settings.crops == "random" and images is None:
            raise UsageError("Random crops are cut from the whole images: give these in addition to the pixels.")
        found = []
        for start in range(0, len(pixels), size):
            group = pixels[start : start + size]
            count, missing = len(group), size - len(group)
            filled = torch.cat([group, group[-1:].expand(missing, -1, -1, -1)])
            wholes = list(images[start : start + size]) if images is not None else []
            found.append([one[:count] for one in self._group(filled, wholes + wholes[-1:] * missing, record_steps)])
        answers, losses = (torch.cat(each) for each in zip(*found, strict=True))
        steps = self.settings.steps
        unknown = torch.full((len(pixels),), torch.nan)
        first, last = (losses[:, 0], losses[:, steps - 1]) if steps else (unknown, unknown)
        if not record_steps:
            return Adapted(answers[:, -1], None, first, last, None)
        return Adapted(answers[:, -1], answers, first, last, losses)

    @torch.no_grad()
    def _group(self, pixels: Tensor, images: Sequence[Image.Image], every: bool) -> tuple[Tensor, Tensor]:
        """One full group (G, 3, S, S): answers (G, 1 or K + 1, C), and losses at each step (G, K or K + 1)."""
        settings, place = self.settings, next(iter(self._own.values())).device
        pixels, alone = pixels.to(place), settings.students == 1
        tuned = self._own if alone else {n: w.expand(len(pixels), *w.shape).clone() for n, w in self._own.items()}
        speed: Weights = {}
        losses: list[Tensor] = []
        answers = [self._ask(tuned, pixels)] if every else []
        for step in range(settings.steps):
            slopes, loss = self._slope(tuned, *self._masked(pixels, images, step))
            losses.append(loss)
            speed = {n: s if step == 0 else settings.momentum * speed[n] + s for n, s in slopes.items()}
            tuned = {n: w - settings.lr * speed[n] for n, w in tuned.items()}
            if every:
                answers.append(self._ask(tuned, pixels))
        if every:
            losses.append(self._slope(tuned, *self._masked(pixels, images, settings.steps))[1])
        else:
            answers = [self._ask(tuned, pixels)]
        return torch.stack(answers, dim=1), torch.stack(losses, dim=1).cpu() if losses else torch.empty(len(pixels), 0)

    def _masked(self, pixels: Tensor, images: Sequence[Image.Image], step: int) -> tuple[Tensor, Tensor]:
        """What is masked at a step, (G, 1 or M, 3, S, S), and the orders of its patches (G, M, N)."""
        settings, sizes = self.settings, self.model.config
        drawn = [mask_orders(one, sizes.places, settings.masks, step, seed=self.seed) for one in pixels]
        if settings.crops == "copies":
            looks = pixels[:, None]
        else:
            cut = [random_crops(one, sizes.image_size, settings.masks, step, seed=self.seed) for one in images]
            looks = torch.stack(cut).to(pixels.device)
        return looks, torch.stack(drawn).to(pixels.device)

    def _slope(self, tuned: Weights, looks: Tensor, orders: Tensor) -> tuple[Weights, Tensor]:
        """Gradient of each student's loss over its masks, and the losses (G,); see `_masked`."""
        total: Weights = {}
        losses = torch.zeros(len(looks), device=looks.device)
        size = self.settings.chunk
        for start in range(0, orders.shape[1], size):
            part = orders[:, start : start + size]
            seen = looks if looks.shape[1] == 1 else looks[:, start : start + size]
            if self.settings.students == 1:
                slopes, loss = self._slopes(tuned, seen[0], part[0])
            else:
                slopes, loss = self._slopes(tuned, seen, part)
            share = part.shape[1] / orders.shape[1]
            total = {n: s * share + total[n] if total else s * share for n, s in slopes.items()}
            losses += loss * share
        return total, losses

    def _ask(self, tuned: Weights, pixels: Tensor) -> Tensor:
        """Logits (G, C) of the whole images."""
        return self._answer(tuned, pixels[0])[None] if self.settings.students == 1 else self._answer(tuned, pixels)

    def _loss(self, tuned: Weights, looks: Tensor, orders: Tensor) -> Tensor:
        errors: Tensor = functional_call(self.model, tuned, (looks, orders, self._kept))
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
