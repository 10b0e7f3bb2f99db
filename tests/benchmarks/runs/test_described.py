"""Which file describes the classes of which data set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apm.benchmarks.runs.described import described
from apm.errors import UsageError


def test_a_data_sets_own_file_comes_before_that_of_all(tmp_path: Path) -> None:
    shared, own = tmp_path / "all=of-them.json", tmp_path / "dtd.json"
    for path in (shared, own):
        path.write_text(json.dumps({"banded": [f"A surface, says {path.name}."]}))
    datasets = ("imagenet", "dtd", "imagenet-v2")
    found = described([str(shared), f"dtd={own}"], datasets, ["zero-shot", "tps:views=8"], "published")
    assert [found[name].name for name in datasets] == ["all=of-them.json", "dtd.json", "all=of-them.json"]
    assert found["imagenet"] is found["imagenet-v2"]  # read once
    assert described([], datasets, ["tps"], "common") == {}
    with pytest.raises(UsageError, match=r"given for imagenet, imagenet-v2: add --descriptors imagenet=FILE"):
        described([f"dtd={own}"], datasets, ["tps"], "published")
