"""Both forms against recorded numbers of the method at its full size.

``APM_GOLDEN`` may name another file of the same form; the seed is read from its name (``..._seed<N>.npz``). The
weights, the image and the target are drawn again from that seed; the token's width is read off the file.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from apm.student.config import APMConfig
from apm.student.engine import Engine
from apm.student.model import APM, draw_parameters
from tests.places import GOLDEN

PATH = Path(os.environ.get("APM_GOLDEN") or GOLDEN / "apm_ttt_seed0.npz")


class Golden(NamedTuple):
    config: APMConfig
    arrays: dict[str, NDArray[np.float64]]
    parameters: dict[str, Tensor]
    image: Tensor
    target: Tensor
    rows: Tensor
    cols: Tensor


@pytest.fixture(scope="module")
def golden() -> Golden:
    seed = re.search(r"seed(\d+)", PATH.name)
    assert seed, f"no seed in the name of {PATH}"
    with np.load(PATH) as file:
        arrays = {name: file[name] for name in file.files}
    generator = np.random.Generator(np.random.PCG64(int(seed[1])))
    config = APMConfig(dim=arrays["token_step0"].size)
    parameters = draw_parameters(config, generator)
    image = torch.from_numpy(generator.standard_normal((1, 3, 448, 448)).astype(np.float32))
    target = torch.from_numpy((generator.standard_normal((1, config.dim)) * 0.4).astype(np.float32))
    rows, cols = (torch.from_numpy(arrays[f"sample_{axis}"]) for axis in ("rows", "cols"))
    return Golden(config, arrays, parameters, image, target, rows, cols)


AFTER_STEPS = 1e-3  # Adam makes much of a gradient that is rounding, and processors and threads round differently


def close(value: Tensor, expected: NDArray[np.float64], tolerance: float = 1e-4) -> None:
    """Hold an array to the expected one, relative to its norm."""
    wanted = torch.from_numpy(np.asarray(expected, dtype=np.float64))
    got = value.detach().double().reshape(wanted.shape)
    assert (got - wanted).norm() <= tolerance * wanted.norm()


def close_each(value: Tensor, expected: NDArray[np.float64], tolerance: float = 1e-4) -> None:
    """Hold every number to its own expected one."""
    np.testing.assert_allclose(value.detach().double().numpy(), expected, rtol=tolerance, atol=0)


@pytest.mark.slow
def test_plain_form(golden: Golden) -> None:
    model = APM(golden.config)
    model.load_state_dict(golden.parameters)
    with torch.no_grad():
        close(model.column(golden.image), golden.arrays["column_step0"])
        close(model.field(golden.image, golden.rows, golden.cols), golden.arrays["field_step0_sample"])
        close(model.rgb(golden.image, golden.rows, golden.cols), golden.arrays["rgb_step0_sample"])

    adam = torch.optim.Adam(model.parameters(), lr=1e-4)
    losses, cosines = [], []
    for step in range(20):
        adam.zero_grad()
        token = model(golden.image)
        loss = (token - golden.target).square().mean()
        loss.backward()
        if step == 0:
            close(token, golden.arrays["token_step0"])
            norms = [
                float("nan") if (gradient := model.get_parameter(name).grad) is None else gradient.norm().item()
                for name in golden.parameters
            ]
            close_each(torch.tensor(norms), golden.arrays["grad_norms_step0"])
        losses.append(loss.detach())
        cosines.append(torch.cosine_similarity(token, golden.target)[0].detach())
        adam.step()
    close_each(losses[0], golden.arrays["losses"][0])
    close_each(torch.stack(losses), golden.arrays["losses"], AFTER_STEPS)
    close_each(torch.stack(cosines), golden.arrays["cosines"], AFTER_STEPS)
    with torch.no_grad():
        close(model(golden.image), golden.arrays["token_final"], AFTER_STEPS)
        close(model.field(golden.image, golden.rows, golden.cols), golden.arrays["field_final_sample"], AFTER_STEPS)


@pytest.mark.slow
def test_engine(golden: Golden) -> None:
    engine = Engine(golden.config, golden.parameters)
    engine.load(golden.image, golden.target)
    engine.evaluate()
    engine.backward()
    close(engine.column, golden.arrays["column_step0"])
    close(engine.fold(1).features(golden.rows, golden.cols), golden.arrays["field_step0_sample"])
    close(engine.token, golden.arrays["token_step0"])
    norms = [
        engine.gradients[name].norm() if name in engine.gradients else torch.tensor(float("nan"))
        for name in golden.parameters
    ]
    close_each(torch.stack(norms), golden.arrays["grad_norms_step0"])

    history = engine.run(20)
    close_each(history.losses[0, 0], golden.arrays["losses"][0])
    close_each(history.losses[0], golden.arrays["losses"], AFTER_STEPS)
    close_each(history.cosines[0], golden.arrays["cosines"], AFTER_STEPS)
    close(engine.token, golden.arrays["token_final"], AFTER_STEPS)
    close(engine.fold(1).features(golden.rows, golden.cols), golden.arrays["field_final_sample"], AFTER_STEPS)
