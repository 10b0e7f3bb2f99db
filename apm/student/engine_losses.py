"""Losses of the field itself: to a teacher's grid or grids, to the image's colours, to itself. Gradients by hand.

The same numbers as `apm.student.model` (the tests hold them together). The field ``f = W h + b`` is built here, as its
losses are of every location. The colour head's first layer is separable as the coordinate MLP's is: ``W [f ; T ; p] =
W_f f + W_T T + W_x e(x) + W_y e(y)``, one product for the column and one for each row and column of the grid. All in
float32: the difference of two fields that are nearly alike has few digits to lose, and these products are small
beside those of the middle layers. What is read in the cells of views (`apm.student.cells`) needs no field: the head is
linear and each cell's shares add up to 1, so ``A (W h + b) = W (A h) + b``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from apm.student.agreement import AgreementLoss
from apm.student.cells import Cells
from apm.student.config import APMConfig, Distil
from apm.student.engine_readout import Parameters
from apm.student.matmul import accumulate, affine, mean_of, mean_square, mean_square_of_rows, product, relu_backward


@dataclass
class Locations:
    """The locations that a step reads, all of the grid or the ones drawn for it, and what is wanted there."""

    selector: Tensor  # (2 * grid, Q), 1 where a location lies in the row (first half) or column (second half), else 0
    positions: Tensor  # (Q, D) the readout's position codes
    exact_selector: Tensor | None = None  # the selector in float32, where colours have a loss
    grid: Tensor | None = None  # (B, Q, D) the teacher's grid, where it has a loss
    colours: Tensor | None = None  # (B, Q, 3) the image's colours, where they have a loss
    guide: Tensor | None = None  # (B, Q, C) the code of the image's colours, where queries hold it

    @property
    def count(self) -> int:
        """Q."""
        return self.selector.shape[1]

    def like(self, count: int) -> "Locations":
        """Buffers of the same kind for so many locations."""
        return Locations(
            self.selector[:, :count].clone(),
            self.positions[:count].clone(),
            None if self.exact_selector is None else self.exact_selector[:, :count].clone(),
            None if self.grid is None else self.grid[:, :count].clone(),
            None if self.colours is None else self.colours[:, :count].clone(),
            None if self.guide is None else self.guide[:, :count].clone(),
        )

    def take(self, source: "Locations", which: Tensor) -> None:
        """Become those locations of `source` that `which` (Q,) numbers, in these buffers."""
        torch.index_select(source.selector, 1, which, out=self.selector)
        torch.index_select(source.positions, 0, which, out=self.positions)
        for name, dim in (("exact_selector", 1), ("grid", 1), ("colours", 1), ("guide", 1)):
            if (mine := getattr(self, name)) is not None:
                torch.index_select(getattr(source, name), dim, which, out=mine)


class CellLosses:
    """`apm.student.cells.robust_loss` of what is read in the cells of views: forward and hand-written backward."""

    def __init__(
        self,
        config: APMConfig,
        weights: Parameters,
        gradients: Parameters,
        batch: int,
        count: int,
        device: torch.device,
    ) -> None:
        """Use these weights; write gradients into these; `count` cells of `batch` samples."""
        self.weights, self.gradients = weights, gradients

        def buffer(*shape: int) -> Tensor:
            return torch.zeros(batch, *shape, device=device)

        self.shares, self.wanted = buffer(count, config.cells), buffer(count, config.dim)
        self.spread, self._error = torch.ones(batch, device=device), buffer(count)
        self._pooled, self._d_pooled = buffer(count, config.hidden[2]), buffer(count, config.hidden[2])
        self._off = buffer(count, config.dim)

    def load(self, cells: Cells) -> None:
        """Take what is wanted where."""
        self.shares.copy_(cells.shares)
        self.wanted.copy_(cells.features)
        self.spread.copy_(cells.spread())

    def forward(self, hidden: Tensor) -> Tensor:
        """Losses (B,) from the last hidden layer (B, N, H) at all locations."""
        product(self.shares, hidden, out=self._pooled)
        affine(self._pooled, self.weights["mlp.head.weight"], self.weights["mlp.head.bias"], out=self._off)
        self._off -= self.wanted
        self._error.copy_(mean_square_of_rows(self._off))
        root = (1 + self._error / self.spread[:, None]).sqrt()  # (B, R)
        return mean_of(2 * self._error / (1 + root))

    def backward(self, out: Tensor) -> None:
        """Add the gradient of the hidden layer to ``out`` (B, N, H) and the feature head's to what is there."""
        _, count, dim = self._off.shape
        weight = (1 + self._error / self.spread[:, None]).rsqrt() * (2 / (count * dim))
        self._off *= weight[..., None]
        product(self._off, self.weights["mlp.head.weight"], out=self._d_pooled)
        accumulate(self.shares.mT, self._d_pooled, out=out)
        accumulate(self._off.mT, self._pooled, out=self.gradients["mlp.head.weight"])
        self.gradients["mlp.head.bias"] += self._off.sum(dim=1)


class FieldLosses:
    """``mean((f - G)^2) + rgb_weight * mean((rgb - colours)^2)`` of B samples: forward and hand-written backward.

    To which `apm.student.agreement` may be added.
    """

    def __init__(
        self,
        config: APMConfig,
        weights: Parameters,
        gradients: Parameters,
        axis: Tensor,
        *,
        distil: Distil,
        rgb_weight: float,
        agree: float = 0.0,
        view_cells: int | None = None,
    ) -> None:
        """Use these weights; write gradients into these.

        Args:
            config: sizes of the student.
            weights: name -> (B, *shape), the RGB head's among them if its loss counts.
            gradients: likewise.
            axis: (B, grid, position_dim / 2) position code of one axis of the grid.
            distil: whether the teacher's grid is wanted.
            rgb_weight: of the colours' loss; 0: none.
            agree: weight of the loss of places that disagree with their neighbours; 0: none.
            view_cells: R, the cells of views in which a grid is wanted; None: at the student's own locations.
        """
        self.config, self.weights, self.gradients, self._axis = config, weights, gradients, axis
        self.with_grid, self.rgb_weight = distil != "cls", rgb_weight

        def buffer(*shape: int) -> Tensor:
            return torch.zeros(len(axis), *shape, device=axis.device)

        count, width = config.cells, config.rgb_hidden
        self.cells: CellLosses | None = None
        if self.with_grid and view_cells is not None:
            self.cells = CellLosses(config, weights, gradients, len(axis), view_cells, axis.device)
        self._builds_field = self.cells is None or bool(rgb_weight or agree)
        self._agreement = AgreementLoss(config, len(axis), weight=agree, device=axis.device) if agree else None
        if self._builds_field:
            self._field, self._d_field = buffer(count, config.dim), buffer(count, config.dim)
        if rgb_weight:
            self._sums, self._d_sums = buffer(2 * config.grid, width), buffer(2 * config.grid, width)
            self._r1, self._d1, self._r2, self._d2 = (buffer(count, width) for _ in range(4))
            self._rgb, self._d_rgb = buffer(count, 3), buffer(count, 3)

    def forward(self, hidden: Tensor, column: Tensor, at: Locations) -> Tensor:
        """Losses (B,) from the last hidden layer (B, Q, H) at the locations and the trigger column (B, 1, N)."""
        n, w = at.count, self.weights
        loss = torch.zeros(len(hidden), device=hidden.device)
        if self.cells is not None:
            loss += self.cells.forward(hidden)
        if not self._builds_field:
            return loss
        field, d_field = self._field[:, :n], self._d_field[:, :n]
        affine(hidden, w["mlp.head.weight"], w["mlp.head.bias"], out=field)
        if at.grid is not None:
            torch.sub(field, at.grid, out=d_field)
            loss += mean_square(d_field)
            d_field *= 2 / (n * self.config.dim)
        else:
            d_field.zero_()
        if self._agreement is not None:
            loss += self._agreement.forward(field, d_field)
        if at.colours is not None:
            d_rgb = self._d_rgb[:, :n]
            torch.sub(self._colours(field, column, at), at.colours, out=d_rgb)
            loss += self.rgb_weight * mean_square(d_rgb)
            d_rgb *= self.rgb_weight * 2 / (n * 3)
        return loss

    def backward(self, hidden: Tensor, column: Tensor, at: Locations, out: Tensor) -> Tensor | None:
        """Backward pass of the latest `forward`, once.

        Adds the gradient of the hidden layer to ``out`` (B, Q, H) and the feature head's to what is there; writes the
        RGB head's; returns that of the column (B, 1, N), if it has one.
        """
        n, g = at.count, self.gradients
        if self.cells is not None:
            self.cells.backward(out)
        if not self._builds_field:
            return None
        field, d_field = self._field[:, :n], self._d_field[:, :n]
        d_column = None if at.colours is None else self._colours_backward(field, d_field, column, at)
        accumulate(d_field.mT, hidden, out=g["mlp.head.weight"])
        g["mlp.head.bias"] += d_field.sum(dim=1)
        accumulate(d_field, self.weights["mlp.head.weight"], out=out)
        return d_column

    def _first_layer(self, parameters: Parameters) -> tuple[Tensor, ...]:
        """Split (B, R, D + N + P) by what it is multiplied with: field, column, x code, y code."""
        half = self.config.position_dim // 2
        return parameters["rgb_head.layer1.weight"].split((self.config.dim, self.config.cells, half, half), dim=2)

    def _colours(self, field: Tensor, column: Tensor, at: Locations) -> Tensor:
        assert at.exact_selector is not None
        n, grid, w = at.count, self.config.grid, self.weights
        by_field, by_column, by_x, by_y = self._first_layer(w)
        r1, r2, rgb = self._r1[:, :n], self._r2[:, :n], self._rgb[:, :n]
        product(self._axis, by_y.mT, out=self._sums[:, :grid])
        product(self._axis, by_x.mT, out=self._sums[:, grid:])
        shared = product(column, by_column.mT) + w["rgb_head.layer1.bias"][:, None]  # (B, 1, R)
        self._sums[:, :grid] += shared  # every location lies in exactly one row
        product(at.exact_selector.T.expand(len(field), -1, -1), self._sums, out=r1)
        accumulate(field, by_field.mT, out=r1)
        r1.relu_()
        affine(r1, w["rgb_head.layer2.weight"], w["rgb_head.layer2.bias"], out=r2).relu_()
        return affine(r2, w["rgb_head.layer3.weight"], w["rgb_head.layer3.bias"], out=rgb).relu_()

    def _colours_backward(self, field: Tensor, d_field: Tensor, column: Tensor, at: Locations) -> Tensor:
        """Add to the field's gradient, write the head's, return the column's."""
        assert at.exact_selector is not None
        n, grid, w, g = at.count, self.config.grid, self.weights, self.gradients
        r1, r2, rgb = self._r1[:, :n], self._r2[:, :n], self._rgb[:, :n]
        d1, d2, d_rgb = self._d1[:, :n], self._d2[:, :n], self._d_rgb[:, :n]
        relu_backward(d_rgb, rgb)
        torch.sum(d_rgb, dim=1, out=g["rgb_head.layer3.bias"])
        product(d_rgb.mT, r2, out=g["rgb_head.layer3.weight"])
        product(d_rgb, w["rgb_head.layer3.weight"], out=d2)
        relu_backward(d2, r2)
        torch.sum(d2, dim=1, out=g["rgb_head.layer2.bias"])
        product(d2.mT, r1, out=g["rgb_head.layer2.weight"])
        product(d2, w["rgb_head.layer2.weight"], out=d1)
        relu_backward(d1, r1)

        by_field, by_column, *_ = self._first_layer(w)
        d_by_field, d_by_column, d_by_x, d_by_y = self._first_layer(g)
        product(d1.mT, field, out=d_by_field)
        accumulate(d1, by_field, out=d_field)
        product(at.exact_selector.expand(len(field), -1, -1), d1, out=self._d_sums)
        product(self._d_sums[:, :grid].mT, self._axis, out=d_by_y)
        product(self._d_sums[:, grid:].mT, self._axis, out=d_by_x)
        d_shared = self._d_sums[:, :grid].sum(dim=1, keepdim=True)  # (B, 1, R)
        g["rgb_head.layer1.bias"].copy_(d_shared[:, 0])
        torch.mul(d_shared.mT, column, out=d_by_column)
        return product(d_shared, by_column)
