"""Tables from fixed records: the whole text, and each rule by itself."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from apm.benchmarks.runs.records import Records
from apm.benchmarks.tables.build import make_tables, published_rows
from apm.benchmarks.tables.formats import CSV_COLUMNS, FORMATS, grid
from apm.benchmarks.tables.stats import mcnemar
from apm.benchmarks.tables.table import MARKS, Table, TableRow
from tests.benchmarks.made_runs import Plain, make_dataset, make_run
from tests.benchmarks.make_table_golden import GOLDEN, RUNS, SUFFIXES
from tests.fakes import FakeTeacher
from tests.schemas import schema


@pytest.fixture
def golden(monkeypatch: pytest.MonkeyPatch) -> list[Table]:
    monkeypatch.chdir(GOLDEN)
    return make_tables([Records.open(name) for name in RUNS], oracle=True)


def row_of(table: Table, method: str, kind: str = "ours") -> TableRow:
    (row,) = [row for row in table.rows if row.method == method and row.kind == kind]
    return row


@pytest.mark.parametrize("name", ["markdown", "csv", "latex"])
def test_the_text_is_the_stored_one(golden: list[Table], name: str) -> None:
    assert FORMATS[name](golden) == (GOLDEN / f"expected.{SUFFIXES[name]}").read_text(encoding="utf-8")


def test_json_is_the_stored_one_and_follows_its_schema(golden: list[Table]) -> None:
    document = json.loads(FORMATS["json"](golden))
    expected = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
    assert _rounded(document) == _rounded(expected)
    schema("benchmarks/table.schema.json").validate(document)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.9g}"
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value


def test_a_cell_by_hand(golden: list[Table]) -> None:
    rows = pq.read_table(next((GOLDEN / "corrupted" / "shards" / "digits--fog--5").glob("*.parquet"))).to_pylist()
    mine = [row for row in rows if row["method"] == "apm"]
    right = [row["prediction"] == row["label"] for row in mine]
    teacher = [row["teacher_prediction"] == row["label"] for row in mine]
    score = row_of(golden[2], "apm").cells["fog"]
    accuracy = sum(right) / len(right)
    assert score.n == len(mine) == 50
    assert score.accuracy == pytest.approx(100 * accuracy)
    assert score.stderr == pytest.approx(100 * (accuracy * (1 - accuracy) / 50) ** 0.5)
    assert score.agreement == pytest.approx(2 * sum(row["prediction"] == row["teacher_prediction"] for row in mine))
    lost, gained = (
        sum(t and not r for r, t in zip(right, teacher, strict=True)),
        sum(r and not t for r, t in zip(right, teacher, strict=True)),
    )
    assert (score.right_to_wrong, score.wrong_to_right) == (lost, gained)
    assert gained > lost > 0
    assert score.mcnemar_p == mcnemar(lost, gained)
    assert score.nll == pytest.approx(sum(row["nll"] for row in mine) / 50)
    assert score.images_per_second == pytest.approx(1 / (0.25 + 0.015625))


def test_failed_images_are_left_out_and_counted(golden: list[Table]) -> None:
    score = row_of(golden[2], "zero-shot").cells["clean"]
    assert (score.n, score.failed) == (49, 1)
    assert "failed" in score.marks


def test_marks_stand_for_what_makes_numbers_incomparable(golden: list[Table]) -> None:
    shifts, cross, corrupted = golden
    assert row_of(shifts, "apm").cells["imagenet-a"].marks == ("subset",)
    assert row_of(corrupted, "apm").cells["fog"].marks == ("generated",)
    assert row_of(cross, "zero-shot").cells["caltech101"].marks == ("hub split", "near chance")
    for table in golden:
        used = {mark for row in table.rows for score in row.cells.values() for mark in score.marks}
        assert all(any(note.startswith(MARKS[mark][0]) for note in table.notes) for mark in used)


def test_accuracy_near_chance_is_a_loud_warning_with_causes(golden: list[Table]) -> None:
    (warning,) = golden[1].warnings
    for cause in ("caltech101", "wrong parent folder", "another order", "label set", "QuickGELU"):
        assert cause in warning
    assert not golden[0].warnings


def test_averages_are_of_whole_rows_and_leave_out_the_clean_column(golden: list[Table]) -> None:
    corrupted = row_of(golden[2], "apm")
    cells = [corrupted.cells[name].accuracy for name in ("contrast", "fog")]
    assert corrupted.average == pytest.approx(sum(cell for cell in cells if cell is not None) / 2)
    assert row_of(golden[0], "apm").average is None  # imagenet is not there
    text = FORMATS["markdown"](golden)
    assert "59.0 (printed 59.1)" in text
    assert "| 62.4 | 60.8 | Modi & Rawat 2024, Table 1 |" in text  # TPT: the printed average is the mean


def test_published_imagenet_c_averages_show_both() -> None:
    found = {}
    for line in published_rows("imagenet_c_level5.csv"):
        cells = [
            float(value)
            for key, value in line.items()
            if "_" in key and key not in ("printed_average", "uses_training_data")
        ]
        cells += [float(line[key]) for key in ("brightness", "contrast", "fog", "frost", "pixelate", "snow")]
        assert len(cells) == 15
        found[line["method"]] = (round(sum(cells) / 15, 1), float(line["printed_average"]))
    assert found["APM"] == (49.7, 50.3)
    assert found["OpenCLIP zero-shot"] == (44.2, 42.1)


def test_published_rows_can_be_left_out_and_are_marked() -> None:
    records = [Records.open(GOLDEN / "shifts")]
    with_published, without = make_tables(records)[0], make_tables(records, published=False)[0]
    assert {row.kind for row in without.rows} == {"ours"}
    published = [row for row in with_published.rows if row.kind == "published"]
    assert len(published) == 17
    assert all(row.source and row.prompts for row in published)
    assert "APM (published) | ViT-B/16 | not stated |" in FORMATS["markdown"]([with_published])


def test_oracle_appears_only_when_asked_for_and_is_an_upper_bound(golden: list[Table]) -> None:
    plain = make_tables([Records.open(GOLDEN / "shifts")])
    assert "ORACLE" not in "".join(FORMATS[name](plain) for name in FORMATS)
    best_cell = row_of(golden[2], "ORACLE apm, best step of each cell", "oracle").cells["contrast"].accuracy
    best_image = row_of(golden[2], "ORACLE apm, best step of each image", "oracle").cells["contrast"].accuracy
    last = row_of(golden[2], "apm").cells["contrast"].accuracy
    assert best_cell is not None and best_image is not None and last is not None
    assert last <= best_cell <= best_image
    rows = pq.read_table(next((GOLDEN / "corrupted" / "shards" / "digits--contrast--5").glob("*.parquet"))).to_pylist()
    steps = [[p == row["label"] for p in row["step_predictions"][1:]] for row in rows if row["method"] == "apm"]
    assert best_cell == pytest.approx(max(100 * sum(column) / 50 for column in zip(*steps, strict=True)))
    assert best_image == pytest.approx(100 * sum(any(row) for row in steps) / 50)


def test_oracle_without_recorded_steps_says_so() -> None:
    (table,) = make_tables([Records.open(GOLDEN / "hub")], oracle=True, published=False)
    assert not any(row.kind == "oracle" for row in table.rows)
    assert any("--record-steps" in note for note in table.notes)


def test_csv_has_a_line_for_each_number(golden: list[Table]) -> None:
    lines = list(csv.DictReader(io.StringIO(FORMATS["csv"](golden))))
    assert tuple(lines[0]) == CSV_COLUMNS
    (cell,) = [line for line in lines if line["kind"] == "ours" and line["method"] == "tda" and line["column"] == "fog"]
    assert cell["accuracy"] == "84.0"
    assert cell["marks"] == "generated"
    assert {line["kind"] for line in lines} == {"ours", "published", "oracle"}


def test_runs_of_one_method_come_together_and_other_settings_are_told_apart(tmp_path: Path) -> None:
    make_run(tmp_path / "a", [Plain()], make_dataset(name="imagenet"))
    make_run(tmp_path / "b", [Plain()], make_dataset(name="imagenet-a"))
    make_run(tmp_path / "c", [Plain(turn=5.0)], make_dataset(name="imagenet-a"))
    (table,) = make_tables([Records.open(tmp_path / name) for name in "abc"], published=False)
    names = {row.method: sorted(row.cells) for row in table.rows}
    assert names == {"plain (turn=3.0)": ["imagenet", "imagenet-a"], "plain (turn=5.0)": ["imagenet-a"]}


def test_seeds_and_weights_make_rows_of_their_own_and_other_images_are_said(tmp_path: Path) -> None:
    make_run(tmp_path / "a", [Plain()], make_dataset(name="imagenet"))
    make_run(tmp_path / "b", [Plain()], make_dataset(name="imagenet-a"), seed=1)
    make_run(tmp_path / "c", [Plain()], make_dataset(15, name="imagenet-a"))
    run = json.loads((tmp_path / "c" / "run.json").read_text())
    run["teacher"]["identity"] = run["config"]["teacher"] = "fake@other"
    (tmp_path / "c" / "run.json").write_text(json.dumps(run))
    (table,) = make_tables([Records.open(tmp_path / name) for name in "abc"], published=False)
    names = {row.method: sorted(row.cells) for row in table.rows}
    own = FakeTeacher().identity
    assert names == {
        f"plain (seed=0, teacher={own})": ["imagenet"],
        f"plain (seed=1, teacher={own})": ["imagenet-a"],
        "plain (seed=0, teacher=fake@other)": ["imagenet-a"],
    }
    assert "imagenet-a: the rows are not all of the same images; compare them with care." in table.notes
    assert not any(note.startswith("imagenet: the rows are not all") for note in table.notes)


def test_the_same_cell_twice_makes_two_rows_that_name_their_runs(tmp_path: Path) -> None:
    for name in "ab":
        make_run(tmp_path / name, [Plain()], make_dataset())
    (table,) = make_tables([Records.open(tmp_path / name) for name in "ab"])
    assert [row.source for row in table.rows] == [str(tmp_path / "a"), str(tmp_path / "b")]


def test_a_run_with_a_cell_that_is_there_already_keeps_its_cells_together(tmp_path: Path) -> None:
    make_run(tmp_path / "a", [Plain()], make_dataset(name="dtd"))
    make_run(tmp_path / "b", [Plain()], [make_dataset(name="dtd"), make_dataset(name="pets")])
    (table,) = make_tables([Records.open(tmp_path / name) for name in "ab"], published=False)
    assert {row.source: sorted(row.cells) for row in table.rows} == {
        str(tmp_path / "a"): ["dtd"],
        str(tmp_path / "b"): ["dtd", "pets"],
    }


def test_a_run_that_is_not_finished_is_marked(tmp_path: Path) -> None:
    make_run(tmp_path, [Plain()], make_dataset(40))
    shards = sorted((tmp_path / "shards" / "digits").glob("*.parquet"))
    table = pq.read_table(shards[0])
    pq.write_table(table.slice(0, 30), shards[0])
    (made,) = make_tables([Records.open(tmp_path)])
    score = made.rows[0].cells["digits"]
    assert score.n == 30
    assert "incomplete" in score.marks


def test_folders_are_told_apart_by_their_path(tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        make_run(tmp_path / name, [Plain()], make_dataset(name="folder", source=f"/data/{name}/val"))
    (table,) = make_tables([Records.open(tmp_path / name) for name in ("cats", "dogs")])
    assert table.columns == ("cats/val", "dogs/val")
    assert len(table.rows) == 1


def test_counts_and_sources_that_are_equal_are_said_once(tmp_path: Path) -> None:
    for name, images in (("a", 20), ("b", 15)):
        make_run(tmp_path / name, [Plain()], [make_dataset(images, name="dtd"), make_dataset(20, name="pets")])
    (alone,) = make_tables([Records.open(tmp_path / "a")], published=False)
    shown = grid(alone)
    assert "source" not in shown.headings and "(n=" not in str(shown.rows)
    assert shown.notes[:2] == ("images: n=20 in dtd, pets", f"source: {tmp_path / 'a'}")
    (both,) = make_tables([Records.open(tmp_path / name) for name in "ab"], published=False)
    shown = grid(both)
    assert shown.notes[0] == "images: n=20 in pets"
    dtd, pets = (shown.headings.index(name) for name in ("dtd", "pets"))
    assert ["(n=20)" in row[dtd] for row in shown.rows] == [True, False]
    assert "(n=15)" in shown.rows[1][dtd] and not any("n=" in row[pets] for row in shown.rows)
    assert [row[shown.headings.index("source")] for row in shown.rows] == [str(tmp_path / name) for name in "ab"]


def test_names_cannot_break_the_markup(tmp_path: Path) -> None:
    make_run(tmp_path, [Plain("a|b_&%{}\\|<i>\n>")], make_dataset(notes=("<b>\nx",)))
    tables = make_tables([Records.open(tmp_path)])
    markdown, latex = FORMATS["markdown"](tables), FORMATS["latex"](tables)
    rows = [line for line in markdown.splitlines() if line.startswith("| a")]
    assert len(rows) == 2
    assert all(line.startswith(r"| a\|b_&%{}\\\|&lt;i> > |") for line in rows)
    assert "- digits: &lt;b> x" in markdown.splitlines()
    assert r"a\textbar{}b\_\&\%\{\}\textbackslash{}\textbar{}$<$i$>$ $>$ &" in latex
    assert next(csv.DictReader(io.StringIO(FORMATS["csv"](tables))))["method"] == "a|b_&%{}\\|<i>\n>"


class Choosy(Plain):
    """Cannot use several prompts at once."""

    def own_prompt(self, templates: Sequence[str]) -> str:
        return templates[0] if len(templates) == 1 else "an image of a {}"


def test_a_method_with_a_prompt_of_its_own_is_marked(tmp_path: Path) -> None:
    several = make_dataset(name="dtd", templates=("a {}", "the {}"), prompts_name="two")
    single = make_dataset(name="pets")
    make_run(tmp_path / "run", [Plain(), Choosy("choosy")], [several, single])
    record = Records.open(tmp_path / "run")
    assert record.cells["dtd"]["own_prompts"] == {"choosy": "an image of a {}"}
    assert "own_prompts" not in record.cells["pets"]
    schema("benchmarks/run.schema.json").validate(json.loads((tmp_path / "run" / "run.json").read_text()))
    (table,) = make_tables([record], published=False)
    plain, choosy = row_of(table, "plain"), row_of(table, "choosy")
    assert "own prompt" in choosy.cells["dtd"].marks
    assert not any("own prompt" in score.marks for score in (choosy.cells["pets"], *plain.cells.values()))
    assert plain.prompts == "two, single"
    assert choosy.prompts == '"an image of a {}", single'
    sign, text = MARKS["own prompt"]
    assert f"{sign} {text}" in table.notes
    assert sign in FORMATS["markdown"]([table])
    assert r"\P{}" in FORMATS["latex"]([table])
    assert make_run(tmp_path / "run", [Plain(), Choosy("choosy")], [several, single]).failed == 0  # continued


def test_latex_is_ready_to_paste(golden: list[Table]) -> None:
    text = FORMATS["latex"](golden)
    assert text.startswith("% needs \\usepackage{booktabs}\n")
    for what in ("table", "tabular"):
        assert text.count(rf"\begin{{{what}}}") == text.count(rf"\end{{{what}}}") > 0
    assert (
        text.count(r"\toprule")
        == text.count(r"\midrule")
        == text.count(r"\bottomrule")
        == text.count(r"\begin{tabular}")
    )
    for block in text.split(r"\begin{tabular}{")[1:]:
        columns = len(block.partition("}")[0])
        lines = block.partition(r"\end{tabular}")[0].splitlines()
        assert all(re.sub(r"\\&", "", line).count("&") == columns - 1 for line in lines if line.endswith(r"\\")), block
    bold = [line.partition(" & ")[0] for line in text.splitlines() if r"\textbf" in line]
    assert {"zero-shot", "apm"} <= set(bold)
    assert not [name for name in bold if "published" in name or "ORACLE" in name]
