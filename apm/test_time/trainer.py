"""Overfit a fresh student to each image's target, read its token, forget everything: test-time training.

No function here takes a label, and nothing learned on one image is there when the next one comes.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from apm.errors import ApmError, UsageError
from apm.student.cells import Cells
from apm.student.config import APMConfig
from apm.student.engine import Engine
from apm.student.engine_readout import Parameters
from apm.student.field import SavedField
from apm.student.matmul import measured_precision
from apm.student.model import draw_parameters
from apm.test_time.options import AdaptConfig

if TYPE_CHECKING:
    from apm.text.zeroshot import ZeroShotHead

log = logging.getLogger("apm")

# A GPU is full long before this; larger batches only take more memory
LARGEST_BATCH = 32


@dataclass
class AdaptResult:
    """The result for B images. A flagged image (``finite`` False) has NaN for its token and its final figures."""

    tokens: Tensor  # (B, D) after the last step, read from all locations
    losses: Tensor  # (B, K) before each update, of all that is distilled; an image that stopped repeats its last value
    cosines: Tensor  # (B, K) of the token to the target, likewise
    final_losses: Tensor  # (B,) of `tokens`
    final_cosines: Tensor  # (B,)
    steps: Tensor  # (B,) int64, updates really made
    finite: Tensor  # (B,) bool: neither target, image nor any loss was NaN or infinite
    seconds: float  # wall time of the whole call
    precision: Literal["fp32", "bf16"]  # what was used
    step_tokens: Tensor | None = None  # (B, K + 1, D) if asked for
    fields: dict[int, Tensor] = field(default_factory=dict, repr=False)  # steps made -> (B, N, D); the snapshots
    folded: SavedField | None = field(default=None, repr=False)

    def features(self, rows: Tensor | Sequence[float], cols: Tensor | Sequence[float]) -> Tensor:
        """Features (B, Q, D), float32, of the adapted students at Q locations, in grid cells, in any order."""
        return self._kept().features(*_coordinates(rows, cols)).to(self.tokens.device)

    def attention(self, rows: Tensor | Sequence[float], cols: Tensor | Sequence[float]) -> Tensor:
        """Attention (B, heads, Q) that the object query pays to Q locations, in grid cells; sums to 1 over these."""
        return self._kept().attention(*_coordinates(rows, cols)).to(self.tokens.device)

    @classmethod
    def join(cls, parts: Sequence[AdaptResult], device: torch.device) -> AdaptResult:
        """Make one result, on a device, of those of several batches."""
        first = parts[0]
        values = {one.name: getattr(first, one.name) for one in dataclasses.fields(cls)}
        tensors: dict[str, Any] = {
            name: torch.cat([getattr(part, name) for part in parts]).to(device)
            for name, value in values.items()
            if isinstance(value, Tensor)
        }
        fields = {step: torch.cat([part.fields[step] for part in parts]).to(device) for step in first.fields}
        kept = [part.folded for part in parts if part.folded is not None]
        return dataclasses.replace(first, **tensors, fields=fields, folded=SavedField.join(kept) if kept else None)

    def _kept(self) -> SavedField:
        if self.folded is None:
            raise UsageError(
                "The students' weights were not kept: call adapt(..., keep_field=True) to ask for features."
            )
        return self.folded


def _coordinates(rows: Tensor | Sequence[float], cols: Tensor | Sequence[float]) -> tuple[Tensor, Tensor]:
    return torch.as_tensor(rows, dtype=torch.float64), torch.as_tensor(cols, dtype=torch.float64)


class TestTimeTrainer:
    """Adapts one student per image to the image's target, always from the same initial state.

    An image's answer is the same alone, in any batch and in any order. Not for use by two threads at once.
    """

    __test__ = False  # the name is the method's; pytest need not look in

    def __init__(
        self,
        model: APMConfig,
        adapt: AdaptConfig,
        *,
        device: torch.device | str = "cpu",
        batch_size: int | None = None,
        initial: Parameters | None = None,
    ) -> None:
        """Draw the initial state.

        Args:
            model: sizes of the student; its ``dim`` is the targets'.
            adapt: how to train.
            device: where the students live.
            batch_size: students in memory at a time. None: on a CPU one, whose products already fill its cores; on a
                GPU as many as its free memory holds, up to 32.
            initial: that state, if it is drawn already (`apm.student.drawn_ahead`).
        """
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"batch_size must be 1 or more, not {batch_size}.")
        self.check(model, adapt)
        self.model, self.config = model, adapt
        self.device = torch.device(device)
        self.precision: Literal["fp32", "bf16"] = (
            measured_precision(self.device) if adapt.precision == "auto" else adapt.precision
        )
        if initial is None:
            initial = draw_parameters(model, np.random.Generator(np.random.PCG64(adapt.seed)))
        self._initial = initial
        self._limit = batch_size
        self._engine: Engine | None = None
        self._said = False

    @staticmethod
    def check(model: APMConfig, adapt: AdaptConfig) -> None:
        """Refuse, by a `UsageError`, a student and a way to train it that do not go together."""
        if adapt.queries is not None and adapt.queries > model.cells:
            raise UsageError(f"queries must not exceed the {model.cells} locations of the grid; got {adapt.queries}.")
        if adapt.agree and adapt.queries is not None:
            raise UsageError(
                f"agree={adapt.agree:g} needs all locations, but queries={adapt.queries} reads only some: leave one "
                "out."
            )
        if adapt.distil == "grid" and model.readout == "query":
            raise UsageError(
                'With distil="grid" the object query is not trained: choose readout="mean" or distil="both".'
            )

    def adapt(
        self,
        images: Tensor,
        targets: Tensor,
        *,
        grids: Tensor | Cells | None = None,
        head: ZeroShotHead | None = None,
        keep_field: bool = False,
        record_tokens: bool = False,
        snapshots: Sequence[int] = (),
    ) -> AdaptResult:
        """Adapt a fresh student to each image.

        Args:
            images: (B, 3, S, S) float, ImageNet-normalised, S the config's image size.
            targets: (B, D) float, what each student's token is to become; not normalised. With distil="grid" they have
                no loss, but the cosines are to them.
            grids: (B, N, D) float, what the field is to become at the student's own locations, in reading order
                (`apm.student.field.resample`); or `Cells`, what its means over the cells of views are to become.
                Needed unless distil="cls".
            head: the labels over which loss="soft" compares the probabilities of targets and students' tokens. Needed
                for that loss, and unused by the others.
            keep_field: keep columns and weights, so that the result can tell features at any location.
            record_tokens: keep the token before each update as well.
            snapshots: numbers of steps, from 0 to all, after which to keep the field at the student's own locations,
                read in float32 whatever the precision of the steps.

        Returns:
            The result, on the targets' device.

        Raises:
            UsageError: shapes that do not fit.
            ApmError: not even one image fits into memory.
        """
        self._check(images, targets, grids, snapshots)
        text = self._text(head)
        began = time.perf_counter()
        parts: list[AdaptResult] = []
        start = 0
        view_cells = grids.features.shape[1] if isinstance(grids, Cells) else None
        texts = None if text is None else len(text)
        while start < len(images):
            size = min(self._batch_size(view_cells, texts), len(images) - start)
            some = slice(start, start + size)
            try:
                wanted = None if grids is None else grids[some]
                parts.append(
                    self._adapt_some(images[some], targets[some], wanted, text, keep_field, record_tokens, snapshots)
                )
                start += size
                continue
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
            # outside of the except block: the error's traceback would keep alive what did not fit
            self._halve_batch(size, view_cells, texts)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # so that `seconds` holds the work and not only its launch
        joined = AdaptResult.join(parts, targets.device)
        joined.seconds = time.perf_counter() - began
        return joined

    def _check(self, images: Tensor, targets: Tensor, grids: Tensor | Cells | None, snapshots: Sequence[int]) -> None:
        side = self.model.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, side, side) or not len(images):
            raise UsageError(f"images must have shape (B, 3, {side}, {side}), B at least 1, not {tuple(images.shape)}.")
        if tuple(targets.shape) != (len(images), self.model.dim):
            raise UsageError(
                f"targets must have shape ({len(images)}, {self.model.dim}), one row for each image, "
                f"not {tuple(targets.shape)}."
            )
        if (grids is None) != (self.config.distil == "cls"):
            given = "and none are given" if grids is None else "which has no use for those given"
            raise UsageError(f'grids go with distil="grid" or "both"; it is "{self.config.distil}", {given}.')
        shape = (len(images), self.model.cells, self.model.dim)
        if isinstance(grids, Cells):
            self._check_cells(grids, len(images))
        elif grids is not None and tuple(grids.shape) != shape:
            raise UsageError(f"grids must have shape {shape}, a row for each location, not {tuple(grids.shape)}.")
        if any(not 0 <= step <= self.config.steps for step in snapshots):
            raise UsageError(f"snapshots must lie between 0 and the {self.config.steps} steps; got {list(snapshots)}.")

    def _check_cells(self, cells: Cells, count: int) -> None:
        rows = cells.features.shape[1] if cells.features.ndim == 3 else 0
        expected = ((count, rows, self.model.cells), (count, rows, self.model.dim))
        if not rows or (tuple(cells.shares.shape), tuple(cells.features.shape)) != expected:
            raise UsageError(
                f"Cells of views must have shares ({count}, R, {self.model.cells}) and features ({count}, R, "
                f"{self.model.dim}), not {tuple(cells.shares.shape)} and {tuple(cells.features.shape)}."
            )
        if self.config.queries is not None:
            raise UsageError("Cells of views need all locations: leave out queries, or give a grid.")

    def _text(self, head: ZeroShotHead | None) -> Tensor | None:
        """Text features (C, D) as long as the logit scale, where the loss is over labels."""
        if self.config.loss != "soft":
            return None
        if head is None:
            raise UsageError('loss="soft" compares label probabilities, and there are no labels: give adapt a head.')
        if head.features.shape[1] != self.model.dim:
            raise UsageError(
                f"The head's text features have width {head.features.shape[1]}, the targets {self.model.dim}."
            )
        return head.logit_scale * head.features

    def _batch_size(self, view_cells: int | None, texts: int | None) -> int:
        """Students in memory at a time: decided once, and from then on only ever lowered."""
        if self._limit is None:
            self._limit = 1 if self.device.type == "cpu" else LARGEST_BATCH
            if self.device.type == "cuda":
                free, _ = torch.cuda.mem_get_info(self.device)
                self._limit = max(1, min(LARGEST_BATCH, int(0.8 * free) // self._bytes_per_student(view_cells, texts)))
        return self._limit

    def _bytes_per_student(self, view_cells: int | None = None, texts: int | None = None) -> int:
        """Memory of one student in the engine: weights, gradients, moments; hidden layers and their gradients.

        What all share is beside it: text features.
        """
        parameters = sum(value.numel() for value in self._initial.values())
        hidden = sum(self.model.hidden)
        # the field, its gradient, what is wanted; colours
        if self.config.distil != "cls" or self.config.rgb_weight or self.config.agree:
            hidden += 2 * self.model.dim + 2 * self.model.rgb_hidden
        if self.config.agree:  # half of it, since locations count twice below
            hidden += (self.model.cells + self.model.dim) // 2
        in_views = (view_cells or 0) * (self.model.cells + 2 * self.model.dim + 2 * self.model.hidden[2])
        return 4 * (5 * parameters + 2 * self.model.cells * hidden + in_views + 6 * (texts or 0))

    def _halve_batch(self, size: int, view_cells: int | None, texts: int | None) -> None:
        """Release what did not fit and continue with half of it. Logged once."""
        self._engine = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if size == 1:
            gib = self._bytes_per_student(view_cells, texts) / 2**30
            raise ApmError(
                f"Out of memory on {self.device}: one image at a time needs about {gib:.1f} GiB. "
                'Free some memory, or choose the preset "small".'
            )
        self._limit = size // 2
        if not self._said:
            log.warning("Out of memory with %d images at a time: continuing with fewer.", size)
        self._said = True

    def _engine_for(self, size: int, view_cells: int | None, texts: int | None) -> Engine:
        """The engine in use if it holds ``size`` samples, else a new one, reset. A smaller rest will be padded."""
        engine = self._engine
        if engine is not None and engine.batch >= size and (engine.view_cells, engine.texts) == (view_cells, texts):
            engine.reset()  # before and not after: whatever an interrupted call left behind is gone
        else:
            self._engine = engine = None  # its memory goes first
            self._engine = engine = Engine(
                self.model,
                self._initial,
                batch=size,
                lr=self.config.lr,
                loss=self.config.loss,
                temperature=self.config.temperature,
                texts=texts,
                tolerance=self.config.tolerance,
                precision=self.precision,
                queries=self.config.queries,
                seed=self.config.seed,
                distil=self.config.distil,
                rgb_weight=self.config.rgb_weight,
                agree=self.config.agree,
                view_cells=view_cells,
                device=self.device,
            )
        return engine

    def _adapt_some(
        self,
        images: Tensor,
        targets: Tensor,
        grids: Tensor | Cells | None,
        text: Tensor | None,
        keep_field: bool,
        record_tokens: bool,
        snapshots: Sequence[int],
    ) -> AdaptResult:
        size = len(images)
        view_cells = grids.features.shape[1] if isinstance(grids, Cells) else None
        engine = self._engine_for(size, view_cells, None if text is None else len(text))
        spare = engine.batch - size
        if spare:  # repeat the first sample: no sample sees another, so it changes nothing
            images = torch.cat((images, images[:1].expand(spare, -1, -1, -1)))
            targets = torch.cat((targets, targets[:1].expand(spare, -1)))
            if isinstance(grids, Cells):
                grids = grids.padded(spare)
            elif grids is not None:
                grids = torch.cat((grids, grids[:1].expand(spare, -1, -1)))
        engine.load(images, targets, grids, text)
        history = engine.run(self.config.steps, record_tokens=record_tokens, snapshots=frozenset(snapshots))
        finite = engine.finite[:size].clone()
        tokens, losses, cosines = (t[:size].clone() for t in (engine.token, engine.loss, engine.cosine))
        folded = engine.fold(size) if keep_field else None
        fields = {step: history.fields[step][:size] for step in sorted(history.fields)}
        for values in (tokens, losses, cosines, *fields.values(), *([folded.columns] if folded else [])):
            values[~finite] = math.nan  # what is flagged cannot be mistaken for an answer
        return AdaptResult(
            tokens=tokens,
            losses=history.losses[:size],
            cosines=history.cosines[:size],
            final_losses=losses,
            final_cosines=cosines,
            steps=engine.updates[:size].long(),
            finite=finite,
            step_tokens=None if history.tokens is None else history.tokens[:size],
            fields=fields,
            folded=folded,
            seconds=0.0,  # of all batches, once they are joined
            precision=self.precision,
        )


def _out_of_memory(error: BaseException) -> bool:
    """Whether an error is a lack of memory; on a CPU it is a plain RuntimeError, recognised by its text."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        text in str(error).lower() for text in ("can't allocate memory", "out of memory")
    )
