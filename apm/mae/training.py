"""How a masked autoencoder learns from images alone, and what is trained on labels with it.

Reconstruction (He et al. 2022): most patches of a random crop are masked, and their pixels are said from the others.
Labels (Gandelsman et al. 2022): a head on the frozen encoder (*probe*), head and encoder together (*finetune*), or
head, encoder and decoder on both losses at once (*joint*). Nothing is masked where a class is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from apm.errors import UsageError
from apm.mae.augment import crop, crop_maps
from apm.mae.config import HeadTraining, Kind, MAEConfig, MAETraining, kept_places
from apm.mae.model import MaskedAutoencoder
from apm.mae.published import NETWORK, Start
from apm.pretrain.checkpoint import read_network
from apm.pretrain.loop import Trainer, parts

TRAINED: Mapping[str, tuple[str, ...]] = {
    "probe": ("head.",),
    "finetune": ("head.", "encoder."),
    "joint": ("head.", "encoder.", "decoder.", "mask_token"),
}
"""By kind of training, prefixes of the names of the weights that it changes. Positions are never trained."""


class _Masked(Trainer):
    """What both trainings share: where they begin, the crops, the parts of processes."""

    network = NETWORK
    betas = (0.9, 0.95)
    model: MaskedAutoencoder

    def __init__(
        self,
        path: str | os.PathLike[str],
        *arguments: Any,
        start: Start | None = None,
        data: Mapping[str, Any],
        **options: Any,
    ) -> None:
        """As `Trainer`; `start` has the weights to begin with, None: they are drawn."""
        self.start = start
        super().__init__(path, *arguments, data={**data, "start": start and start.digest}, **options)
        self.model.fuse(self.device.type == "cuda")

    def begin(self) -> None:
        """Put in what is known; the rest stays as drawn."""
        if self.start is not None:
            self.model.load_state_dict(self.start.weights, strict=False)

    def drawn(self, part: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Crops (b, 3, S, S) and orders of patches (b, N) for this process's part of the batch of this step."""
        sizes, config = self.model.config, self.config
        count = len(config.batch(self.train, self.step))
        maps = crop_maps(count, sizes.image_size, min_area=config.min_area, draw=(config.seed, 7, self.step))
        orders = config.orders(count, sizes.places, draw=(0, self.step))[self.mine]
        images = crop(self.cache.inputs(part).to(self.device), maps[self.mine])
        return images, torch.from_numpy(orders).to(self.device)

    def fixed(self, number: int, part: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Held-out images (b, 3, S, S) whole, and orders of their patches (b, N), always the same."""
        orders = self.config.orders(len(part), self.model.config.places, draw=(1, number))
        return self.cache.inputs(part).to(self.device), torch.from_numpy(orders).to(self.device)

    def low(self) -> Any:
        """The context of the large matrix products of a training step."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


class MAETrainer(_Masked):
    """A masked autoencoder, trained on the images in a cache."""

    config: MAETraining

    def gradients(self) -> dict[str, float]:
        """Set those of the batch; see `Trainer`."""

        def errors(part: NDArray[np.int64]) -> dict[str, Tensor]:
            with self.low():
                return {"reconstruction": self.model(*self.drawn(part), self._kept)}

        return self.share({"reconstruction": 1.0}, errors)

    @torch.no_grad()
    def held_out_losses(self) -> dict[str, float]:
        """Mean squared error of masked patches over the held-out images, whole, in float32."""
        errors = []
        for number, part in enumerate(parts(self.held_out, self.config.batch_size)):
            images, orders = self.fixed(number, part)
            errors.append(self.model(images, orders, self._kept))
        return {"reconstruction": torch.cat(errors).mean().item()}

    @property
    def _kept(self) -> int:
        return kept_places(self.model.config.places, self.config.masked)


class HeadTrainer(_Masked):
    """A head, and what is trained with it, on the labelled images in a cache."""

    config: HeadTraining

    def __init__(self, *arguments: Any, labels: NDArray[np.int64], class_names: Sequence[str], **options: Any) -> None:
        """As `Trainer`.

        Args:
            arguments: see `Trainer`.
            labels: (n,) the class of each image of the cache.
            class_names: C of them; the checkpoint keeps them.
            options: see `Trainer`, and ``start``.
        """
        self.labels = torch.from_numpy(labels)
        start, kind = options.get("start"), arguments[3].kind
        known = kind == "joint" or (start is not None and start.has_decoder)
        data = {
            **options.pop("data"),
            "decoder": "trained" if known else "drawn",
            "class_names": json.dumps(list(class_names), ensure_ascii=False),
        }
        super().__init__(*arguments, data=data, **options)
        for name, parameter in self.model.named_parameters():
            trained = name.startswith(TRAINED[self.config.kind]) and name != "encoder.pos_embed"
            parameter.requires_grad_(trained)

    def check(self, sizes: MAEConfig) -> None:
        """Refuse what cannot be trained."""
        if self.start is None and self.config.kind != "joint":
            raise UsageError(f"{self.config.kind} needs a masked autoencoder to start from; `apm mae train` makes one.")

    def losses(self, images: Tensor, labels: Tensor, orders: Tensor) -> dict[str, Tensor]:
        """Losses (B,) of images (B, 3, S, S): ``cross_entropy``, ``accuracy`` (0 or 1), if joint ``reconstruction``."""
        with torch.no_grad() if self.config.kind == "probe" else nullcontext():
            codes = self.model.encode(self.model.tokens(images))  # (B, 1 + N, W)
        assert self.model.head is not None
        logits = self.model.head(codes).float()  # (B, C)
        cross = F.cross_entropy(logits, labels, label_smoothing=self.config.smoothing, reduction="none")
        found = {"cross_entropy": cross, "accuracy": (logits.argmax(1) == labels).float()}
        if self.config.kind == "joint":
            kept = kept_places(self.model.config.places, self.config.masked)
            found["reconstruction"] = self.model(images, orders, kept)
        return found

    def gradients(self) -> dict[str, float]:
        """Set those of the batch; see `Trainer`."""
        weights = {"cross_entropy": 1.0, "accuracy": 0.0}
        if self.config.kind == "joint":
            weights["reconstruction"] = self.config.mask_weight

        def errors(part: NDArray[np.int64]) -> dict[str, Tensor]:
            images, orders = self.drawn(part)
            with self.low():
                return self.losses(images, self.labels[part].to(self.device), orders)

        return self.share(weights, errors)

    @torch.no_grad()
    def held_out_losses(self) -> dict[str, float]:
        """The same of the held-out images, whole, in float32; the accuracy is a share."""
        found = []
        for number, part in enumerate(parts(self.held_out, self.config.batch_size)):
            images, orders = self.fixed(number, part)
            found.append(self.losses(images, self.labels[part].to(self.device), orders))
        return {name: torch.cat([one[name] for one in found]).mean().item() for name in found[0]}


@dataclass(frozen=True)
class Trained:
    """A masked autoencoder as `apm mae` made it, frozen.

    Attributes:
        model: on its device.
        kind: ``probe``, ``finetune`` or ``joint``; None where it has no head.
        class_names: of the head.
        settings: it was trained with.
        step: steps made.
        digest: 16 hex digits of a sha256 over the weights.
    """

    model: MaskedAutoencoder
    kind: Kind | None
    class_names: tuple[str, ...]
    settings: dict[str, Any]
    step: int
    digest: str


def load_mae(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Trained:
    """Read a checkpoint of ``apm mae``.

    Raises:
        UsageError: no such file, another kind of checkpoint, or a damaged one.
    """
    checkpoint = read_network(path, NETWORK)
    model = MaskedAutoencoder(checkpoint.student, seed=None)
    model.load_state_dict(checkpoint.weights)
    settings = checkpoint.settings
    names: tuple[str, ...] = ()
    if checkpoint.student.classes:
        try:
            names = tuple(map(str, json.loads(settings["class_names"])))
        except (KeyError, TypeError, ValueError):
            names = ()
        if len(names) != checkpoint.student.classes or settings.get("kind") not in TRAINED:
            raise UsageError(
                f"{path} is damaged: it does not say the {checkpoint.student.classes} classes of its head."
            )
    digest = hashlib.sha256(b"".join(checkpoint.weights[n].numpy().tobytes() for n in sorted(checkpoint.weights)))
    return Trained(
        model.to(device).eval().requires_grad_(False),
        settings["kind"] if checkpoint.student.classes else None,
        names,
        settings,
        checkpoint.step,
        digest.hexdigest()[:16],
    )
