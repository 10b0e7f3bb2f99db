"""GLOM as the student in test-time training: columns overfit to the teacher's features of one image, then reset.

As with APM (Modi & Rawat 2024) every image has a student of its own, which starts from the same initial weights and
never sees a label or another image. The columns settle on the image; a linear readout of the highest level, averaged
over the locations, is compared with the teacher's token, and a readout of a chosen level, location by location, with
the teacher's grid.
"""

# ruff: noqa: RUF009  (`setting` makes fields)
from __future__ import annotations

import time
import typing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from apm.errors import UsageError
from apm.glom.config import Consensus, GLOMConfig
from apm.glom.model import GLOM
from apm.settings import at_least, between, check_values, positive, setting
from apm.student.config import Distil

LARGEST_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class GLOMStudentOptions:
    """A student's sizes, and how it is trained on its image.

    Raises:
        UsageError: a value that cannot work, or sizes that do not go together.
    """

    steps: int = setting(50, "Optimisation steps for each image.", check=at_least(1))
    lr: float = setting(1e-3, "Adam's learning rate.", check=positive)
    distil: Distil = setting("cls", "What the loss compares: cls, grid or both.", choices=typing.get_args(Distil))
    seed: int = setting(0, "Seed of the student's initial weights.", check=between(0, 2**63 - 1))
    image_size: int = setting(64, "Side of the student's images in pixels.", check=at_least(1))
    patch_size: int = setting(8, "Side of a location in pixels.", check=at_least(1))
    dim: int = setting(64, "Width of an embedding.", check=at_least(1))
    levels: int = setting(3, "Levels per column.", check=at_least(1))
    consensus: Consensus = setting(
        "all", "Which locations each one attends to: all, others, none.", choices=typing.get_args(Consensus)
    )
    top_down: bool = setting(True, "Whether levels get top-down input from the level above.")
    settling: int | None = setting(
        None, "Steps in which the columns settle.", default_words="twice the levels", check=at_least(1)
    )
    grid_level: int = setting(-1, "Level that the grid is read from; 0: the lowest, -1: the highest.")

    def __post_init__(self) -> None:
        """Check every value."""
        check_values(self)
        if not -self.levels <= self.grid_level < self.levels:
            raise UsageError(f"grid_level must be below {self.levels}, the number of levels, not {self.grid_level}.")
        self.sizes()

    def sizes(self) -> GLOMConfig:
        """The sizes alone."""
        return GLOMConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            dim=self.dim,
            levels=self.levels,
            consensus=self.consensus,
            radius=None,
            top_down=self.top_down,
        )


class GLOMStudent(nn.Module):
    """GLOM with the readouts that a teacher's token and grid are compared with."""

    def __init__(self, options: GLOMStudentOptions, width: int) -> None:
        """Draw all weights from the options' seed; `width` is the teacher's D."""
        super().__init__()
        self.options = options
        self.columns = GLOM(options.sizes(), seed=options.seed)
        self.columns.pixels.requires_grad_(False)  # nothing is read back as pixels here
        self.token = nn.Linear(options.dim, width)
        self.grid = nn.Linear(options.dim, width)
        generator = np.random.default_rng([options.seed, 7])
        with torch.no_grad():
            for readout in (self.token, self.grid):
                drawn = generator.uniform(-1, 1, readout.weight.shape) / np.sqrt(options.dim)
                readout.weight.copy_(torch.from_numpy(drawn))
                readout.bias.zero_()
        for name, readout in (("cls", self.token), ("grid", self.grid)):
            readout.requires_grad_(options.distil in (name, "both"))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) → token (B, D), and what the grid is compared with (B, N, D)."""
        levels = self.columns(images, steps=self.options.settling)  # (B, N, L, d)
        field = self.grid(levels[:, :, self.options.grid_level])  # (B, N, D)
        if self.options.distil == "grid":  # nothing trains the token's readout
            return field.mean(1), field
        return self.token(levels[:, :, -1]).mean(1), field


@dataclass
class GLOMResult:
    """What came of B images. A flagged image (``finite`` False) has NaN for its token, field and final figures."""

    tokens: Tensor  # (B, D) after the last step
    losses: Tensor  # (B, K) before each update, of all that is distilled
    cosines: Tensor  # (B, K) of the token to the target, likewise
    final_losses: Tensor  # (B,)
    final_cosines: Tensor  # (B,)
    finite: Tensor  # (B,) bool: neither target, image nor any loss was NaN or infinite
    fields: Tensor = field(repr=False)  # (B, N, D) after the last step; untrained where the token alone is distilled
    seconds: float  # of the whole call
    step_tokens: Tensor | None = field(default=None, repr=False)  # (B, K + 1, D) if asked for


class GLOMTestTimeTrainer:
    """Adapts one GLOM per image to the teacher's features of the image, always from the same initial weights.

    Nothing is kept between calls: an image's answer is the same alone, in any batch and in any order.
    """

    def __init__(
        self,
        options: GLOMStudentOptions,
        width: int,
        *,
        device: torch.device | str = "cpu",
        batch_size: int | None = None,
    ) -> None:
        """Draw the initial weights.

        Args:
            options: sizes, and how to train.
            width: D of the teacher's tokens and grids.
            device: where the students live.
            batch_size: students side by side. None: on a CPU one, on a GPU 32.
        """
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"batch_size must be 1 or more, not {batch_size}.")
        self.options, self.width, self.device = options, width, torch.device(device)
        self.student = GLOMStudent(options, width).to(self.device)
        self._size = batch_size or (1 if self.device.type == "cpu" else LARGEST_BATCH)

    def adapt(
        self, images: Tensor, targets: Tensor, *, grids: Tensor | None = None, record_tokens: bool = False
    ) -> GLOMResult:
        """Adapt a fresh student to each image.

        Args:
            images: (B, 3, S, S) float, ImageNet-normalised.
            targets: (B, D) float, what each token is to become; with distil="grid" only the cosines are to them.
            grids: (B, N, D) float, what the fields are to become (`apm.student.field.resample`); needed unless
                distil="cls".
            record_tokens: keep the token before each update as well.

        Returns:
            The result, on the targets' device.

        Raises:
            UsageError: shapes that do not fit.
        """
        self._check(images, targets, grids)
        began = time.perf_counter()
        parts = [
            self._adapt_some(images[some], targets[some], None if grids is None else grids[some], record_tokens)
            for some in (slice(start, start + self._size) for start in range(0, len(images), self._size))
        ]
        joined: dict[str, Any] = {}
        for name in parts[0]:
            values = [value for part in parts if (value := part[name]) is not None]
            joined[name] = torch.cat(values).to(targets.device) if values else None
        return GLOMResult(**joined, seconds=time.perf_counter() - began)

    def _check(self, images: Tensor, targets: Tensor, grids: Tensor | None) -> None:
        side, places = self.options.image_size, self.student.columns.config.places
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, side, side) or not len(images):
            raise UsageError(f"images must have shape (B, 3, {side}, {side}), B at least 1, not {tuple(images.shape)}.")
        if (grids is None) != (self.options.distil == "cls"):
            raise UsageError(
                f'grids go with distil="grid" or "both", and with no other; it is "{self.options.distil}".'
            )
        shapes: list[tuple[str, Tensor, tuple[int, ...]]] = [("targets", targets, (len(images), self.width))]
        if grids is not None:
            shapes.append(("grids", grids, (len(images), places, self.width)))
        for name, value, shape in shapes:
            if tuple(value.shape) != shape:
                raise UsageError(f"{name} must have shape {shape}, not {tuple(value.shape)}.")

    def _adapt_some(
        self, images: Tensor, targets: Tensor, grids: Tensor | None, record_tokens: bool
    ) -> dict[str, Tensor | None]:
        """Adapt B students side by side: each has its own copy of every parameter, and its own loss."""
        images, targets = (value.to(self.device, torch.float32) for value in (images, targets))
        grids = None if grids is None else grids.to(self.device, torch.float32)
        weights = {
            name: value.detach().expand(len(images), *value.shape).clone().requires_grad_()
            for name, value in self.student.named_parameters()
            if value.requires_grad
        }
        optimiser = torch.optim.Adam(weights.values(), lr=self.options.lr)
        losses: list[Tensor] = []
        tokens: list[Tensor] = []
        for _ in range(self.options.steps):
            optimiser.zero_grad()
            token, fields = self._read(weights, images)
            loss = self._losses(token, fields, targets, grids)  # (B,)
            loss.sum().backward()  # no student's gradient has a part in another's
            optimiser.step()
            losses.append(loss.detach())
            tokens.append(token.detach())
        with torch.no_grad():
            token, fields = self._read(weights, images)
            loss = self._losses(token, fields, targets, grids)
        return _result(token, fields, loss, targets, torch.stack(losses, 1), torch.stack(tokens, 1), record_tokens)

    def _read(self, weights: dict[str, Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
        """Token (B, D) and field (B, N, D) of B students, each with weights (B, …) of its own."""

        def one(own: dict[str, Tensor], image: Tensor) -> tuple[Tensor, Tensor]:
            token, field = functional_call(self.student, own, (image[None],))
            return token[0], field[0]

        read: tuple[Tensor, Tensor] = vmap(one)(weights, images)
        return read

    def _losses(self, token: Tensor, fields: Tensor, targets: Tensor, grids: Tensor | None) -> Tensor:
        """Sum (B,) of the mean squared errors of what is distilled."""
        losses = token.new_zeros(len(token))
        if self.options.distil != "grid":
            losses = losses + (token - targets).square().mean(1)
        if grids is not None:
            losses = losses + (fields - grids).square().mean((1, 2))
        return losses


def _result(
    token: Tensor, fields: Tensor, loss: Tensor, targets: Tensor, losses: Tensor, tokens: Tensor, record_tokens: bool
) -> dict[str, Tensor | None]:
    """The parts of a `GLOMResult`; what is not finite cannot be mistaken for an answer."""
    cosines = F.cosine_similarity(tokens, targets[:, None], dim=-1)  # (B, K)
    final = F.cosine_similarity(token, targets, dim=-1)
    steps = torch.cat([tokens, token[:, None]], dim=1) if record_tokens else None
    finite = losses.isfinite().all(1) & loss.isfinite() & token.isfinite().all(1) & targets.isfinite().all(1)
    for values in (token, fields, loss, final):
        values[~finite] = torch.nan
    return {
        "tokens": token,
        "losses": losses,
        "cosines": cosines,
        "final_losses": loss,
        "final_cosines": final,
        "finite": finite,
        "fields": fields,
        "step_tokens": steps,
    }
