"""Targets made of many views: what each kind is, that all are as long as the CLS token, and what is refused."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from apm.errors import UsageError
from apm.test_time import mean_shift as mta
from apm.test_time import targets, views
from apm.test_time.mean_shift import bandwidths, mean_shift_mode
from apm.test_time.targets import TARGETS, TargetPolicy, aggregate, entropies
from apm.text.zeroshot import ZeroShotHead


@pytest.fixture
def head() -> ZeroShotHead:
    generator = torch.Generator().manual_seed(0)
    features = normalize(torch.randn(5, 12, generator=generator), dim=1)
    return ZeroShotHead(labels=tuple("abcde"), features=features, logit_scale=20.0)


@pytest.fixture
def features() -> Tensor:
    """Views of lengths between 1 and 11 about one direction."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(12, generator=generator) + 0.7 * torch.randn(20, 12, generator=generator)
    return directions * (1 + 10 * torch.rand(20, 1, generator=generator))


def test_cls_is_the_token_bit_for_bit(features: Tensor, head: ZeroShotHead) -> None:
    assert torch.equal(aggregate("cls", features, head), features[0])


@pytest.mark.parametrize("name", [*TARGETS])
def test_every_target_is_as_long_as_the_token(name: str, features: Tensor, head: ZeroShotHead) -> None:
    torch.testing.assert_close(aggregate(name, features, head).norm(), features[0].norm(), rtol=1e-5, atol=0)


def test_mean_is_that_of_directions(features: Tensor, head: ZeroShotHead) -> None:
    expected = normalize(features / features.norm(dim=1, keepdim=True), dim=1).sum(0)
    torch.testing.assert_close(normalize(aggregate("mean", features, head), dim=0), normalize(expected, dim=0))
    stretched = torch.cat([features[:1], features[1:] * 5])
    torch.testing.assert_close(aggregate("mean", stretched, head), aggregate("mean", features, head))


def test_confident_averages_the_views_of_lowest_entropy(features: Tensor, head: ZeroShotHead) -> None:
    probabilities = (20 * normalize(features, dim=1) @ head.features.T).softmax(1)
    order = sorted(range(20), key=lambda view: float(-(probabilities[view] * probabilities[view].log()).sum()))
    expected = normalize(normalize(features[order[:6]], dim=1).mean(0), dim=0)  # 30 % of 20
    torch.testing.assert_close(normalize(aggregate("confident", features, head), dim=0), expected)


def test_mta_is_the_mode(features: Tensor, head: ZeroShotHead) -> None:
    mode = mean_shift_mode(normalize(features, dim=1), head.probabilities(features))
    torch.testing.assert_close(normalize(aggregate("mta", features, head), dim=0), mode.vector)


def test_blend_moves_from_the_aggregate_to_the_token(features: Tensor, head: ZeroShotHead) -> None:
    blends = [aggregate(TargetPolicy(kind="mean", cls_weight=w), features, head) for w in (0.0, 0.5, 1.0)]
    torch.testing.assert_close(blends[0], aggregate("mean", features, head))
    torch.testing.assert_close(blends[2], features[0])
    middle = normalize(blends[0], dim=0) + normalize(blends[2], dim=0)
    torch.testing.assert_close(normalize(blends[1], dim=0), normalize(middle, dim=0))


@pytest.mark.parametrize("name", [*TARGETS])
def test_one_view_gives_the_token_back(name: str, features: Tensor, head: ZeroShotHead) -> None:
    torch.testing.assert_close(aggregate(name, features[:1], head), features[0])


def test_views_that_coincide_give_that_view(features: Tensor, head: ZeroShotHead) -> None:
    same = features[:1].expand(8, -1)
    for name in TARGETS:
        torch.testing.assert_close(aggregate(name, same, head), features[0])


def test_the_mode_ignores_an_outlier(head: ZeroShotHead) -> None:
    generator = torch.Generator().manual_seed(2)
    centre = torch.randn(12, generator=generator)
    inliers = normalize(centre + 0.1 * torch.randn(15, 12, generator=generator), dim=1)
    outliers = normalize(torch.randn(12, generator=generator) + 0.1 * torch.randn(5, 12, generator=generator), dim=1)
    together = torch.cat([inliers, outliers])
    mode = mean_shift_mode(together, head.probabilities(together))
    assert mode.inlierness[15:].sum() < 0.05
    torch.testing.assert_close(mode.inlierness.sum(), torch.tensor(1.0))
    cosine = mode.vector @ normalize(inliers.mean(0), dim=0)
    assert cosine > 0.98
    assert cosine > normalize(together.mean(0), dim=0) @ normalize(inliers.mean(0), dim=0)


def test_bandwidths_by_hand() -> None:
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0], [1.0, 0.0]])
    # int(0.5 · 4) = 2 nearest of the others: squared distances 0 and 2 for the doubled point, 2 and 2 for the rest.
    expected = torch.tensor([(0 + 2) / 4, (2 + 2) / 4, (2 + 2) / 4, (2 + 2) / 4, (0 + 2) / 4]).sqrt()
    torch.testing.assert_close(bandwidths(points, 0.5), expected)


def test_entropy_of_certain_and_uniform_rows() -> None:
    rows = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    torch.testing.assert_close(entropies(rows), torch.tensor([0.0, 4.0]).log().clamp_min(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "meen"}, 'Did you mean "mean"'),
        ({"kind": "mean", "views": 0}, "0 views"),
        ({"kind": "mean", "min_area": 0.0}, "0.0"),
        ({"kind": "mean", "keep": 1.5}, "1.5"),
        ({"kind": "mean", "cls_weight": -0.1}, "-0.1"),
    ],
)
def test_impossible_policies_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TargetPolicy(**settings)  # type: ignore[arg-type]


def test_an_unknown_target_suggests_the_nearest(features: Tensor, head: ZeroShotHead) -> None:
    with pytest.raises(UsageError, match='Did you mean "confident"'):
        aggregate("confidence", features, head)


def test_nothing_here_takes_a_label() -> None:
    words = ("label", "labels", "target_class", "ground_truth", "truth", "y", "answer")
    for module in (targets, views, mta):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            found = set(inspect.signature(function).parameters) & set(words)
            assert not found, f"{module.__name__}.{name} takes {found}"
