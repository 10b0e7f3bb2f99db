"""TTT-MAE: against a plain loop of torch's optimiser, alone and side by side, and reset to the last bit."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from apm.errors import UsageError
from apm.images.load import IMAGENET_MEAN, IMAGENET_STD
from apm.mae.config import MAEConfig
from apm.mae.model import MaskedAutoencoder
from apm.mae.test_time import (
    TestTimeAdapter,
    TestTimeSettings,
    mask_orders,
    random_crops,
    tuned_names,
)
from tests.apm.mae.test_model import SIZES, images, model_of, plain_error, plain_logits, weights_of

SETTINGS = TestTimeSettings(steps=3, masks=5, lr=0.05)


@pytest.fixture
def model() -> MaskedAutoencoder:
    return model_of().requires_grad_(False)


def photographs(count: int) -> list[Image.Image]:
    """Wide and high ones, of noise."""
    draw = np.random.default_rng(3)
    shapes = [(20, 40, 3), (33, 18, 3), (24, 24, 3)]
    return [Image.fromarray(draw.integers(0, 256, shapes[n % 3], dtype=np.uint8)) for n in range(count)]


def plainly(
    model: MaskedAutoencoder, picture: Tensor, settings: TestTimeSettings, whole: Image.Image | None = None
) -> tuple[Tensor, list[float]]:
    """Answers before each step and after the last (K + 1, C), and losses as often, of one image.

    Everything but the decoder and fixed positions is handed to torch's own SGD; the loss is that of as many copies, or
    crops of `whole`, as there are masks, each by itself, and read off their weights patch by patch.
    """
    mine = copy.deepcopy(model).double().requires_grad_(True)
    tuned = [p for n, p in mine.named_parameters() if not n.startswith("decoder") and n != "encoder.pos_embed"]
    optimiser = torch.optim.SGD(tuned, lr=settings.lr, momentum=settings.momentum)
    answers, losses = [plain_logits(weights_of(mine), SIZES, picture.double())], []
    for step in range(settings.steps + 1):
        optimiser.zero_grad()
        w: dict[str, Tensor] = dict(mine.named_parameters())
        orders = mask_orders(picture, 16, settings.masks, step)
        looks = [picture] * settings.masks if whole is None else random_crops(whole, 16, settings.masks, step)
        each = [
            plain_error(w, SIZES, look.double(), order.tolist(), 4) for look, order in zip(looks, orders, strict=True)
        ]
        loss = torch.stack(each).mean()
        losses.append(loss.item())
        if step < settings.steps:
            loss.backward()
            optimiser.step()
            answers.append(plain_logits(weights_of(mine), SIZES, picture.double()))
    return torch.stack(answers), losses


@pytest.mark.parametrize(
    ("students", "chunk", "crops"),
    [
        (1, 2, "copies"),
        (2, 3, "copies"),
        (2, 128, "random"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(1, 128, "copies"), (2, 128, "copies"), (4, 128, "copies"), (1, 2, "random")]
        ),
    ],
)
def test_answers_of_every_step_are_those_of_a_plain_loop(
    model: MaskedAutoencoder, students: int, chunk: int, crops: Any
) -> None:
    pictures, wholes = images(3), photographs(3)
    settings = TestTimeSettings(steps=3, masks=5, lr=0.05, students=students, chunk=chunk, crops=crops)
    found = TestTimeAdapter(model, settings).adapt(pictures, wholes, record_steps=True)
    assert found.step_logits is not None and found.step_logits.shape == (3, 4, 5)
    assert found.step_losses is not None and found.step_losses.shape == (3, 4)
    for number, picture in enumerate(pictures):
        answers, losses = plainly(model, picture, settings, wholes[number] if crops == "random" else None)
        torch.testing.assert_close(found.step_logits[number].double(), answers, rtol=1e-3, atol=1e-4)
        assert found.step_losses[number].tolist() == pytest.approx(losses, rel=1e-4)
    assert torch.equal(found.first_losses, found.step_losses[:, 0])
    assert torch.equal(found.last_losses, found.step_losses[:, 2])
    assert torch.equal(found.logits, found.step_logits[:, -1])
    assert (found.step_logits[:, -1] - found.step_logits[:, 0]).abs().max() > 0.01  # the steps did something


def test_random_crops_are_of_the_whole_photograph_and_each_shows_a_fifth_of_it_or_more() -> None:
    """Red says the column and green the row, so that a crop's colours tell where it lies."""
    high, wide = 60, 120
    ramps = np.zeros((high, wide, 3), dtype=np.uint8)
    ramps[..., 0], ramps[..., 1] = np.arange(wide) * 2, np.arange(high)[:, None] * 4
    crops = random_crops(Image.fromarray(ramps), 24, 300, 2, seed=4)
    assert crops.shape == (300, 3, 24, 24)
    shown = crops * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    columns, rows = 255 * shown[:, 0].mean(1) / 2, 255 * shown[:, 1].mean(2) / 4  # (300, 24) each
    width, height = ((line[:, 18] - line[:, 5]) / 13 * 24 for line in (columns, rows))  # falling: mirrored
    share, ratio = width * height / (high * wide), width / height
    assert width.min() > 0 and height.min() > 0
    assert 0.18 < share.min() < 0.25 and share.max() > 0.6  # a crop of 4:3 as high as the photograph: 0.67
    assert 0.7 < ratio.min() < 0.85 and 1.2 < ratio.max() < 1.42
    middle = (columns[:, 11] + columns[:, 12]) / 2
    assert middle.min() < 30 and middle.max() > 90  # the central square ends at these


def test_random_crops_come_from_pixels_seed_and_step_alone() -> None:
    one, other = photographs(2)
    first = random_crops(one, 8, 4, 3)
    assert torch.equal(first, random_crops(one.copy(), 8, 4, 3))
    assert torch.equal(first[:2], random_crops(one, 8, 2, 3))
    for changed in (random_crops(other, 8, 4, 3), random_crops(one, 8, 4, 4), random_crops(one, 8, 4, 3, seed=1)):
        assert not torch.equal(first, changed)


def test_with_random_crops_too_an_image_is_by_itself(model: MaskedAutoencoder) -> None:
    pictures, wholes = images(3), photographs(3)
    adapter = TestTimeAdapter(model, TestTimeSettings(steps=2, masks=3, lr=0.05, crops="random"))
    together = adapter.adapt(pictures, wholes).logits
    assert torch.equal(adapter.adapt(pictures.flip(0), wholes[::-1]).logits.flip(0), together)
    for number in range(3):
        alone = adapter.adapt(pictures[number : number + 1], wholes[number : number + 1]).logits
        assert torch.equal(alone[0], together[number])
    copies = TestTimeAdapter(model, TestTimeSettings(steps=2, masks=3, lr=0.05)).adapt(pictures).logits
    assert (together - copies).abs().max() > 1e-3
    with pytest.raises(UsageError, match="cut from the whole images"):
        adapter.adapt(pictures)


@pytest.mark.parametrize("students", [1, 4])
def test_alone_in_a_batch_and_in_any_order_the_same(model: MaskedAutoencoder, students: int) -> None:
    """One at a time to the last bit; side by side some CPUs' batched products round by the place in the group."""
    rounding = {"rtol": 0.0, "atol": 0.0} if students == 1 else {"rtol": 1e-5, "atol": 1e-5}
    pictures = images(6)
    adapter = TestTimeAdapter(model, TestTimeSettings(steps=3, masks=5, lr=0.05, students=students))
    together = adapter.adapt(pictures)
    backwards = adapter.adapt(pictures.flip(0))
    alone = [adapter.adapt(pictures[number : number + 1]) for number in range(6)]
    for name in ("logits", "first_losses", "last_losses"):
        whole = getattr(together, name)
        torch.testing.assert_close(getattr(backwards, name).flip(0), whole, **rounding)
        for number, one in enumerate(alone):
            torch.testing.assert_close(getattr(one, name)[0], whole[number], **rounding)
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
    assert (default.steps, default.masks, default.masked, default.crops) == (20, 128, 0.75, "copies")
    assert (default.lr, default.momentum) == (1e-2 * 128 / 256, 0.9)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": -1}, "steps must be 0 or more"),
        ({"masks": 0}, "masks must be 1 or more"),
        ({"masked": 1.0}, "masked is a share"),
        ({"lr": 0.0}, "lr must be a positive number"),
        ({"momentum": -1.0}, "momentum must be 0 or"),
        ({"crops": "some"}, 'Unknown crops "some". Known: copies, random'),
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
