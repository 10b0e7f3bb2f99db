"""How GLOM learns from images alone (Hinton 2021, sections 2 and 8).

Denoising: some places of an image are hidden, and their pixels are read from one level's embeddings after half the
steps or more. Contrast: at every place and level, what the nets say bottom-up and top-down is to resemble the embedding
that all opinions together came to, more than it resembles those of other places and other images. Places that already
agree do not repel each other: they are on their way to be one island.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, einsum
from torch.nn import functional as F

from apm.errors import UsageError, unknown
from apm.glom.model import GLOM, GLOMConfig, Opinions
from apm.pretrain.cache import GridCache
from apm.pretrain.checkpoint import Checkpoint, Network, check_settings, read_network, write_checkpoint
from apm.pretrain.config import Schedule
from apm.pretrain.loop import Trainer
from apm.student.config import Precision
from apm.student.matmul import measured_precision


@dataclass(frozen=True, kw_only=True)
class GLOMTraining(Schedule):
    """How to train GLOM. Every value decides the weights.

    Raises:
        UsageError: a value that cannot work.
    """

    lr: float = 1e-3
    settling: int | None = None  # steps in which the columns settle; None: 2 L
    hidden: float = 0.5  # share of an image's places that is hidden
    read_level: int = 0  # whose embeddings the pixels are read from; 0 the lowest, -1 the highest
    contrast_weight: float = 0.1  # beside 1 for denoising
    contrast_columns: int = 256  # of a batch, drawn for each step
    temperature: float = 0.1  # of the contrast: cosines are divided by it
    agree: float = 0.7  # cosine, the level's mean taken out, from which on two places agree and do not repel

    def __post_init__(self) -> None:
        """Check each value."""
        super().__post_init__()
        self._check_numbers(positive=("temperature",), not_negative=("contrast_weight",))
        if self.settling is not None and self.settling < 1:
            raise UsageError(f"settling must be 1 or more, or None for twice the levels, not {self.settling}.")
        if not 0 < self.hidden < 1:
            raise UsageError(f"hidden is a share of the places, above 0 and below 1, not {self.hidden}.")
        if self.contrast_columns < 2:
            raise UsageError(f"contrast_columns must be 2 or more, not {self.contrast_columns}.")
        if not -1 <= self.agree <= 1:
            raise UsageError(f"agree is a cosine, from -1 to 1, not {self.agree}.")

    def check_level(self, model: GLOMConfig) -> None:
        """Refuse a level to read from that the network does not have, by a `UsageError`."""
        if not -model.levels <= self.read_level < model.levels:
            raise UsageError(f"read_level must be below {model.levels}, the number of levels, not {self.read_level}.")

    def settling_steps(self, step: int, model: GLOMConfig) -> int:
        """After how many steps of the columns one step of the optimiser looks: from half of them to all, drawn."""
        most = self.settling or model.steps
        return int(np.random.default_rng([self.seed, 4, step]).integers((most + 1) // 2, most + 1))

    def hidden_places(self, count: int, places: int, *, draw: tuple[int, ...]) -> NDArray[np.bool_]:
        """Which places are hidden, (count, places): the same number in each image, at least one, never all.

        Args:
            count: images.
            places: of each.
            draw: numbers that, with the seed, decide which; the same ones give the same.
        """
        ranks = np.random.default_rng([self.seed, 5, *draw]).random((count, places)).argsort(1).argsort(1)
        return ranks < min(max(1, round(self.hidden * places)), max(1, places - 1))


def shapes(config: GLOMConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by name, without making any."""
    with torch.device("meta"):
        model = GLOM(config, seed=None)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


NETWORK = Network("glom", "apm glom train", GLOMConfig, shapes)


def denoising_errors(model: GLOM, embeddings: Tensor, images: Tensor, hidden: Tensor) -> Tensor:
    """Mean squared error (B,) of the pixels that are read for the hidden places.

    Args:
        model: whose `pixels` reads them.
        embeddings: of one level (B, N, D).
        images: whole ones (B, 3, S, S), normalised.
        hidden: which places (B, N); at least one of each image.
    """
    errors = (model.pixels(embeddings) - model.patches(images)).square().mean(-1)  # (B, N)
    return (errors * hidden).sum(1) / hidden.sum(1)


def contrast(said: Tensor, settled: Tensor, *, temperature: float, agree: float) -> Tensor:
    """Cross-entropy of finding, for each of M columns, its own embedding among all M from what a net says there.

    Embeddings whose cosine, the mean of the M taken out, reaches `agree` are left out as false answers. The gradient
    goes into what is said alone, so that nets follow where the columns settled and not the reverse.

    Args:
        said: opinions of one net, (M, L, D).
        settled: embeddings that all opinions came to, (M, L, D).
        temperature: of the softmax over cosines.
        agree: in [-1, 1].

    Returns:
        The mean over columns and levels; 0 where all agree.
    """
    settled = settled.detach()
    directions = F.normalize(settled, dim=-1)
    cosines = einsum("mld,nld->lmn", F.normalize(said, dim=-1), directions)  # (L, M, M)
    centred = F.normalize(settled - settled.mean(0), dim=-1)
    alike = einsum("mld,nld->lmn", centred, centred) >= agree  # (L, M, M)
    own = torch.eye(len(said), dtype=torch.bool, device=said.device)  # (M, M)
    logits = (cosines / temperature).masked_fill(alike & ~own, -torch.inf)
    return -logits.log_softmax(-1).diagonal(dim1=1, dim2=2).mean()


class GLOMTrainer(Trainer):
    """GLOM, its optimiser, and the images in a cache; trains from wherever the checkpoint at `path` is.

    Attributes, beside those of `Trainer`:
        train, held_out: numbers of the images in the cache.
        precision: ``fp32`` or ``bf16``, what ``auto`` chose.
    """

    model: GLOM

    def __init__(
        self,
        path: str | os.PathLike[str],
        cache: GridCache,
        model: GLOMConfig,
        config: GLOMTraining,
        *,
        data: Mapping[str, Any],
        precision: Precision = "auto",
        device: str | torch.device = "cpu",
    ) -> None:
        """Draw the network, or take it up from the checkpoint.

        Args:
            path: checkpoint file; need not exist.
            cache: images of the side that `model` says.
            model: sizes.
            config: how to train.
            data: what identifies the images, plain JSON values; part of the settings.
            precision: of the matrix products; ``auto``: the checkpoint's, else what is faster here.
            device: where to train.

        Raises:
            UsageError: the checkpoint is damaged, or was made with other settings (each is named); the level to read
                from is none.
        """
        if precision not in get_args(Precision):
            raise unknown("precision", precision, get_args(Precision))
        config.check_level(model)
        self.device = torch.device(device)
        super().__init__(path, GLOM(model, seed=config.seed).to(self.device), config)
        self.cache, self.config = cache, config
        checkpoint = read_network(self.path, NETWORK) if self.path.exists() else None
        chosen: Any = precision
        if precision == "auto":  # as it was begun, if it was
            chosen = checkpoint.settings.get("precision") if checkpoint else measured_precision(self.device)
        self.precision = str(chosen)
        self.train, self.held_out = config.split(len(cache.names))
        self.settings = {**data, **asdict(config), "precision": self.precision, "images": len(cache.names)}
        if checkpoint is not None:
            check_settings(self.path, checkpoint, model, self.settings)
            self._restore(checkpoint)

    def losses(
        self, numbers: NDArray[np.int64], hidden: NDArray[np.bool_], columns: NDArray[np.int64], *, steps: int
    ) -> tuple[Tensor, Tensor]:
        """Denoising error of each image (B,), and the contrast of bottom-up and top-down together.

        Args:
            numbers: of the images in the cache, B of them.
            hidden: places (B, N) that the columns do not see.
            columns: numbers, among the B · N, of those that are contrasted.
            steps: after which both are taken.
        """
        images, mask = self.cache.inputs(numbers).to(self.device), torch.from_numpy(hidden).to(self.device)
        embeddings, opinions = settle(self.model, hide(self.model, images, mask), steps)
        errors = denoising_errors(self.model, embeddings[:, :, self.config.read_level], images, mask)
        drawn = torch.from_numpy(columns).to(self.device)
        settled, *said = (
            rearrange(one, "b n l d -> (b n) l d")[drawn] for one in (embeddings, opinions.bottom_up, opinions.top_down)
        )
        how = {"temperature": self.config.temperature, "agree": self.config.agree}
        terms = [contrast(said[0], settled, **how)]
        if self.model.top_down is not None and self.model.config.levels > 1:
            terms.append(contrast(said[1][:, :-1], settled[:, :-1], **how))  # nothing is above the highest level
        return errors, torch.stack(terms).mean()

    @torch.no_grad()
    def held_out_losses(self) -> tuple[float, float]:
        """Denoising error and contrast over the held-out images after all steps, in float32."""
        errors, contrasts = [], []
        model = self.model.config
        for start in range(0, len(self.held_out), self.config.batch_size):
            numbers = self.held_out[start : start + self.config.batch_size]
            hidden = self.config.hidden_places(len(numbers), model.places, draw=(1, start))
            error, contrasted = self.losses(
                numbers, hidden, self._columns(len(numbers), 1, start), steps=self.config.settling or model.steps
            )
            errors.append(error)
            contrasts.append(contrasted * len(numbers))
        return torch.cat(errors).mean().item(), (torch.stack(contrasts).sum() / len(self.held_out)).item()

    def _columns(self, images: int, *draw: int) -> NDArray[np.int64]:
        every = images * self.model.config.places
        generator = np.random.default_rng([self.config.seed, 6, *draw])
        return np.sort(generator.choice(every, min(self.config.contrast_columns, every), replace=False))

    def _gradients(self) -> dict[str, float]:
        model, numbers = self.model.config, self.config.batch(self.train, self.step)
        hidden = self.config.hidden_places(len(numbers), model.places, draw=(0, self.step))
        columns = self._columns(len(numbers), 0, self.step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            errors, contrasted = self.losses(
                numbers, hidden, columns, steps=self.config.settling_steps(self.step, model)
            )
        (errors.mean() + self.config.contrast_weight * contrasted).backward()
        return {"denoising": errors.mean().item(), "contrast": contrasted.item()}

    def _held_out(self) -> dict[str, float]:
        denoising, contrasted = self.held_out_losses()
        return {"held_out_denoising": denoising, "held_out_contrast": contrasted}

    def _write(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        checkpoint = Checkpoint(self.model.config, self.settings, self.step, weights, moments, NETWORK.name)
        write_checkpoint(self.path, checkpoint)


def hide(model: GLOM, images: Tensor, hidden: Tensor) -> Tensor:
    """Make the hidden places (B, N) of images (B, 3, S, S) grey: 0, the mean of ImageNet."""
    return model.images(model.patches(images).masked_fill(hidden[..., None], 0.0))


def settle(model: GLOM, images: Tensor, steps: int) -> tuple[Tensor, Opinions]:
    """Embeddings (B, N, L, D) after `steps`, 1 or more, and the opinions that the last of them was the mean of."""
    tokens = model.tokens(model.patches(images))  # (B, N, D)
    levels = model(images, steps=steps - 1)
    opinions = model.opinions(levels, tokens)
    return model.step(levels, opinions), opinions


def load_glom(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> tuple[GLOM, dict[str, Any]]:
    """Read a trained GLOM, and the settings that it was trained with.

    Raises:
        UsageError: no such file, another kind of checkpoint, or a damaged one.
    """
    checkpoint = read_network(path, NETWORK)
    model = GLOM(checkpoint.student, seed=None)
    model.load_state_dict(checkpoint.weights)
    return model.to(device).eval().requires_grad_(False), {**checkpoint.settings, "step": checkpoint.step}
