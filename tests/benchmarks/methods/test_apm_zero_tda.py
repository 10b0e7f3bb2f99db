"""APM, ZERO and TDA by what they must do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from apm.benchmarks.methods import create_method
from apm.benchmarks.methods.tda import Cache
from apm.benchmarks.methods.zero import vote_logits, zero_votes
from apm.errors import UsageError
from apm.test_time.queries import FEWER
from apm.text.zeroshot import ZeroShotHead
from tests.benchmarks.methods.made import CLASSES, FEATURE_STREAMS, SMALL, make_batch, run_options
from tests.fakes import FakeTeacher

# --- APM --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_apm_gives_losses_and_its_token_turns_to_the_target() -> None:
    batch = make_batch(2)
    answer = create_method("apm:steps=40,lr=0.001", SMALL).predict(batch)
    assert answer.extras["steps"].tolist() == [40, 40]
    assert (answer.extras["cosine"] > 0.9).all()
    assert torch.isfinite(answer.extras["loss"]).all()
    assert answer.step_logits is None
    torch.testing.assert_close(answer.logits, batch.head.logits(batch.tokens()), atol=8, rtol=0)


def test_apm_records_steps_and_the_last_is_the_answer() -> None:
    batch = make_batch(2)
    answer = create_method("apm", run_options({"record_steps": True}, preset="small", steps=3)).predict(batch)
    assert answer.step_logits is not None
    assert answer.step_logits.shape == (2, 4, len(CLASSES))
    torch.testing.assert_close(answer.step_logits[:, -1], answer.logits)
    assert not torch.allclose(answer.step_logits[:, 0], answer.logits, atol=1e-4)


@pytest.mark.slow
def test_apm_is_overfit_to_the_target_that_is_asked_for() -> None:
    batch = make_batch(2)
    spread = (batch.views(8)[:, 0] - batch.views(8).mean(1)).norm(dim=1)
    assert (spread > 0.1).all()
    cls = create_method("apm:steps=60,lr=0.001", SMALL).predict(batch)
    mean = create_method("apm:target=mean,steps=60,lr=0.001", SMALL).predict(batch)
    target = normalize(normalize(batch.views(8), dim=2).mean(1), dim=1)
    to_mean = (mean.logits - batch.head.logits(target)).norm(dim=1)
    assert (to_mean < (cls.logits - batch.head.logits(target)).norm(dim=1)).all()


def test_a_student_whose_loss_is_not_finite_has_no_answer() -> None:
    batch = make_batch(2)
    tokens = batch.tokens().clone()
    tokens[1, 0] = torch.inf
    batch._tokens = tokens
    answer = create_method("apm", SMALL).predict(batch)
    assert torch.isfinite(answer.logits[0]).all()
    assert answer.logits[1].isnan().all()


# --- ZERO -------------------------------------------------------------------------------------------------------------


def views_voting(*choices: tuple[int, float]) -> Tensor:
    """Probabilities over four classes: each view's class and how sure it is of it."""
    rows = torch.tensor([[(1 - sure) / 3] * 4 for _, sure in choices])
    for row, (choice, sure) in zip(rows, choices, strict=True):
        row[choice] = sure
    return rows


def test_confident_views_vote() -> None:
    views = views_voting((0, 0.4), (1, 0.9), (1, 0.8), (2, 0.85), (0, 0.5), (0, 0.45))
    assert zero_votes(views, 0.5).tolist() == [0, 2, 1, 0]


def test_a_tie_goes_to_the_most_confident_of_the_remaining_views() -> None:
    # Classes 1 and 2 have a vote each. The surest remaining view is for 3, which is not tied; the next for 2.
    views = views_voting((1, 0.95), (2, 0.9), (1, 0.5), (3, 0.8), (2, 0.7), (0, 0.4))
    assert zero_votes(views, 0.34).tolist() == [0, 1, 2, 0]
    assert zero_votes(views[[5, 2, 0, 3, 1, 4]], 0.34).tolist() == [0, 1, 2, 0]


def test_a_tie_that_no_remaining_view_breaks_goes_by_the_most_confident_view() -> None:
    views = views_voting((2, 0.9), (1, 0.95), (3, 0.5))
    assert zero_votes(views, 0.67).tolist() == [0, 2, 1, 0]


def test_votes_as_logits_keep_the_winner_and_the_shares() -> None:
    views = views_voting((1, 0.95), (1, 0.9), (0, 0.9), (3, 0.5), (3, 0.4))
    votes = torch.tensor([1.0, 2.0, 0.0, 0.0])
    logits = vote_logits(votes, views)
    torch.testing.assert_close(logits.exp().sum(), torch.tensor(1.0))
    torch.testing.assert_close(logits.softmax(0), (votes + views.mean(0)) / 4)
    assert logits.argsort(descending=True).tolist() == [1, 0, 3, 2]


# --- TDA --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEATURE_STREAMS)
def test_a_stream_method_depends_on_the_order_and_forgets_on_reset(name: str) -> None:
    teacher = FakeTeacher(dim=16)
    method: Any = create_method(name, SMALL)
    forward = method.predict(make_batch(12, teacher, stream_length=12)).logits
    method.reset()
    assert torch.equal(method.predict(make_batch(12, teacher, stream_length=12)).logits, forward)
    method.reset()
    turned = make_batch(12, teacher, order=list(range(11, -1, -1)), stream_length=12)
    backward = method.predict(turned).logits.flip(0)
    assert not torch.allclose(backward, forward, atol=1e-3)
    method.reset()
    parts = (make_batch(12, teacher, order=part, stream_length=12) for part in ([0, 1, 2, 3, 4], [*range(5, 12)]))
    split = [method.predict(part).logits for part in parts]
    torch.testing.assert_close(torch.cat(split), forward, rtol=1e-5, atol=1e-5)


def test_the_cache_keeps_the_most_confident_of_each_class() -> None:
    cache = Cache(3, shots=2, beta=5.0)
    axis = torch.eye(2)
    assert torch.equal(cache.logits(axis[0]), torch.zeros(3))
    value = torch.tensor([0, 2])
    cache.update(0, 0.9, axis[0], value)
    cache.update(0, 0.5, axis[1], value)
    cache.update(0, 0.7, axis[1], value)  # takes the place of 0.9
    cache.update(0, 0.8, axis[0], value)  # more uncertain than both that are kept
    expected = 2 * torch.exp(torch.tensor(-5.0))
    torch.testing.assert_close(cache.logits(axis[0]), torch.stack([expected, expected * 0, expected]))
    torch.testing.assert_close(cache.logits(axis[1]), torch.tensor([2.0, 0.0, 2.0]))


def test_tda_by_hand_on_one_image() -> None:
    features = normalize(torch.tensor([[2.0, 1.0], [0.0, 1.0], [-1.0, 0.2]]), dim=1)
    head = ZeroShotHead(labels=("a", "b", "c"), features=features, logit_scale=2.0)
    token = torch.tensor([[3.0, 3.0]])
    batch: Any = SimpleNamespace(head=head, tokens=lambda: token)
    logits = head.logits(token)[0]
    probabilities = logits.softmax(0)
    share = float(-(probabilities * probabilities.log()).sum()) / np.log2(3)
    assert 0.2 < share < 0.5
    expected = logits + 2 * torch.nn.functional.one_hot(logits.argmax(), 3) - 0.117 * (probabilities > 0.03).float()
    torch.testing.assert_close(create_method("tda").predict(batch).logits[0], expected)


def test_the_runs_number_of_locations_is_used_recorded_and_named() -> None:
    for options, spec, queries, name in (
        ({}, "apm", None, "apm"),
        ({"queries": 9}, "apm", 9, "apm[queries=9]"),
        ({"queries": 9}, "apm:queries=5", 5, "apm[queries=5]"),
        ({"queries": 9}, "apm:queries=all", None, "apm[queries=all]"),
        ({"queries": "auto", "preset": "paper"}, "apm", FEWER["paper"], f"apm[queries={FEWER['paper']}]"),
        ({"queries": "auto"}, "apm", None, "apm"),
        ({"queries": "auto"}, "apm:distil=both", None, "apm[both]"),
    ):
        method = create_method(spec, run_options(**{"preset": "small", "steps": 2, **options}))
        assert (method.settings["queries"], method.name) == (queries, name)
    few, every = (
        create_method("apm", run_options(preset="small", steps=2, queries=queries)).predict(make_batch(1))
        for queries in (9, "all")
    )
    assert not torch.equal(few.logits, every.logits)
    with pytest.raises(UsageError, match='queries is "0"'):
        create_method("apm", run_options(queries=0))
