"""What is probed of a GLOM."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from apm.benchmarks.studies.glom_probe import describe_levels
from apm.benchmarks.studies.linear_probe import read_table
from apm.errors import UsageError
from apm.glom.config import GLOMConfig
from apm.glom.model import GLOM
from apm.images.load import student_input
from tests.pretraining import make_parquet, picture


def test_what_is_no_table_of_images_is_told(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b""]}), tmp_path / "column.parquet")
    (tmp_path / "text.parquet").write_text("no table")
    for name in ("column", "text", "none"):
        with pytest.raises(UsageError, match=rf"{name}\.parquet cannot be read as Parquet with the columns image and"):
            read_table(tmp_path / f"{name}.parquet", None, 0)


def test_inputs_are_the_mean_embeddings_of_each_level(tmp_path: Path) -> None:
    images, numbers = read_table(make_parquet(tmp_path / "t.parquet", 7), None, 3)
    model = GLOM(GLOMConfig(image_size=16, patch_size=4, dim=6, levels=3, expansion=1), seed=5)
    inputs = describe_levels(images, model, steps=4, batch=3)
    assert set(inputs) == {"pixels", *(f"{kind}level {n}" for n in range(3) for kind in ("", "untrained "))}
    pixels = torch.stack([student_input(picture(int(number)), 16) for number in numbers])
    with torch.no_grad():
        means = model(pixels, steps=4).mean(1)
    for level in range(3):
        np.testing.assert_allclose(inputs[f"level {level}"], means[:, level].numpy(), atol=1e-5)
        assert np.abs(inputs[f"untrained level {level}"] - inputs[f"level {level}"]).max() > 0.1
    assert inputs["pixels"].shape == (7, 3072) and 0 <= inputs["pixels"].min() < inputs["pixels"].max() <= 1
