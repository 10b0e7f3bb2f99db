"""The parameters of the engine's B students, each a row of plain memory, and Adam's and the reset's passes over it."""

from collections.abc import Iterator

import torch
from torch import Tensor

from apm.student.engine_readout import Parameters

# Each parameter starts at a multiple of this many numbers, so that kernels meet the same alignment in every sample
ALIGNMENT = 64

# Numbers that a CPU converts from or to bfloat16 at a time, while they are still in its cache from the work before
SPAN = 2**19


class AdamRows:
    """Weights, gradients and Adam's moments of B samples, P numbers each.

    Attributes:
        weights, gradients: name -> (B, *shape) views of the rows; float32.
        products: what the products of the two middle layers read: name -> (B, *shape), the weights, or their copies in
            bfloat16.
        weight_rows, gradient_rows, first_moment, second_moment: (B, P) float32.
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
        for name, value in initial.items():
            places[name] = (end, value.numel())
            end += -(-value.numel() // ALIGNMENT) * ALIGNMENT
        self._initial = torch.zeros(end, device=device)
        for name, (start, size) in places.items():
            self._initial[start : start + size] = initial[name].detach().flatten()
        self.weight_rows, self.first_moment, self.second_moment = (  # `reset` fills them
            torch.empty(batch, end, device=device) for _ in range(3)
        )
        self.gradient_rows = torch.zeros(batch, end, device=device)
        self.frozen, self.updates = (torch.zeros(batch, device=device) for _ in range(2))

        def views(rows: Tensor, offset: int = 0) -> Parameters:
            """What of the parameters lies in these rows, which begin at `offset`."""
            return {
                name: rows[:, start - offset : start - offset + size].view(-1, *initial[name].shape)
                for name, (start, size) in places.items()
                if offset <= start < offset + rows.shape[1]
            }

        self.weights, self.gradients = views(self.weight_rows), views(self.gradient_rows)
        # the two middle layers lie side by side: one span to copy when their products are in bfloat16
        self._middle = slice(places["mlp.layer2.weight"][0], places["mlp.head.weight"][0])
        self._middle_half: Tensor | None = None
        self.products = self.weights
        if dtype != torch.float32:
            width = self._middle.stop - self._middle.start
            self._middle_half = torch.empty(batch, width, dtype=dtype, device=device)
            self.products = views(self._middle_half, self._middle.start)

    @torch.no_grad()
    def reset(self) -> None:
        """Put back everything that steps touch."""
        self.weight_rows.copy_(self._initial)
        self.first_moment.zero_()
        self.second_moment.zero_()
        self.updates.zero_()
        self.frozen.zero_()
        if self._middle_half is not None:
            self._middle_half.copy_(self.weight_rows[:, self._middle])

    @torch.no_grad()
    def update(self) -> None:
        """One Adam step of every sample that is not frozen: one pass over its memory, with its own step count.

        The bfloat16 copies of the weights are made in the same pass.
        """
        self.updates += 1 - self.frozen
        for row in range(self.batch):
            for span, halves in self._spans():
                torch._fused_adam_(
                    [self.weight_rows[row, span]],
                    [self.gradient_rows[row, span]],
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
                if self._middle_half is not None and halves is not None:
                    self._middle_half[row, halves].copy_(self.weight_rows[row, span])

    def _spans(self) -> Iterator[tuple[slice, slice | None]]:
        """Spans that make up a sample's row of parameters, each with its place among the bfloat16 copies, if any."""
        start, stop, end = self._middle.start, self._middle.stop, self.weight_rows.shape[1]
        if self._middle_half is None:
            yield slice(0, end), None
            return
        length = SPAN if self.device.type == "cpu" else stop - start  # a GPU has no such cache: few launches
        yield slice(0, start), None
        for at in range(start, stop, length):
            to = min(at + length, stop)
            yield slice(at, to), slice(at - start, to - start)
        yield slice(stop, end), None
