"""Baselines between two layers of a teacher that need no network: a linear map, or nothing at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from apm.pretrain.loop import parts
from apm.pretrain.stand_in import map_of
from apm.teachers.cut_towers import Shape

Pairs = Callable[[NDArray[np.int64]], tuple[Tensor, Tensor]]
"""Numbers of images → what is given at each place (B, T, K), and the tokens wanted (B, T, C)."""
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Candidates for the ridge penalty, as a share of the inputs' mean variance."""
_BATCH = 32


class Linear:
    """Ridge regression from what is given at a place to the token there, one map for all places."""

    def __init__(self, pairs: Pairs, train: NDArray[np.int64]) -> None:
        """Fit.

        Args:
            pairs: gives inputs and tokens.
            train: numbers of the images to fit on; a tenth of them chooses the penalty.
        """
        order = np.random.default_rng(0).permutation(train)
        tuned, fitted = order[: len(train) // 10 + 1], order[len(train) // 10 + 1 :]
        one, other = self._moments(pairs, tuned), self._moments(pairs, fitted)
        errors = {penalty: self._error(self._solved(other, penalty), one) for penalty in PENALTIES}
        self.penalty = min(errors, key=lambda penalty: errors[penalty])
        both = [a + b for a, b in zip(one, other, strict=True)]
        self.weights = self._solved(both, self.penalty).float()  # (K + 1, C), the last row is added

    def __call__(self, given: Tensor) -> Tensor:
        """Tokens (B, T, C) of what is given at each place (B, T, K)."""
        return given @ self.weights[:-1] + self.weights[-1]

    @staticmethod
    def _moments(pairs: Pairs, numbers: NDArray[np.int64]) -> list[Tensor]:
        """Second moments of inputs with a 1 behind them (K + 1, K + 1), with the tokens (K + 1, C), of the tokens."""
        found: list[Tensor] = []
        for part in parts(np.sort(numbers), _BATCH):
            given, wanted = (some.flatten(0, 1) for some in pairs(part))
            x = functional.pad(given, (0, 1), value=1.0)
            terms = [(x.T @ x).double(), (x.T @ wanted).double(), wanted.double().square().sum()]
            found = [a + b for a, b in zip(found, terms, strict=True)] if found else terms
        return found

    @staticmethod
    def _solved(moments: Sequence[Tensor], penalty: float) -> Tensor:
        """Weights (K + 1, C); the 1 has no penalty."""
        square, cross, _ = moments
        count = square[-1, -1]
        variance = (square.diagonal()[:-1] / count - (square[-1, :-1] / count).square()).mean()
        size = torch.full((len(square),), float(penalty * count * variance), dtype=torch.float64)
        size[-1] = 0
        return torch.linalg.solve(square + size.diag(), cross)

    @staticmethod
    def _error(weights: Tensor, moments: Sequence[Tensor]) -> float:
        square, cross, total = moments
        return float(total - 2 * (weights * cross).sum() + (weights * (square @ weights)).sum())


def skipped(given: Tensor, first: Shape, last: Shape) -> Tensor:
    """Tokens (B, T', C') as if they were a later layer's: pooled to its places, with zeros for further numbers.

    Narrower they cannot become.
    """
    maps = functional.adaptive_avg_pool2d(map_of(given, first.side), last.side)
    own = (
        given[:, : last.prefix]
        if first.prefix == last.prefix
        else given.new_zeros(len(given), last.prefix, first.width)
    )
    return functional.pad(torch.cat((own, maps.flatten(2).mT), dim=1), (0, last.width - first.width))
