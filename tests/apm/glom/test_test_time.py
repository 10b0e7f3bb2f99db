"""GLOM overfit to one image's token and grid: against a plain loop, alone and in batches, and reset to the last bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from apm.errors import UsageError
from apm.glom.test_time import GLOMStudent, GLOMStudentOptions, GLOMTestTimeTrainer

WIDTH = 10
OPTIONS = GLOMStudentOptions(image_size=8, patch_size=4, dim=6, levels=2, steps=4)


def given(count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Images, tokens, and grids for the 2 × 2 places."""
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(count, 3, 8, 8, generator=generator),
        torch.randn(count, WIDTH, generator=generator),
        torch.randn(count, 4, WIDTH, generator=generator),
    )


def plainly(options: GLOMStudentOptions, image: Tensor, target: Tensor, grid: Tensor) -> tuple[Tensor, list[float]]:
    """What one student comes to, by torch's own module and optimiser: its token, and the losses before each step."""
    student, losses = GLOMStudent(options, WIDTH), []
    optimiser = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=options.lr)
    for _ in range(options.steps):
        levels = student.columns(image[None], steps=2 * options.levels)
        token = student.token(levels[:, :, -1]).mean((0, 1))
        field = student.grid(levels[0, :, options.grid_level])
        terms = {"cls": (token - target).square().mean(), "grid": (field - grid).square().mean()}
        loss = sum(terms.values()) if options.distil == "both" else terms[options.distil]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    levels = student.columns(image[None], steps=2 * options.levels).detach()
    read = (
        student.grid(levels[0, :, options.grid_level]) if options.distil == "grid" else student.token(levels[0, :, -1])
    )
    return read.mean(0).detach(), losses


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize(("distil", "grid_level"), [("cls", -1), ("grid", 0), ("both", -1)])
def test_students_side_by_side_are_what_each_is_in_a_plain_loop(
    distil: Any, grid_level: int, batch_size: int | None
) -> None:
    options = replace(OPTIONS, distil=distil, grid_level=grid_level, lr=0.01)
    images, targets, grids = given()
    result = GLOMTestTimeTrainer(options, WIDTH, batch_size=batch_size).adapt(
        images, targets, grids=None if distil == "cls" else grids
    )
    for number in range(3):
        token, losses = plainly(options, images[number], targets[number], grids[number])
        torch.testing.assert_close(result.tokens[number], token, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result.losses[number], torch.tensor(losses), rtol=1e-4, atol=1e-5)
    assert (result.final_losses < result.losses[:, 0]).all()
    assert result.losses.shape == (3, 4) and result.finite.all()
    cosines = torch.cosine_similarity(result.tokens, targets)
    torch.testing.assert_close(result.final_cosines, cosines)


def test_after_an_image_everything_is_as_before_to_the_last_bit() -> None:
    images, targets, grids = given()
    trainer = GLOMTestTimeTrainer(replace(OPTIONS, distil="both"), WIDTH)
    before = {name: value.clone() for name, value in trainer.student.state_dict().items()}
    first = trainer.adapt(images[:1], targets[:1], grids=grids[:1])
    trainer.adapt(images[1:], targets[1:], grids=grids[1:])
    again = trainer.adapt(images.flip(0), targets.flip(0), grids=grids.flip(0))
    for name in ("tokens", "losses", "cosines", "fields"):
        assert torch.equal(getattr(first, name)[0], getattr(again, name)[2]), name
    for name, value in trainer.student.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(value.grad is None for value in trainer.student.parameters())


def test_steps_that_are_recorded_end_in_the_answer() -> None:
    images, targets, _ = given()
    trainer = GLOMTestTimeTrainer(OPTIONS, WIDTH)
    result = trainer.adapt(images, targets, record_tokens=True)
    assert result.step_tokens is not None and result.step_tokens.shape == (3, 5, WIDTH)
    assert torch.equal(result.step_tokens[:, -1], result.tokens)
    losses = (result.step_tokens - targets[:, None]).square().mean(-1)
    torch.testing.assert_close(losses[:, :-1], result.losses)
    with torch.no_grad():
        torch.testing.assert_close(result.step_tokens[:, 0], trainer.student(images)[0])


@pytest.mark.parametrize("where", ["image", "target", "grid"])
def test_what_is_not_finite_harms_its_own_image_alone(where: str) -> None:
    images, targets, grids = given()
    trainer = GLOMTestTimeTrainer(replace(OPTIONS, distil="both"), WIDTH, batch_size=3)
    whole = trainer.adapt(images, targets, grids=grids)
    {"image": images, "target": targets, "grid": grids}[where][1].view(-1)[3] = torch.inf
    result = trainer.adapt(images, targets, grids=grids)
    assert result.finite.tolist() == [True, False, True]
    assert torch.equal(result.tokens[[0, 2]], whole.tokens[[0, 2]])
    for values in (result.tokens, result.fields, result.final_losses, result.final_cosines):
        assert values[1].isnan().all()


def test_what_does_not_fit_is_refused() -> None:
    images, targets, grids = given()
    trainer = GLOMTestTimeTrainer(OPTIONS, WIDTH)
    for arguments, words in (
        ((images[:, :, :4], targets), r"images must have shape \(B, 3, 8, 8\)"),
        ((images, targets[:, 1:]), r"targets must have shape \(3, 10\), not \(3, 9\)"),
        ((images, targets, grids), 'it is "cls"'),
    ):
        with pytest.raises(UsageError, match=words):
            trainer.adapt(*arguments[:2], grids=arguments[2] if len(arguments) > 2 else None)
    with pytest.raises(UsageError, match="grids must have shape"):
        GLOMTestTimeTrainer(replace(OPTIONS, distil="grid"), WIDTH).adapt(images, targets, grids=grids[:, 1:])
    with pytest.raises(UsageError, match="batch_size must be 1 or more"):
        GLOMTestTimeTrainer(OPTIONS, WIDTH, batch_size=0)


def test_seeds_draw_other_weights_and_one_seed_the_same() -> None:
    one, same, other = (GLOMStudent(replace(OPTIONS, seed=seed), WIDTH).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["token.weight"], other["token.weight"])
    assert not torch.equal(one["columns.tokens.weight"], other["columns.tokens.weight"])
