"""Softened targets of the token against the plain form and autograd: value, every gradient, steps, and their limits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apm.student import matmul as precision
from apm.student.config import APMConfig
from apm.student.engine import Engine
from apm.student.engine_token import TokenLoss
from tests.apm.student.test_engine import LR, apart, draw, idle_where_autograd_is, plain, random_config

SCALE = 20.0
"""Of the logits, and with it the rounding of the loss: about 20 times that of a token's direction."""

CASES = [(readout, labels, heat) for readout in ("query", "mean") for labels, heat in ((3, 1.0), (90, 0.5), (90, 4.0))]
every_case = pytest.mark.parametrize(("readout", "labels", "temperature"), CASES)


def draw_text(config: APMConfig, labels: int, scale: float = SCALE) -> Tensor:
    features = torch.randn(labels, config.dim, generator=torch.Generator().manual_seed(labels))
    return scale * F.normalize(features, dim=1)


def plain_loss(token: Tensor, target: Tensor, text: Tensor, temperature: float) -> Tensor:
    """As Hinton et al. 2015 write it, of one token (D,): torch's own divergence of softmaxes."""
    said, wanted = (F.normalize(one, dim=0) @ text.to(one).T / temperature for one in (token, target))
    divergence = F.kl_div(said.log_softmax(0), wanted.log_softmax(0), reduction="sum", log_target=True)
    return temperature**2 * divergence


def soft_engine(config: APMConfig, parameters: dict[str, Tensor], count: int, text: Tensor, heat: float) -> Engine:
    return Engine(config, parameters, batch=count, lr=LR, loss="soft", temperature=heat, texts=len(text))


@pytest.mark.parametrize("batched", [False, True], ids=["one-by-one", "batched"])
@pytest.mark.parametrize("count", [1, 3])
@every_case
def test_loss_and_every_gradient(
    readout: str, labels: int, temperature: float, count: int, batched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_one_by_one", lambda _: not batched)
    config = random_config(labels, readout)
    parameters, images, targets = draw(config, count)
    text = draw_text(config, labels)
    engine = soft_engine(config, parameters, count, text, temperature)
    engine.load(images, targets, text=text)
    engine.evaluate()
    engine.backward()
    for b in range(count):
        model = plain(config, parameters).double()  # so that all the rounding seen is the engine's
        target = targets[b].double()
        token = model(images[b : b + 1].double())[0]
        value = plain_loss(token, target, text, temperature)
        value.backward()
        assert value > 0.01  # else there would be nothing to compare
        assert float(engine.loss[b]) == pytest.approx(value.item(), rel=1e-5)
        assert float(engine.cosine[b]) == pytest.approx(torch.cosine_similarity(token, target, dim=0).item(), abs=2e-6)
        assert not idle_where_autograd_is(engine, model, b, within=2e-5)


@every_case
def test_twenty_steps(readout: str, labels: int, temperature: float) -> None:
    config = random_config(labels + 1, readout)
    parameters, images, targets = draw(config, 2)
    text = draw_text(config, labels)
    engine = soft_engine(config, parameters, 2, text, temperature)
    engine.load(images, targets, text=text)
    history = engine.run(20)
    for b in range(2):
        model = plain(config, parameters)
        adam = torch.optim.Adam(model.parameters(), lr=LR)
        for step in range(20):
            adam.zero_grad()
            value = plain_loss(model(images[b : b + 1])[0], targets[b], text, temperature)
            value.backward()
            adam.step()
            assert float(history.losses[b, step]) == pytest.approx(value.item(), rel=1e-3, abs=1e-6)
        with torch.no_grad():
            assert apart(engine.token[b], model(images[b : b + 1])[0]) < 1e-3
        assert history.losses[b, -1] < history.losses[b, 0]


def test_near_its_target_the_loss_is_no_rounding() -> None:
    """There a difference of two distributions has few digits left, and torch's own divergence turns negative."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(4, 32, generator=generator)
    text = draw_text(APMConfig(dim=32), 100)
    loss = TokenLoss("soft", 4, 32, texts=100)
    loss.load(target, text)
    assert torch.equal(loss.forward(target), torch.zeros(4))
    for distance in (1e-2, 1e-3, 1e-4):
        token = target + distance * torch.randn(4, 32, generator=generator)
        exact = torch.stack([plain_loss(a.double(), b.double(), text, 1.0) for a, b in zip(token, target, strict=True)])
        torch.testing.assert_close(loss.forward(token).double(), exact, rtol=1e-5 / distance, atol=0)


def test_what_is_surely_wrong_has_a_loss_and_a_gradient() -> None:
    """The probability of the token's label is 0 in the target, to float32, and the other way round."""
    text = 300 * torch.eye(3)
    loss = TokenLoss("soft", 1, 3, texts=3)
    loss.load(torch.tensor([[1.0, 0.0, 0.0]]), text)
    token = torch.tensor([[0.0, 1.0, 1e-3]])
    assert float(loss.forward(token)) == pytest.approx(300.0, rel=1e-5)
    gradient = loss.backward(token)[0]
    assert gradient.isfinite().all() and gradient[0] == pytest.approx(-300.0, rel=1e-3)
