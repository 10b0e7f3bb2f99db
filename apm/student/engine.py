"""The student's steps in their exact cheap form: B samples at once, each with its own weights, gradients by hand.

The same numbers as `apm.student.model` (the tests hold them together), from far less arithmetic:

* ``W [T ; p] = W_T T + W_p p``: the column's share is the same at every location, so it is computed once a step;
* the position code is separable, ``W_p p(y, x) = W_x e(x) + W_y e(y)``: one product per row and per column of the grid,
  which a selection matrix then adds up at each location (and, transposed, gathers the gradients again);
* the readout and the feature head need no field (`apm.student.engine_readout`); it is built only where it, or its
  colours, have a loss of their own (`apm.student.engine_losses`).

What remains is the two middle layers. Everything lives in buffers made once: a step leaves no new memory behind, and on
a GPU it is captured once as a graph and replayed.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from apm.student.cells import Cells
from apm.student.config import APMConfig, Distil, Loss
from apm.student.engine_adam import AdamRows
from apm.student.engine_losses import FieldLosses, Locations
from apm.student.engine_readout import MeanPooling, Parameters, Pooling, QueryPooling
from apm.student.engine_token import TokenLoss
from apm.student.field import SavedField
from apm.student.guide import WIDTH, colour_code, guide_of
from apm.student.matmul import accumulate, affine, product, relu_backward
from apm.student.position import axis_code, grid_locations, position_code


@dataclass
class History:
    """What the steps of one `Engine.run` went through, measured before each update."""

    losses: Tensor  # (B, K)
    cosines: Tensor  # (B, K), to the target
    tokens: Tensor | None  # (B, K + 1, D), the last one after the last step; only if recorded
    fields: dict[int, Tensor]  # steps made -> field (B, N, D) at all locations; those asked for


class Engine:
    """B students in parallel: `load` images and targets, `reset`, `run` K steps, read `token`, `fold`.

    Attributes:
        weights, gradients: name -> (B, *shape) views, named as in `apm.student.model.APM`; float32, but see `AdamRows`.
        rows: the parameters, and all that Adam keeps of them.
        token: (B, D) of the latest evaluation; ``loss``, ``cosine``: (B,), of that token against the target.
        frozen: (B,) 1.0 where a sample takes no more steps (tolerance reached, or not finite), else 0.0.
        finite: (B,) bool, False once a sample's loss or token was not finite.
        updates: (B,) float32, steps really made since the reset.
    """

    def __init__(
        self,
        config: APMConfig,
        initial: Parameters,
        *,
        batch: int = 1,
        lr: float = 1e-4,
        loss: Loss = "mse",
        temperature: float = 1.0,
        texts: int | None = None,
        tolerance: float | None = None,
        precision: Literal["fp32", "bf16"] = "fp32",
        queries: int | None = None,
        seed: int = 0,
        distil: Distil = "cls",
        rgb_weight: float = 0.0,
        agree: float = 0.0,
        view_cells: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Make all buffers.

        Args:
            config: sizes of the student.
            initial: the state that every sample starts from and is reset to, from `apm.student.model.draw_parameters`.
            batch: B, samples at a time.
            lr: Adam's learning rate, constant.
            loss: of the token, see `apm.student.engine_token`.
            temperature: of the loss ``soft``.
            texts: C, how many names with text features the loss ``soft`` is over; None: another loss.
            tolerance: a sample whose loss is at or below this takes no more steps; None: all take every step.
            precision: of the products of the two middle layers; the weights, Adam's moments and all sums are float32.
            queries: locations drawn new for each step, the same for every sample; None: all, at every step.
            seed: of that draw.
            distil: what has a loss: ``cls``, the token; ``grid``, the field, towards the teacher's grid; ``both``.
            rgb_weight: of the loss of the colours, which is added; 0: none.
            agree: weight of `apm.student.agreement`, which is added and of all locations (queries None); 0: none.
            view_cells: R, where the field's target are R cells of views; None: a grid at the student's own locations.
            device: where.
        """
        self.config, self.batch, self.tolerance = config, batch, tolerance
        self.device = torch.device(device)
        self.queries, self.seed = queries, seed
        self.distil, self.rgb_weight, self.view_cells, self.texts = distil, rgb_weight, view_cells, texts
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        trained = {n: value for n, value in initial.items() if rgb_weight or not n.startswith("rgb_head.")}
        self.rows = AdamRows(trained, batch, lr=lr, dtype=dtype, device=self.device)
        self.weights, self.gradients, self._products = self.rows.weights, self.rows.gradients, self.rows.products
        self.frozen, self.updates = self.rows.frozen, self.rows.updates
        self._make_workspace(dtype)
        w, g = self.weights, self.gradients
        self.pooling: Pooling = QueryPooling(config, w, g) if config.readout == "query" else MeanPooling(w, g)
        self._token_loss = TokenLoss(loss, batch, config.dim, temperature=temperature, texts=texts, device=self.device)
        self.target, self.cosine = self._token_loss.target, self._token_loss.cosine
        self._field_losses: FieldLosses | None = None
        if distil != "cls" or rgb_weight or agree:
            self._field_losses = FieldLosses(
                config, w, g, self._axis, distil=distil, rgb_weight=rgb_weight, agree=agree, view_cells=view_cells
            )
        self._graph: torch.cuda.CUDAGraph | None = None
        self.reset()

    def _make_workspace(self, dtype: torch.dtype) -> None:
        config, batch, grid, device = self.config, self.batch, self.config.grid, self.device
        first, second, third = config.hidden
        self._half = dtype != torch.float32

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(batch, *shape, dtype=dtype, device=device)

        self.patches = buffer(3 * config.patch_size**2, config.cells)
        self.column = buffer(1, config.cells)
        self.token, self.loss = buffer(config.dim), buffer()
        self.finite = torch.ones(batch, dtype=torch.bool, device=device)

        self._axis = axis_code(torch.arange(grid), config.position_dim // 2).to(device).expand(batch, -1, -1)
        self._sums, self._d_sums = buffer(first, 2 * grid), buffer(2 * grid, first)
        count = config.cells
        self._h1, self._d1 = buffer(count, first, dtype=dtype), buffer(count, first, dtype=dtype)
        self._h2, self._d2 = buffer(count, second, dtype=dtype), buffer(count, second, dtype=dtype)
        self._h3, self._d3 = buffer(count, third), buffer(count, third)
        if self._half:
            self._sums_half, self._d_sums_half = (
                buffer(first, 2 * grid, dtype=dtype),
                buffer(2 * grid, first, dtype=dtype),
            )
            self._h3_half, self._d3_half = buffer(count, third, dtype=dtype), buffer(count, third, dtype=dtype)
            on_cpu = self.device.type == "cpu"
            self._turned = torch.zeros(count * max(config.hidden) if on_cpu else 0, dtype=dtype, device=device)
        else:
            self._sums_half, self._d_sums_half = self._sums, self._d_sums
            self._h3_half, self._d3_half = self._h3, self._d3

        rows, cols = grid_locations(grid)
        selector = torch.cat((F.one_hot(rows, grid), F.one_hot(cols, grid)), dim=1).T  # (2 * grid, N)
        has_code = config.readout == "query"  # the mean needs none, and then the width may be any
        positions = position_code(rows, cols, config.dim) if has_code else torch.zeros(count, config.dim)
        self._all = Locations(
            selector.to(device, dtype).contiguous(),
            positions.to(device),
            exact_selector=selector.to(device, torch.float32).contiguous() if self.rgb_weight else None,
            grid=buffer(count, config.dim) if self.distil != "cls" and self.view_cells is None else None,
            colours=buffer(count, 3) if self.rgb_weight else None,
            guide=buffer(count, WIDTH, dtype=dtype) if config.guide == "rgb" else None,
        )
        self._guide: Tensor | None = None
        self._read = self._all if self.queries is None else self._all.like(self.queries)

    @torch.no_grad()
    def load(
        self, images: Tensor, targets: Tensor, grids: Tensor | Cells | None = None, text: Tensor | None = None
    ) -> None:
        """Take images (B, 3, S, S), targets (B, D) and, where they have a loss, grids (B, N, D) or `Cells`.

        B is the engine's. With the loss ``soft`` also text features (C, D), as long as the logit scale.
        """
        patch = self.config.patch_size
        self.patches.copy_(F.unfold(images.to(self.device, torch.float32), kernel_size=patch, stride=patch))
        self._token_loss.load(targets, text)
        if isinstance(grids, Cells):
            assert self._field_losses is not None and self._field_losses.cells is not None
            self._field_losses.cells.load(grids)
        elif self._all.grid is not None and grids is not None:
            self._all.grid.copy_(grids)
        if self._all.guide is not None:
            self._guide = guide_of(images.to(self.device, torch.float32), self.config.grid)
            self._all.guide.copy_(colour_code(self._guide, *grid_locations(self.config.grid), self.config.grid))
        if self._all.colours is not None:
            self._all.colours.copy_(self.patches.unflatten(1, (3, patch**2)).mean(dim=2).mT)

    @torch.no_grad()
    def reset(self) -> None:
        """Put back everything that steps touch: weights, moments, step counts, flags. What was loaded stays."""
        self.rows.reset()
        self.finite.fill_(True)

    @torch.no_grad()
    def evaluate(self, *, everywhere: bool = True) -> None:
        """Forward pass: `token`, `loss` and `cosine` from all locations, or from those of the current step."""
        at = self._all if everywhere else self._read
        n, grid, batch = at.count, self.config.grid, self.batch
        w, half = self.weights, self.config.position_dim // 2
        kernel = w["column.filter.weight"].view(batch, 1, -1)
        product(kernel, self.patches, out=self.column)
        self.column += w["column.filter.bias"][:, None]  # (B, 1, N)

        by_column, by_x, by_y = w["mlp.layer1.weight"].split((self.config.cells, half, half), dim=2)
        shared = product(self.column, by_column.mT) + w["mlp.layer1.bias"][:, None]  # (B, 1, H1)
        product(by_y, self._axis.mT, out=self._sums[:, :, :grid])  # weights to the left: faster than the transpose
        product(by_x, self._axis.mT, out=self._sums[:, :, grid:])
        self._sums[:, :, :grid] += shared.mT  # every location lies in exactly one row
        self._halve(self._sums, self._sums_half)

        h1, h2, h3_half, h3 = self._h1[:, :n], self._h2[:, :n], self._h3_half[:, :n], self._h3[:, :n]
        product(at.selector.T.expand(batch, -1, -1), self._sums_half.mT, out=h1)
        if at.guide is not None:
            accumulate(at.guide, w["mlp.guide.weight"].to(h1.dtype).mT, out=h1)
        h1.relu_()
        affine(h1, self._products["mlp.layer2.weight"], self._products["mlp.layer2.bias"], out=h2).relu_()
        affine(h2, self._products["mlp.layer3.weight"], self._products["mlp.layer3.bias"], out=h3_half).relu_()
        self._halve(h3_half, h3)

        self.token.copy_(self.pooling.forward(h3, at.positions))
        self.loss.copy_(self._token_loss.forward(self.token))
        if self.distil == "grid":
            self.loss.zero_()
        if self._field_losses is not None:
            self.loss += self._field_losses.forward(h3, self.column, at)
        self.finite &= self.loss.isfinite() & self.token.isfinite().all(dim=1)

    @torch.no_grad()
    def backward(self, *, everywhere: bool = True) -> None:
        """Backward pass of the latest `evaluate` (with the same ``everywhere``, and once): fills `gradients`."""
        at = self._all if everywhere else self._read
        n, grid, batch = at.count, self.config.grid, self.batch
        w, g, half = self.weights, self.gradients, self.config.position_dim // 2
        h1, h2, h3 = self._h1[:, :n], self._h2[:, :n], self._h3[:, :n]
        d1, d2, d3_half, d3 = self._d1[:, :n], self._d2[:, :n], self._d3_half[:, :n], self._d3[:, :n]

        if self.distil == "grid":
            for nothing in (d3, g["mlp.head.weight"], g["mlp.head.bias"]):
                nothing.zero_()
        else:
            self.pooling.backward(self._token_loss.backward(self.token), out=d3)
        coloured = None
        if self._field_losses is not None:
            coloured = self._field_losses.backward(h3, self.column, at, out=d3)
        relu_backward(d3, h3)
        self._halve(d3, d3_half)
        torch.sum(d3, dim=1, out=g["mlp.layer3.bias"])
        self._weight_gradient(d3_half, h2, g["mlp.layer3.weight"])
        product(d3_half, self._products["mlp.layer3.weight"], out=d2)
        relu_backward(d2, h2)
        torch.sum(d2, dim=1, dtype=torch.float32, out=g["mlp.layer2.bias"])
        self._weight_gradient(d2, h1, g["mlp.layer2.weight"])
        product(d2, self._products["mlp.layer2.weight"], out=d1)
        relu_backward(d1, h1)
        if at.guide is not None:
            self._weight_gradient(d1, at.guide, g["mlp.guide.weight"])

        product(at.selector.expand(batch, -1, -1), d1, out=self._d_sums_half)
        self._halve(self._d_sums_half, self._d_sums)
        by_column, *_ = w["mlp.layer1.weight"].split((self.config.cells, half, half), dim=2)
        d_by_column, d_by_x, d_by_y = g["mlp.layer1.weight"].split((self.config.cells, half, half), dim=2)
        product(self._d_sums[:, :grid].mT, self._axis, out=d_by_y)
        product(self._d_sums[:, grid:].mT, self._axis, out=d_by_x)
        d_shared = self._d_sums[:, :grid].sum(dim=1, keepdim=True)  # (B, 1, H1)
        g["mlp.layer1.bias"].copy_(d_shared[:, 0])
        torch.mul(d_shared.mT, self.column, out=d_by_column)

        d_column = product(d_shared, by_column)  # (B, 1, N)
        if coloured is not None:
            d_column += coloured
        product(d_column, self.patches.mT, out=g["column.filter.weight"].view(batch, 1, -1))
        torch.sum(d_column, dim=2, out=g["column.filter.bias"])

    def update(self) -> None:
        """One Adam step, by `gradients`, of every sample that is not frozen."""
        self.rows.update()

    @torch.no_grad()
    def step(self) -> None:
        """Evaluate, decide who is frozen, go back, update."""
        self.evaluate(everywhere=False)
        stop = ~self.finite if self.tolerance is None else ~self.finite | (self.loss <= self.tolerance)
        self.frozen.logical_or_(stop)
        self.backward(everywhere=False)
        self.update()

    def advance(self) -> None:
        """One `step`, on a GPU as the replay of a captured graph."""
        if self.device.type != "cuda":
            self.step()
            return
        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()

    @torch.no_grad()
    def run(self, steps: int, *, record_tokens: bool = False, snapshots: Collection[int] = ()) -> History:
        """Make up to ``steps`` steps from the state as it is, then evaluate once more from all locations.

        A frozen sample's losses and cosines stay at their last value to the end of its row.

        Args:
            steps: K.
            record_tokens: whether to keep the token before each step, and the last.
            snapshots: numbers of steps, 0 to K, after which to keep the field, read in float32.
        """
        losses, cosines = (torch.zeros(self.batch, steps, device=self.device) for _ in range(2))
        shape = (self.batch, steps + 1, self.config.dim)
        tokens = torch.zeros(shape, device=self.device) if record_tokens else None
        drawn = self._draw(steps)
        # On a CPU the look at `frozen` is free; on a GPU it makes the host wait, so only where it can save steps
        may_stop = self.tolerance is not None or self.device.type == "cpu"
        fields: dict[int, Tensor] = {}
        for k in range(steps):
            if k in snapshots:
                self.evaluate()
                fields[k] = self._field()
            if drawn is not None:
                self._read.take(self._all, drawn[k])
            self.advance()
            losses[:, k], cosines[:, k] = self.loss, self.cosine
            if tokens is not None:
                tokens[:, k] = self.token
            if may_stop and bool(self.frozen.all()):
                losses[:, k:], cosines[:, k:] = self.loss[:, None], self.cosine[:, None]
                if tokens is not None:
                    tokens[:, k:] = self.token[:, None]
                break
        self.evaluate()
        if tokens is not None:
            tokens[:, -1] = self.token
        last = sorted(set(snapshots) - set(fields))  # where all samples had stopped, nothing has changed since
        fields.update((k, self._field()) for k in last)
        return History(losses, cosines, tokens, fields)

    def _field(self) -> Tensor:
        """Field (B, N, D) at all locations, of the weights and the column of the latest `evaluate`.

        In float32 whatever the steps are in: one target for all locations makes a field that is nearly constant, and
        bfloat16 would round its smooth gradient into stripes.
        """
        return self.fold(self.batch).features(*grid_locations(self.config.grid))

    def fold(self, count: int) -> SavedField:
        """Copy what the first ``count`` samples need to tell features later: columns, weights of the coordinate MLP."""
        kept = {name: value[:count].clone() for name, value in self.weights.items() if name.startswith("mlp.")}
        query = self.pooling.key[:count].clone() if isinstance(self.pooling, QueryPooling) else None
        guide = None if self._guide is None else self._guide[:count].clone()
        return SavedField(self.column[:count, 0].clone(), kept, self.config.position_dim, query, guide)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Record one step as a CUDA graph: all that it reads and writes are this engine's own buffers."""
        frozen = self.frozen.clone()
        self.frozen.fill_(1)  # so that the warm-up changes no state
        # One stream of this engine's own GPU for both: torch's default stream for captures may belong to another GPU,
        # and what runs on this one would then be missing from the graph
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # libraries choose kernels and take workspaces before the capture, not in it
                for _ in range(3):
                    self.step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # thread_local: another thread may meanwhile decode images or run the teacher on this GPU
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                self.step()
        self.frozen.copy_(frozen)
        return graph

    def _weight_gradient(self, d_output: Tensor, inputs: Tensor, out: Tensor) -> None:
        """Write d_output' inputs, (B, n, m)' (B, n, k) -> (B, m, k), straight into what Adam reads."""
        if not self._half:
            product(d_output.mT, inputs, out=out)
        elif self.device.type == "cuda":
            torch.bmm(d_output.mT, inputs, out_dtype=torch.float32, out=out)
        else:
            for d, x, o in zip(d_output, inputs, out, strict=True):
                # A CPU's bfloat16 kernels take up to twice as long with a transposed left factor
                left = self._turned[: d.numel()].view(d.T.shape).copy_(d.T)
                if o.dtype == left.dtype:
                    torch.mm(left, x, out=o)
                else:
                    o.copy_(left @ x)

    def _halve(self, source: Tensor, target: Tensor) -> None:
        """Convert between a float32 buffer and its bfloat16 twin; nothing to do where they are one."""
        if self._half:
            target.copy_(source)

    def _draw(self, steps: int) -> Tensor | None:
        """Locations of each step (K, Q): from the seed and the step alone, so alike for every sample and batch."""
        if self.queries is None:
            return None
        generator = np.random.Generator(np.random.PCG64(self.seed))
        drawn = [generator.permutation(self.config.cells)[: self.queries] for _ in range(steps)]
        return torch.from_numpy(np.stack(drawn)).to(self.device)
