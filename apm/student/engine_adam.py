"""The parameters of the engine's B students, each a row of plain memory, and Adam's and the reset's passes over it."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from apm.student.engine_readout import Parameters

# Each parameter starts at a multiple of this many numbers, so that kernels meet the same alignment in every sample
ALIGNMENT = 64

# Numbers that a CPU converts from and to bfloat16 at a time, while they are in its cache for Adam
SPAN = 2**18

# The parameters of the two middle layers come first in a row: what their products read and write is then one span
MIDDLE = ("mlp.layer2.weight", "mlp.layer3.weight", "mlp.layer2.bias", "mlp.layer3.bias")


class AdamRows:
    """Weights, gradients and Adam's moments of B samples, P numbers each.

    Attributes:
        weights, gradients: name -> (B, *shape) views of the rows; float32, but for the gradients of the middle layers'
            weights where products are in bfloat16 on a CPU: it has no kernel with a wider output.
        products: what the products of the two middle layers read: name -> (B, *shape), the weights, or their copies in
            bfloat16.
        weight_rows, first_moment, second_moment: (B, P) float32.
        gradient_rows: the same, without the gradients in bfloat16.
        frozen: (B,) 1.0 where a sample takes no more steps, else 0.0.
        updates: (B,) float32, steps really made since the reset.
    """

    def __init__(self, initial: Parameters, batch: int, *, lr: float, dtype: torch.dtype, device: torch.device) -> None:
        """Lay all parameters of a sample into one row; `reset` comes before anything else.

        Args:
            initial: what every sample starts from and is reset to.
            batch: B.
            lr: Adam's learning rate.
            dtype: of the products of the two middle layers.
            device: where.
        """
        self.batch, self.lr, self.device = batch, lr, device
        places: dict[str, tuple[int, int]] = {}
        end = 0
        for name in (*MIDDLE, *(name for name in initial if name not in MIDDLE)):
            places[name] = (end, initial[name].numel())
            end += -(-initial[name].numel() // ALIGNMENT) * ALIGNMENT
        half = dtype != torch.float32
        self._copied = min(start for name, (start, _) in places.items() if name not in MIDDLE) if half else 0
        self._narrow = places["mlp.layer2.bias"][0] if half and device.type == "cpu" else 0
        self._initial = torch.zeros(end, device=device)
        for name, (start, size) in places.items():
            self._initial[start : start + size] = initial[name].detach().flatten()
        self.weight_rows, self.first_moment, self.second_moment = (  # `reset` fills them
            torch.empty(batch, end, device=device) for _ in range(3)
        )
        self.gradient_rows = torch.zeros(batch, end - self._narrow, device=device)
        self._narrow_gradients = torch.zeros(batch, self._narrow, dtype=dtype, device=device)
        self._wide = torch.zeros(min(SPAN, self._narrow), device=device)
        self.frozen, self.updates = (torch.zeros(batch, device=device) for _ in range(2))

        def views(rows: Tensor, offset: int = 0) -> Parameters:
            """What of the parameters lies in these rows, which begin at `offset`."""
            return {
                name: rows[:, start - offset : start - offset + size].view(-1, *initial[name].shape)
                for name, (start, size) in places.items()
                if offset <= start < offset + rows.shape[1]
            }

        self.weights = views(self.weight_rows)
        self.gradients = {**views(self._narrow_gradients), **views(self.gradient_rows, self._narrow)}
        self._copies = torch.empty(batch, self._copied, dtype=dtype, device=device)
        self.products = views(self._copies) if half else self.weights

    @torch.no_grad()
    def reset(self) -> None:
        """Put back everything that steps touch."""
        self.weight_rows.copy_(self._initial)
        self.first_moment.zero_()
        self.second_moment.zero_()
        self.updates.zero_()
        self.frozen.zero_()
        self._copies.copy_(self.weight_rows[:, : self._copied])

    @torch.no_grad()
    def update(self) -> None:
        """One Adam step of every sample that is not frozen: one pass over its memory, with its own step count.

        Gradients in bfloat16 are widened, and the bfloat16 copies of the weights made, in the same pass.
        """
        self.updates += 1 - self.frozen
        for row in range(self.batch):
            for span in self._spans():
                torch._fused_adam_(
                    [self.weight_rows[row, span]],
                    [self._gradient(row, span)],
                    [self.first_moment[row, span]],
                    [self.second_moment[row, span]],
                    [],
                    [self.updates[row]],
                    # the fused kernel's own way to leave a row as it is, without asking the host
                    found_inf=self.frozen[row],
                    amsgrad=False,
                    beta1=0.9,
                    beta2=0.999,
                    lr=self.lr,
                    weight_decay=0.0,
                    eps=1e-8,
                    maximize=False,
                )
                if span.stop <= self._copied:
                    self._copies[row, span].copy_(self.weight_rows[row, span])

    def _gradient(self, row: int, span: slice) -> Tensor:
        """What of a sample's gradient belongs to a span of its row, in float32."""
        if span.stop <= self._narrow:
            return self._wide[: span.stop - span.start].copy_(self._narrow_gradients[row, span])
        return self.gradient_rows[row, span.start - self._narrow : span.stop - self._narrow]

    def _spans(self) -> Iterator[slice]:
        """Spans that make up a sample's row of parameters: first those with bfloat16 gradients, then those with copies.

        A CPU's are short where there is something to convert; a GPU has no such cache, and few launches are better.
        """
        ends = (0, self._narrow, self._copied, self.weight_rows.shape[1])
        for start, stop in pairwise(ends):
            length = SPAN if self.device.type == "cpu" and stop <= self._copied else stop
            yield from (slice(at, min(at + length, stop)) for at in range(start, stop, max(1, length)))
