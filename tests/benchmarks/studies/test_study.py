"""What studies share: pages made from records, commands without a machine's paths, an early end that keeps results."""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path
from typing import Any

import pytest

from apm.benchmarks import studies
from apm.benchmarks.studies import study as documents
from apm.benchmarks.studies.study import Study, averaged, command, each, markdown, run
from apm.errors import ApmError, UsageError

MODULES = [importlib.import_module(f"{studies.__name__}.{one.name}") for one in pkgutil.iter_modules(studies.__path__)]
STUDIES = [one.STUDY for one in MODULES if hasattr(one, "STUDY")]
DOCUMENTED = [one for one in STUDIES if one.document is not None and one.name != "queries"]  # which test_queries has


@pytest.mark.parametrize("study", DOCUMENTED, ids=lambda study: study.name)
def test_documents_are_made_from_the_records(study: Study) -> None:
    assert study.document is not None and len(study.recorded()) > 300
    assert documents.block(study.document, study.marker) == study.recorded()


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """Finds the seed; its document and its records are in tmp_path."""
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("a\n<!-- found -->\nold\n<!-- end -->\nb\n")
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    monkeypatch.setattr(documents, "RESULTS", tmp_path)

    def measure(options: Any) -> dict[str, Any]:
        return {"found": options.seed}

    def table(record: dict[str, Any]) -> str:
        return f"It is {record['found']}."

    return Study(
        name="one",
        question="Which?",
        measure=measure,
        table=table,
        shared={"seed": 3, "root": None, "preset": "small"},
        results="one-*.json",
        document=page,
        marker="found",
    )


def test_a_study_prints_its_record_or_files_it(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study.main(["--root", "/home/me/images", "--seed", "4"])
    record = json.loads(capsys.readouterr().out)
    assert record["found"] == 4 and record["environment"]["versions"] and record["date"]
    assert record["command"] == "python -m apm.benchmarks.studies.one --root images --seed 4"
    study.main(["--seed", "5", "--record", str(tmp_path / "r.json")])
    assert capsys.readouterr().out == "It is 5.\n"
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["found"] == 5 and record["command"].endswith("studies.one --seed 5")
    study.main(["--table", str(tmp_path / "r.json"), str(tmp_path / "r.json")])
    assert capsys.readouterr().out == "It is 5.\n\nIt is 5.\n"


def test_a_document_shows_all_records(study: Study, tmp_path: Path) -> None:
    study.main(["--document"])
    study.main(["--document", "--seed", "4", "--preset", "paper"])
    assert study.document is not None
    assert study.document.read_text() == "a\n<!-- found -->\nIt is 4.\n\nIt is 3.\n<!-- end -->\nb\n"
    (tmp_path / "one-paper.json").unlink()
    study.main(["--table", "--document"])  # measures nothing
    assert documents.block(study.document, "found") == "It is 3."


def test_no_record_to_show_is_told(study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"no record one-\*\.json"):
        study.main(["--table"])
    (tmp_path / "bad.json").write_text("{")
    for name in ("bad.json", "none.json"):
        assert run(lambda name=name: study.main(["--table", str(tmp_path / name)])) == 2  # type: ignore[misc]
        assert name in capsys.readouterr().err


def test_mistakes_are_told_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(error: ApmError) -> None:
        raise error

    assert run(lambda: wrong(UsageError("no such name"))) == 2
    assert run(lambda: wrong(ApmError("unreadable"))) == 1
    assert run(lambda: None) == 0
    assert capsys.readouterr().err == "error: no such name\nerror: unreadable\n"


def test_a_command_names_no_place_of_the_machine() -> None:
    given = [
        "data/val",
        "--root",
        "/srv/me/val",
        "../up/here",
        "--teacher",
        "ViT-B-16/openai",
        "--out",
        "/tmp/r",
        "a b",
    ]
    assert command("apm.x", given) == ("python -m apm.x data/val --root val here --teacher ViT-B-16/openai 'a b'")


def test_what_is_done_at_ctrl_c_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    def measure(number: int) -> int:
        if number == 3:
            raise KeyboardInterrupt
        return 10 * number

    assert each([1, 2, 3, 4], measure, "images") == [10, 20]
    assert capsys.readouterr().err == "1 of 4 images\n2 of 4 images\n"
    with pytest.raises(KeyboardInterrupt):
        each([1, 2, 3, 4], measure, "images", minimum=3)
    with pytest.raises(UsageError, match="There are no images to measure"):
        each([], measure, "images")
    assert each([], measure, "images", minimum=0) == []


def test_numbers_of_rows_are_averaged_in_their_nesting() -> None:
    rows = [{"a": 1, "b": {"c": {"d": 2.0}}}, {"a": 3, "b": {"c": {"d": 6.0}}}]
    assert averaged(rows) == {"a": [2.0, 1.0], "b": {"c": {"d": [4.0, 2.0]}}}
    assert averaged(rows[:1]) == {"a": [1.0], "b": {"c": {"d": [2.0]}}}


def test_tables_in_markdown() -> None:
    assert markdown(["a", "b"], [[1, 2.5], ["x", ""]]) == "| a | b |\n|---|---:|\n| 1 | 2.5 |\n| x |  |"
    assert markdown("ab", [], text=0) == "| a | b |\n|---:|---:|" and markdown("ab", []).endswith("|---|---:|")


def test_a_document_is_filled_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- one: how -->\nold\n<!-- end -->\nb\n<!-- two -->\nkept\n<!-- end -->\n")
    documents.fill(page, "one", "new\n\n| \\1 |\n")
    assert page.read_text() == (
        "a\n<!-- one: how -->\nnew\n\n| \\1 |\n<!-- end -->\nb\n<!-- two -->\nkept\n<!-- end -->\n"
    )
    assert documents.block(page, "two") == "kept"
    with pytest.raises(UsageError, match="no place for three"):
        documents.fill(page, "three", "")
