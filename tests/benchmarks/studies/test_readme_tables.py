"""benchmarks/README.md says what the records say."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from apm.benchmarks.runs.records import RunFolder
from apm.benchmarks.runs.rows import Row
from apm.benchmarks.studies import readme_tables as measured
from apm.benchmarks.studies.study import block
from apm.benchmarks.tables.stats import mcnemar, paired_test


def test_the_document_is_what_the_records_give() -> None:
    document = measured.DOCUMENT.read_text(encoding="utf-8")
    texts = dict(measured.parts())
    assert set(re.findall(r"<!-- measured: (\w+) -->", document)) == set(texts)
    for name, text in texts.items():
        assert block(measured.DOCUMENT, f"measured: {name}") == text.strip("\n")


def test_flips_are_those_of_the_shards() -> None:
    """Counted again from the files, image by image, for one method and target on the corrupted images."""
    right: dict[str, dict[tuple[str, str], bool]] = {}
    for shard in (measured.RESULTS / measured.TINY[1] / "shards").rglob("*.parquet"):
        for row in pq.read_table(shard, partitioning=None).to_pylist():
            right.setdefault(row["method"], {})[shard.parent.name, row["id"]] = row["prediction"] == row["label"]
    texts = dict(measured.parts())
    for part, reference, method in (("helps", "zero-shot", "mta"), ("targets", "apm", "apm[mta,32]")):
        before, after = right[reference], right[method]
        assert before.keys() == after.keys() and len(before) == 900
        lost = sum(before[key] and not after[key] for key in before)
        won = sum(after[key] and not before[key] for key in before)
        changes = Counter({name: 0 for _, name in before})  # of a photograph, over its corruptions
        for cell, name in before:
            changes[name] += after[cell, name] - before[cell, name]
        p = paired_test(np.array(list(changes.values())))
        (line,) = re.findall(
            rf"^\| Tiny ImageNet, 15 corruptions \| {re.escape(method)} \|.*$", texts[part], re.MULTILINE
        )
        assert line.endswith(f"| {lost} | {won} | {p:.2g} |")
        assert len(changes) == 60 and f"{p:.2g}" != f"{mcnemar(lost, won):.2g}"


def test_a_collected_run_holds_the_same_rows_in_fewer_files(tmp_path: Path) -> None:
    source = RunFolder(measured.RESULTS / measured.CROSS)
    scattered = RunFolder(tmp_path / "scattered")
    record = source.read_run()
    assert record is not None
    for cell in record["cells"]:
        rows = [Row(**row) for row in source.read(cell).to_pylist()]
        for start in range(0, len(rows), 50):
            scattered.append(cell, rows[start : start + 50])
    scattered.write_run(record)
    measured.collect(scattered.path, tmp_path / "results")
    collected = RunFolder(tmp_path / "results" / "scattered")
    assert len(collected.all_shards()) == len(record["cells"]) < len(scattered.all_shards())
    order = [("position", "ascending"), ("method", "ascending")]
    for cell in record["cells"]:
        assert collected.read(cell).sort_by(order).equals(source.read(cell).sort_by(order))
