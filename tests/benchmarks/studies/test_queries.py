"""The study of fewer locations: resumable rows, and a record that counts what changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from apm.benchmarks.studies import queries
from apm.benchmarks.studies.study import block
from apm.errors import ApmError, UsageError
from apm.test_time.queries import FEWER
from tests.fakes import FakeTeacher

RECORD = Path(queries.__file__).parent.parent / "results" / "queries-agreement.json"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, colour in enumerate(("red", "green", "blue")):
        Image.linear_gradient("L").convert("RGB").resize((40 + number, 36)).save(folder / f"{colour}.png")
    return folder


def run(photos: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    teacher = FakeTeacher(default_labels=("cat", "dog", "bird"))
    monkeypatch.setattr(queries, "load_teacher", lambda name: teacher)
    fast = ("--preset", "small", "--steps", "2", "--precision", "fp32", "--counts", "9")
    queries.STUDY.main(["--root", str(photos), "--rows", str(rows), *fast, *more])


@pytest.mark.slow
def test_it_is_continued_and_parts_are_summed_up(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, first, second = (tmp_path / f"{name}.jsonl" for name in ("whole", "first", "second"))
    run(photos, whole, monkeypatch)
    rows = queries.read_rows(whole)[1]
    assert len(rows) == 3 * 2 * 2  # photographs, states, all and fewer
    assert {row["state"] for row in rows if row["state"] != "clean"} == {
        f"{name}/5" for name in list(queries.CORRUPTIONS)[:3]
    }
    content = whole.read_bytes()
    whole.write_bytes(content[:-30])  # killed while it wrote
    run(photos, whole, monkeypatch)
    drop = [{**row, "seconds": 0} for row in queries.read_rows(whole)[1]]
    assert drop == [{**row, "seconds": 0} for row in rows]
    run(photos, first, monkeypatch, "--limit", "2")
    run(photos, second, monkeypatch, "--offset", "2", "--limit", "2")
    ours, parts = (queries.summed(files)["cells"] for files in ([whole], [first, second]))
    for cell in (*ours, *parts):
        del cell["seconds"]
    assert ours == parts
    assert [(cell["state"], cell["photographs"]) for cell in ours] == [("clean", 3), ("corrupted", 3)]


def test_other_settings_are_refused(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, others = tmp_path / "rows.jsonl", tmp_path / "others.jsonl"
    run(photos, rows, monkeypatch, "--limit", "1")
    with pytest.raises(UsageError, match="other settings"):
        run(photos, rows, monkeypatch, "--limit", "1", "--seed", "1")
    run(photos, others, monkeypatch, "--limit", "1", "--seed", "1")
    with pytest.raises(ApmError, match="other settings"):
        queries.summed([rows, others])


def test_a_changed_first_label_is_counted_and_named(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    common = {"teacher": 0, "cosine": 0.9, "seconds": 1.0, "margin": 0.1}
    lines = [{"command": "run", "settings": {"preset": "small"}, "environment": {}}]
    for name, state, few, more in (("a", "clean", 0, 0), ("b", "clean", 1, 0), ("a", "fog/5", 0, 0)):
        for count, first in (("all", 0), (16, few), (64, more)):
            lines.append(
                {"photograph": name, "state": state, "queries": count, "first": first, "probability": 0.5, **common}
            )
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = queries.summed([rows])
    changed = {(cell["state"], cell["queries"]): cell["changed"] for cell in record["cells"]}
    assert changed["clean", 16] == [{"photograph": "b", "state": "clean", "margin": 0.1}]
    assert changed["clean", 64] == changed["corrupted", 16] == []
    assert record["fewest_without_a_change"] == {"small": 64}
    assert "| small | clean | 16 | 2 | 1 | 0.0e+00 |" in queries.table(record)


def test_the_record_says_where_the_rows_were_made(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    run(photos, rows, monkeypatch, "--limit", "1")
    made = json.loads(capsys.readouterr().out)
    (command,) = made["commands_of_the_rows"]
    assert command.startswith("python -m apm.benchmarks.studies.queries --root photos --rows rows.jsonl --preset small")
    queries.STUDY.main(["--rows", str(rows), "--record", str(tmp_path / "r.json")])
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["cells"] == made["cells"] and set(record["environment"]) == {"small"}
    with pytest.raises(UsageError, match="3 photographs were found, and none from 7 on"):
        run(photos, rows, monkeypatch, "--offset", "7")


def test_what_auto_reads_is_what_the_record_allows() -> None:
    record = json.loads(RECORD.read_text())
    measured = record["fewest_without_a_change"]
    states = {(cell["preset"], cell["state"]) for cell in record["cells"] if cell["photographs"] >= 300}
    assert states == {(preset, state) for preset in measured for state in ("clean", "corrupted")}
    assert {preset: FEWER.get(preset) for preset in measured} == measured
    assert block(queries.STUDY.document, queries.STUDY.marker) == queries.STUDY.recorded()
    if not set(FEWER) <= set(measured):
        pytest.skip(f"not measured yet: {', '.join(sorted(set(FEWER) - set(measured)))}")
