"""TTT-MAE: against a plain loop of torch's optimiser, alone and side by side, and reset to the last bit."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from apm.errors import UsageError
from apm.mae.config import MAEConfig
from apm.mae.model import MaskedAutoencoder
from apm.mae.test_time import TestTimeAdapter, TestTimeSettings, mask_orders, tuned_names
from tests.apm.mae.test_model import SIZES, images, model_of, plain_error, plain_logits, weights_of

SETTINGS = TestTimeSettings(steps=3, masks=5, lr=0.05)


@pytest.fixture
def model() -> MaskedAutoencoder:
    return model_of().requires_grad_(False)


def plainly(model: MaskedAutoencoder, picture: Tensor, settings: TestTimeSettings) -> tuple[Tensor, list[float]]:
    """Answers before each step and after the last (K + 1, C), and losses, of one image.

    Everything but the decoder and fixed positions is handed to torch's own SGD; the loss is that of as many copies as
    there are masks, each by itself, and read off their weights patch by patch.
    """
    mine = copy.deepcopy(model).double().requires_grad_(True)
    tuned = [p for n, p in mine.named_parameters() if not n.startswith("decoder") and n != "encoder.pos_embed"]
    optimiser = torch.optim.SGD(tuned, lr=settings.lr, momentum=settings.momentum)
    answers, losses = [plain_logits(weights_of(mine), SIZES, picture.double())], []
    for step in range(settings.steps):
        optimiser.zero_grad()
        w: dict[str, Tensor] = dict(mine.named_parameters())
        orders = mask_orders(picture, 16, settings.masks, step)
        loss = torch.stack([plain_error(w, SIZES, picture.double(), order.tolist(), 4) for order in orders]).mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        answers.append(plain_logits(weights_of(mine), SIZES, picture.double()))
    return torch.stack(answers), losses


@pytest.mark.parametrize(("students", "chunk"), [(1, 128), (2, 128), (4, 128), (1, 2), (2, 3)])
def test_answers_of_every_step_are_those_of_a_plain_loop(model: MaskedAutoencoder, students: int, chunk: int) -> None:
    pictures = images(3)
    settings = TestTimeSettings(steps=3, masks=5, lr=0.05, students=students, chunk=chunk)
    found = TestTimeAdapter(model, settings).adapt(pictures, record_steps=True)
    assert found.step_logits is not None and found.step_logits.shape == (3, 4, 5)
    for number, picture in enumerate(pictures):
        answers, losses = plainly(model, picture, settings)
        torch.testing.assert_close(found.step_logits[number].double(), answers, rtol=1e-3, atol=1e-4)
        assert found.first_losses[number].item() == pytest.approx(losses[0], rel=1e-4)
        assert found.last_losses[number].item() == pytest.approx(losses[-1], rel=1e-4)
    assert torch.equal(found.logits, found.step_logits[:, -1])
    assert (found.step_logits[:, -1] - found.step_logits[:, 0]).abs().max() > 0.01  # the steps did something


@pytest.mark.parametrize("students", [1, 4])
def test_alone_in_a_batch_and_in_any_order_the_same(model: MaskedAutoencoder, students: int) -> None:
    """One at a time to the last bit; side by side some CPUs' batched products round by the place in the group."""
    rounding = {"rtol": 0.0, "atol": 0.0} if students == 1 else {"rtol": 1e-5, "atol": 1e-5}
    pictures = images(6)
    adapter = TestTimeAdapter(model, TestTimeSettings(steps=3, masks=5, lr=0.05, students=students))
    together = adapter.adapt(pictures)
    backwards = adapter.adapt(pictures.flip(0))
    for name in ("logits", "first_losses", "last_losses"):
        whole = getattr(together, name)
        torch.testing.assert_close(getattr(backwards, name).flip(0), whole, **rounding)
        for number in range(6):
            alone = getattr(adapter.adapt(pictures[number : number + 1]), name)[0]
            torch.testing.assert_close(alone, whole[number], **rounding)
    assert torch.equal(adapter.adapt(pictures, record_steps=True).logits, together.logits)


def test_after_an_image_everything_is_as_before_to_the_last_bit(model: MaskedAutoencoder) -> None:
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for students in (1, 2):
        TestTimeAdapter(model, TestTimeSettings(steps=2, masks=3, students=students)).adapt(images(3))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_without_steps_it_is_the_probe(model: MaskedAutoencoder) -> None:
    found = TestTimeAdapter(model, TestTimeSettings(steps=0)).adapt(images(2), record_steps=True)
    torch.testing.assert_close(found.logits, model.logits(images(2)), rtol=1e-5, atol=1e-5)
    assert found.step_logits is not None and found.step_logits.shape == (2, 1, 5)
    assert found.first_losses.isnan().all()


def test_a_broken_image_harms_itself_alone(model: MaskedAutoencoder) -> None:
    pictures = images(3)
    broken = pictures.clone()
    broken[1, 0, 3, 3] = math.nan
    for students in (1, 3):
        adapter = TestTimeAdapter(model, TestTimeSettings(steps=2, masks=3, students=students))
        found, good = adapter.adapt(broken).logits, adapter.adapt(pictures).logits
        assert found[1].isnan().all() and torch.equal(found[[0, 2]], good[[0, 2]])


def test_masks_come_from_pixels_seed_and_step_alone() -> None:
    one, other = images(2)
    first = mask_orders(one, 16, 50, 3)
    assert (first.sort(1).values == torch.arange(16)).all() and len({tuple(row) for row in first.tolist()}) == 50
    assert torch.equal(first, mask_orders(one.clone(), 16, 50, 3))
    for changed in (mask_orders(other, 16, 50, 3), mask_orders(one, 16, 50, 4), mask_orders(one, 16, 50, 3, seed=1)):
        assert not torch.equal(first, changed)


def test_what_is_tuned_is_the_encoder_and_the_mask_token(model: MaskedAutoencoder) -> None:
    names = {name for name, _ in model.named_parameters()}
    left = names - set(tuned_names(model))
    assert "mask_token" not in left and "encoder.pos_embed" in left
    assert {name.partition(".")[0] for name in left - {"encoder.pos_embed"}} == {"decoder", "head"}


def test_the_published_settings_are_the_default() -> None:
    default = TestTimeSettings()
    assert (default.steps, default.masks, default.masked) == (20, 128, 0.75)
    assert (default.lr, default.momentum) == (1e-2 * 128 / 256, 0.9)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": -1}, "steps must be 0 or more"),
        ({"masks": 0}, "masks must be 1 or more"),
        ({"masked": 1.0}, "masked is a share"),
        ({"lr": 0.0}, "lr must be a positive number"),
        ({"momentum": -1.0}, "momentum must be 0 or"),
        ({"students": 0}, "students must be 1 or more"),
        ({"chunk": 0}, "chunk must be 1 or more"),
    ],
)
def test_settings_that_cannot_work_are_refused(values: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TestTimeSettings(**values)


def test_a_network_without_a_head_is_refused() -> None:
    sizes = MAEConfig(image_size=16, patch_size=4, width=8, depth=1, heads=1)
    with pytest.raises(UsageError, match="needs a masked autoencoder with a head"):
        TestTimeAdapter(MaskedAutoencoder(sizes), SETTINGS)
