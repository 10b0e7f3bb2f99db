"""What is drawn ahead in a thread is what would have been drawn, whatever sizes were expected."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from apm.student.config import APMConfig
from apm.student.drawn_ahead import DrawnAhead
from apm.student.model import draw_parameters, parameter_shapes

CONFIG = APMConfig(dim=32, image_size=56, position_dim=32, hidden=(48, 32, 24), rgb_hidden=8)


@pytest.mark.parametrize("expected", [8, 32, 128], ids=["too few", "exact", "too many"])
@pytest.mark.parametrize("readout", ["query", "mean"])
def test_the_numbers_are_those_of_one_draw(expected: int, readout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apm.student.model.SOME", 1000)  # several parts
    config = replace(CONFIG, readout=readout)
    ahead = DrawnAhead(replace(config, dim=expected), seed=3).parameters(config)
    generator = np.random.Generator(np.random.PCG64(3))
    for name, shape in parameter_shapes(config).items():  # one array after the other, in double precision
        wanted = (generator.standard_normal(shape) * config.init_std).astype(np.float32)
        assert torch.equal(ahead[name], torch.from_numpy(wanted)), name
    together = draw_parameters(config, np.random.Generator(np.random.PCG64(3)))
    assert list(ahead) == list(together) and all(torch.equal(ahead[name], together[name]) for name in ahead)
