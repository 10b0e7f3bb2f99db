"""What stream methods keep up to date is what a computation from all of their entries gives."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from apm.benchmarks.methods import dota
from apm.benchmarks.methods.dmn import DynamicMemory
from apm.benchmarks.methods.oga import CachedGaussians, pseudo_inverse

GENERATOR = torch.Generator()


def unit(*shape: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(*shape, generator=GENERATOR.manual_seed(seed)), dim=-1)


def test_dmn_s_cosines_are_those_of_the_weighted_sums() -> None:
    text, stream = unit(4, 16, seed=0), unit(80, 16, seed=1)
    memory = DynamicMemory(text, 3, 5.5)
    kept: list[list[tuple[float, torch.Tensor]]] = [[] for _ in text]
    for number, feature in enumerate(stream):
        owner, entropy = number * number % 4, float(number * 7 % 13)
        memory.update(owner, entropy, feature)
        mine = kept[owner]
        if len(mine) < 3:
            mine.append((entropy, feature))
        elif entropy < max(mine, key=lambda entry: entry[0])[0]:
            mine[mine.index(max(mine, key=lambda entry: entry[0]))] = entropy, feature
        asked = unit(16, seed=100 + number)
        expected = []
        for own, entries in zip(text, kept, strict=True):
            keys = torch.stack([own, *(key for _, key in entries)])
            total = (torch.exp(-5.5 * (1 - keys @ asked)).unsqueeze(1) * keys).sum(dim=0)
            expected.append(total @ asked / total.norm())
        torch.testing.assert_close(memory.cosines(asked), torch.stack(expected), rtol=1e-5, atol=1e-6)
    assert [len(row) for row in memory.entropies] == [3, 3, 0, 0]  # squares are 0 or 1 modulo 4


def test_oga_answers_where_all_entries_are_the_same() -> None:
    """Three times one image: its entries do not vary, and a matrix of zeros has no inverse."""
    feature = torch.eye(4)[:1]
    state = CachedGaussians(unit(2, 4, seed=2), shots=3)
    for sure in (5.0, 6.0, 7.0):
        state.update(feature, torch.tensor([[sure, 0.0]]).softmax(dim=1))
    assert state.counts.tolist() == [3, 0] and state.log_likelihood(feature).isfinite().all()


def test_oga_s_precision_is_that_of_all_entries() -> None:
    dim, shots = 4, 8
    text, stream = unit(5, dim, seed=2), unit(400, dim, seed=3)
    state = CachedGaussians(text, shots)
    for number, feature in enumerate(stream):
        probabilities = torch.softmax(torch.randn(1, 5, generator=GENERATOR.manual_seed(number)) * 3, dim=1)
        state.update(feature.unsqueeze(0), probabilities)
        if int(state.counts.max()) <= 2:
            continue
        entries = [state._kept[owner][state._filled[owner]] for owner in range(5)]
        means = [part.sum(dim=0) / shots if len(part) >= 2 else text[k] for k, part in enumerate(entries)]
        centred = torch.cat([part - mean for part, mean in zip(entries, means, strict=True)]).double()
        centred = centred - centred.mean(dim=0)
        n, scatter = len(centred), centred.T @ centred
        if n > 4 * dim:
            expected = torch.linalg.pinv(scatter / (n - 1))
        else:
            expected = dim * torch.linalg.pinv(scatter + scatter.trace() / (n - 1) * torch.eye(dim))
        torch.testing.assert_close(
            state.precision.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
        )
    assert n == 5 * shots and not math.isnan(float(state.precision.sum()))


def test_the_pseudo_inverse_is_torch_s_with_and_without_rank() -> None:
    for rank in (8, 5):
        factor = torch.randn(8, rank, generator=GENERATOR.manual_seed(rank))
        matrix = factor @ factor.T
        expected = torch.linalg.pinv(matrix, hermitian=True)
        torch.testing.assert_close(pseudo_inverse(matrix), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_dota_s_sum_of_covariances_is_that_of_all_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dota, "RENEWAL", 30)
    text, stream = unit(5, 8, seed=4), unit(80, 8, seed=5)
    state = dota.ClassGaussians(text, dota.DOTASettings())
    for number, feature in enumerate(stream):
        probabilities = torch.softmax(torch.randn(1, 5, generator=GENERATOR.manual_seed(number)) * 3, dim=1)
        state.fit(feature.unsqueeze(0), probabilities)
        torch.testing.assert_close(state.covariance_sum, state.covariances.sum(dim=0), rtol=1e-5, atol=1e-6)
        if number == 10:
            state.covariance_sum += 1  # as rounding might, in a long stream
            for later, one in enumerate(stream[:20]):
                state.fit(one.unsqueeze(0), torch.full((1, 5), 0.2))
                drifted = (state.covariance_sum - state.covariances.sum(dim=0)).abs().max() > 0.5
                assert drifted == (later < 18)  # the 30th image in all makes it anew
        mixed = state.covariances.mean(dim=0) * (1 - 1e-3) + 1e-3 * torch.eye(8)
        means, asked = state.means, unit(8, seed=200 + number)
        quadratic = (means * torch.linalg.solve(mixed, means.T).T).sum(dim=1)
        expected = means @ torch.linalg.solve(mixed, asked) - 0.5 * quadratic
        torch.testing.assert_close(state.discriminant(asked), expected, rtol=1e-4, atol=1e-4)
