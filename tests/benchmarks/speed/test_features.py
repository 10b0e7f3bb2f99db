"""The benchmark of methods on a store's features: its loops give the methods' answers, and it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from apm.benchmarks.speed import __main__ as command
from apm.benchmarks.speed import features as measured
from apm.benchmarks.speed.features import Sizes, SyntheticTeacher, synthetic_dataset, synthetic_store
from apm.benchmarks.speed.kinds import KINDS
from apm.benchmarks.speed.published_methods import PublishedTDA, published_mta, published_zero
from apm.benchmarks.store.reader import FeatureStore
from tests.benchmarks.goldens import close, read_golden
from tests.places import GOLDEN


def test_the_loops_give_what_the_published_code_gave() -> None:
    golden = read_golden(GOLDEN / "peers_seed0.npz")
    text, scale = golden["text_features"], float(golden["view_logit_scale"])
    close(torch.cat([published_mta(one, text, scale) for one in golden["views"]]), golden["mta_logits"])
    winners = torch.cat([published_zero(one, text, scale) for one in golden["views"]]).argmax(dim=1)
    assert winners.tolist() == golden["zero_votes"].argmax(dim=1).tolist()
    tda = PublishedTDA(text, float(golden["tda_logit_scale"]))
    close(torch.cat([tda.answer(one.unsqueeze(0)) for one in golden["stream"]]), golden["tda_logits"])


def test_the_synthetic_store_is_seeded_and_neither_easy_nor_hopeless(tmp_path: Path) -> None:
    sizes = Sizes(images=300, views=3, dim=64, classes=50)
    found = []
    for name in ("one", "other"):
        synthetic_store(tmp_path / name, sizes)
        cell = FeatureStore.open(tmp_path / name).cell(synthetic_dataset(sizes))
        found.append(cell.views(range(sizes.images)).first(3))
    assert found[0].equal(found[1])
    labels = torch.tensor([sample.label for sample in synthetic_dataset(sizes).samples])
    right = (normalize(found[0][:, 0], dim=1) @ SyntheticTeacher(sizes).texts.T).argmax(dim=1) == labels
    assert 0.2 < float(right.double().mean()) < 0.98


@pytest.mark.slow
def test_the_benchmark_runs_and_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured.os, "cpu_count", lambda: 2)
    assert command.main(["features", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "speed-features-tiny-cpu.json").read_text())
    assert [row["name"] for row in record["rows"]] == [*measured.METHODS, measured.GROWING]
    same = {row["name"]: row["same_answers"] for row in record["rows"] if "same_answers" in row}
    assert same == {"mta": 1.0, "zero": 1.0, "tda": 1.0}
    assert record["summary"]["seconds"] > 0 and len(record["summary"]["peak_bytes"]) == 2
    assert KINDS["features"].table(record) in capsys.readouterr().out
