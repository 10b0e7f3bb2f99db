"""`apm bench`, `apm table`, `apm compare`: what they print, where, and with which exit code."""

from __future__ import annotations

import json
import re
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import apm.teachers
from apm.benchmarks.runs import runner, session
from apm.benchmarks.runs.records import Records, RunFolder
from apm.cli.main import app
from apm.errors import TeacherError
from apm.processes import Group
from tests.benchmarks.made_runs import picture
from tests.benchmarks.make_table_golden import GOLDEN
from tests.fakes import FakeTeacher
from tests.schemas import schema

DESCRIBED = ("digits", "--protocol", "published", "--descriptors")
DIGITS = ("digits", "--limit", "20", "--method", "zero-shot", "--method", "tda")


@pytest.fixture(autouse=True)
def fake_teacher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeTeacher:
    teacher = FakeTeacher()

    def load(name: str, **_: object) -> FakeTeacher:
        if name != "fake":
            raise TeacherError(f'No teacher "{name}".')
        return teacher

    monkeypatch.setattr(apm.teachers, "check_teacher", lambda name: None)
    monkeypatch.setattr(apm.teachers, "load_teacher", load)
    monkeypatch.chdir(tmp_path)
    return teacher


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    """A folder of two classes with three pictures each."""
    for name in ("cat", "dog"):
        (tmp_path / "animals" / name).mkdir(parents=True)
        for number in range(3):
            picture(number).save(tmp_path / "animals" / name / f"{number}.png")
    return tmp_path / "animals"


def apm_(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def bench(*arguments: object, teacher: str = "fake") -> Result:
    return apm_("bench", "--teacher", teacher, "--device", "cpu", *arguments)


def test_bench_prints_a_table_and_keeps_records(tmp_path: Path) -> None:
    result = bench(*DIGITS, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "Other data sets" in result.stdout
    assert "digits: Subset: 20 of 901 images" in result.stdout
    assert "20/20 digits (1/1) zero-shot" in result.stderr
    record = Records.open(tmp_path / "run")
    assert list(record.methods) == ["zero-shot", "tda"]
    assert record.run["counts"]["digits"] == {"images": 20, "rows": 40, "failed_images": 0}
    assert sum(len(rows) for _, rows in record.rows("digits")) == 40


def test_bench_again_continues_and_another_configuration_is_refused(tmp_path: Path, fake_teacher: FakeTeacher) -> None:
    bench(*DIGITS, "--out", "run")
    before = fake_teacher.image_calls
    again = bench(*DIGITS, "--out", "run")
    assert again.exit_code == 0
    assert fake_teacher.image_calls == before
    assert "Continuing run: 20 images are done." in again.stderr
    other = bench(*DIGITS, "--out", "run", "--seed", "3")
    assert other.exit_code == 2
    assert "seed: 0 before, 3 now" in other.stderr
    assert bench(*DIGITS, "--out", "run", "--seed", "3", "--fresh").exit_code == 0
    assert Records.open("run").run["config"]["seed"] == 3


def test_orders_are_runs_beside_each_other_and_one_row(tmp_path: Path) -> None:
    result = bench(*DIGITS, "--out", tmp_path / "run", "--order", 5, "--orders", 3, "--json")
    assert result.exit_code == 0, result.output
    folders = [tmp_path / name for name in ("run", "run-order-6", "run-order-7")]
    assert sorted(path for path in tmp_path.iterdir() if path.name.startswith("run")) == folders
    records = [Records.open(path) for path in folders]
    assert [record.run["config"]["order"] for record in records] == [5, 6, 7]
    assert [list(record.methods) for record in records] == [["zero-shot", "tda"], ["tda"], ["tda"]]
    (table,) = json.loads(result.stdout)["tables"]
    assert [row["method"].split(" (")[0] for row in table["rows"]] == ["zero-shot", "tda"]
    assert table["rows"][1]["settings"]["order"] == "5, 6, 7"
    again = bench(*DIGITS, "--out", tmp_path / "run", "--order", 5, "--orders", 3, "--json")
    assert again.stdout == result.stdout
    assert "20 images are done" in again.stderr


def test_protocols_and_oracles_are_asked_for(tmp_path: Path) -> None:
    search = ("digits", "--limit", "6", "--method", "dmn:alpha=oracle,views=2")
    refused = bench(*search)
    assert refused.exit_code == 2 and "it needs --oracle" in refused.stderr
    shown = bench(*search, "--oracle", "--out", tmp_path / "oracle")
    assert shown.exit_code == 0 and "ORACLE dmn[views=2], best alpha of each cell" in shown.stdout, shown.output
    published = bench(*DIGITS, "--protocol", "published", "--out", tmp_path / "published")
    assert published.exit_code == 0 and "Protocol published: each method with its authors' own" in published.stdout
    assert Records.open(tmp_path / "published").run["config"]["protocol"] == "published"


def test_descriptors_are_a_users_file_for_the_methods_that_take_them(tmp_path: Path) -> None:
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    file = tmp_path / "cupl.json"
    file.write_text(json.dumps({name.title(): [f"The digit {name}.", f"A written {name}."] for name in names[:9]}))
    arguments = (*DESCRIBED, f"digits={file}", "--limit", "4", "--method", "dmn:views=1", "--method", "zero-shot")
    refused = bench(*arguments, "--out", "run")
    assert refused.exit_code == 2 and 'not 1 of the 10 asked for: "nine"' in refused.stderr and not Path("run").exists()
    file.write_text(json.dumps({name.title(): [f"The digit {name}.", f"A written {name}."] for name in names}))
    result = bench(*arguments, "--out", "run")
    assert result.exit_code == 0, result.output
    assert "LLM descriptors of classes from cupl.json (SHA-256 " in result.stdout
    schema("benchmarks/run.schema.json").validate(json.loads(Path("run/run.json").read_text()))
    again = bench("digits", "--protocol", "published", *arguments[5:], "--out", "run")
    assert again.exit_code == 2 and 'descriptors: "yes" before, "no" now' in again.stderr
    assert "published:" not in again.stderr  # the same in prose


def test_the_default_folder_says_data_and_teacher() -> None:
    result = bench("digits", "--limit", "2", "--method", "zero-shot", "--quiet")
    assert result.stderr.startswith("WARNING") or not result.stderr  # two images are always near chance
    assert Path("runs/digits-fake/run.json").is_file()


def test_json_is_the_tables_document_and_nothing_else(tmp_path: Path) -> None:
    result = bench(*DIGITS, "--json", "--out", "run")
    document = json.loads(result.stdout)
    schema("benchmarks/table.schema.json").validate(document)
    assert document == json.loads(apm_("table", "run", "--format", "json").stdout)


@pytest.mark.slow
def test_apm_and_peers_share_one_run_with_corruptions(tmp_path: Path) -> None:
    result = bench(
        *("digits", "--limit", "3", "--corruption", "clean", "--corruption", "contrast"),
        *("--level", "2", "--level", "4"),
        *("--method", "apm", "--method", "mta", "--method", "zero:views=4", "--target", "cls", "--target", "mean"),
        *("--preset", "small", "--steps", "2", "--precision", "fp32", "--views", "6", "--record-steps", "--out", "run"),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    record = Records.open("run")
    assert list(record.cells) == ["digits", "digits/contrast/2", "digits/contrast/4"]
    assert list(record.methods) == ["apm", "apm[mean,6]", "mta", "zero[views=4]"]
    assert record.methods["apm"]["precision"] == "fp32"
    rows = dict(record.rows("digits/contrast/4"))
    steps = rows["apm"].step_predictions
    assert steps is not None and steps.shape == (3, 3)
    assert rows["mta"].step_predictions is None
    text = apm_("table", "run", "--oracle", "--format", "markdown").stdout
    assert "digits: corruptions at level 4" in text
    assert "generated: not comparable with the official files" in text
    assert "ORACLE apm, best step of each cell" in text


def test_auto_precision_stays_that_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("digits", "--limit", "1", "--preset", "small", "--steps", "1", "--out", "run")
    monkeypatch.setattr("apm.student.matmul.measured_precision", lambda device: "fp32")
    monkeypatch.setattr("apm.student.matmul.bf16_gain", lambda device: 0.5)
    first = bench(*arguments)
    assert first.exit_code == 0 and "bf16" not in first.stderr
    monkeypatch.setattr("apm.student.matmul.measured_precision", lambda device: "bf16")
    again = bench(*arguments)
    assert again.exit_code == 0, again.stderr
    assert Records.open("run").methods["apm"]["precision"] == "fp32"
    slow = bench(*arguments[:-1], "another", "--precision", "bf16", "--quiet")
    assert slow.exit_code == 0 and slow.stderr.count("note: Products in bf16 are slower") == 1


def test_a_folder_with_a_damaged_image_is_answered_but_for_that(animals: Path) -> None:
    (animals / "cat" / "1.png").write_bytes(b"no picture")
    result = bench("folder", "--root", animals, "--method", "zero-shot", "--out", "run")
    assert result.exit_code == 1
    assert "cat/1.png" in result.stderr
    assert "1 image(s) have no answer" in result.stderr
    assert "images: n=5 in " in result.stdout
    assert "*" in result.stdout.partition("images:")[0]


def test_interrupting_says_how_to_continue(monkeypatch: pytest.MonkeyPatch) -> None:
    real = session.score
    calls = []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(session, "score", interrupted)
    result = bench(*DIGITS, "--batch-size", "4", "--out", "run")
    assert result.exit_code == 130
    assert "interrupted: what was answered is in run. To continue: apm" in result.stderr
    assert "Traceback" not in result.output
    assert RunFolder("run").read("digits").num_rows == 2  # one image, two methods; the next batch had one method only
    monkeypatch.undo()


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_interrupted_processes_the_first_says_so(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", interrupted)
    monkeypatch.setattr("apm.processes.join", lambda: nullcontext(Group(rank)))
    result = bench(*DIGITS, "--precision", "fp32", "--out", "run")
    assert result.exit_code == 130 and "Traceback" not in result.output
    assert result.stderr.count("interrupted: what was answered is in run.") == (rank == 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digit"], 'Unknown data set "digit". Did you mean "digits"?'),
        ([], "No data set is named."),
        (["digits", "--method", "zeroshot"], 'Did you mean "zero-shot"'),
        (["digits", "--corruption", "fogg"], 'Unknown corruption "fogg". Did you mean "fog"'),
        (["digits", "--corruption", "fog", "--level", "9"], "9"),
        (["digits", "--target", "mtb"], 'Did you mean "mta"'),
        (["digits", "--prompts", "singel"], 'Did you mean "single"'),
        (["digits", "--template", "no slot"], "no slot"),
        (["digits", "--limit", "0"], "--limit must be 1 or more, not 0"),
        (["digits", "--batch-size", "0"], "--batch-size must be 1 or more, not 0"),
        (["digits", "--workers", "0"], "--workers must be 1 or more, not 0"),
        (["digits", "--seed", "-1"], "--seed must be from 0 to 9223372036854775807, not -1"),
        (["digits", "--seed", str(2**63)], "--seed must be from 0 to 9223372036854775807"),
        (["digits", "--orders", "0"], "--orders must be 1 or more, not 0"),
        (["digits", "--order", "-1"], "--order must be from 0 to 4611686018427387904, not -1"),
        (["digits", "--orders", "2", "--method", "zero-shot"], "none of zero-shot does"),
        (["digits", "--protocol", "publishd"], 'Did you mean "published"'),
        (["digits", "--protocol", "published", "--views", "8"], "--views with --protocol published"),
        (["digits", "--descriptors", "a.json"], "--descriptors needs --protocol published"),
        ([*DESCRIBED, "a.json", "--method", "tda"], "--descriptors is used by tps, dmn, dpe"),
        ([*DESCRIBED, "a.json", "--method", "dmn"], 'The descriptors "a.json" cannot be read: No such file'),
        ([*DESCRIBED, "digit=a.json", "--method", "dmn"], 'Unknown data set "digit". Did you mean "digits"'),
        ([*DESCRIBED, "pets=a.json", "--method", "dmn"], "pets is not in this run"),
        (["pets", *DESCRIBED, "digits=a", "--method", "dmn"], "No descriptors are given for pets: add --descriptors"),
        ([*DESCRIBED, "digits=a", "--descriptors", "digits=b", "--method", "dmn"], "digits has a file already, a"),
        ([*DESCRIBED, "a", "--descriptors", "b", "--method", "dmn"], "a and b are both for every data set"),
        (["imagenet"], "--root"),
        (["imagenet-c", "--corruption", "clean"], "holds no clean images"),
        (["digits", "pets", "--source", "hf:a/b"], "--source works with one data set"),
        (["digits", "--steps", "0"], "untrained student"),
        (["digits", "--device", "gpu"], 'Unknown device "gpu"'),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_2(arguments: list[str], message: str) -> None:
    result = bench(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not result.stdout
    assert not Path("runs").exists()


def test_fresh_is_refused_on_many_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    result = bench("digits", "--fresh")
    assert result.exit_code == 2
    assert "--fresh works with one process only" in result.stderr


def test_fresh_does_not_start_over_in_a_restarted_process(monkeypatch: pytest.MonkeyPatch) -> None:
    bench(*DIGITS, "--out", "run")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert "20 images are done" in bench(*DIGITS, "--out", "run", "--fresh").stderr


def test_an_unknown_teacher_is_an_error_and_never_a_fallback() -> None:
    result = bench("digits", teacher="nobody")
    assert result.exit_code == 2
    assert 'No teacher "nobody"' in result.stderr


def test_list_shows_every_data_set_and_what_is_there(animals: Path) -> None:
    result = apm_("bench", "--list", "--root", animals)
    assert result.exit_code == 0
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    assert "always there" in lines["digits"]
    assert "50,000" in lines["imagenet"] and " no " in lines["imagenet"]
    assert "<class>/" in lines["folder"]
    assert "natural-shifts" in result.stdout
    rows = [json.loads(line) for line in apm_("bench", "cross-dataset", "--list", "--json").stdout.splitlines()]
    assert len(rows) == 9
    assert all(row["found"] is None and row["suites"] == ["cross-dataset"] for row in rows)


@pytest.mark.parametrize("form", ["rich", "markdown", "csv", "json", "latex"])
def test_table_formats(form: str) -> None:
    result = apm_("table", GOLDEN / "shifts", GOLDEN / "hub", "--format", form)
    assert result.exit_code == 0
    assert "CLIP zero-shot" in result.stdout
    assert "ORACLE" not in result.stdout
    assert "WARNING: caltech101: zero-shot 0.0 % of 80" in result.stderr


def test_rich_tables_are_never_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    text = apm_("table", GOLDEN / "shifts").stdout
    assert "63.3 ± 6.2†" in text
    assert "…" not in text.replace("RUN…", "")


def test_table_without_published_rows() -> None:
    assert "published" not in apm_("table", GOLDEN / "shifts", "--no-published").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table", "nowhere"], "No run at"),
        (["table", str(GOLDEN / "hub"), "--format", "markdwon"], 'Did you mean "markdown"'),
        (["compare", "nowhere", "elsewhere"], "No run at"),
        (["compare", str(GOLDEN / "hub"), str(GOLDEN / "hub"), "--tolerance", "-1"], "--tolerance is -1"),
        (["compare", str(GOLDEN / "hub"), str(GOLDEN / "shifts")], "different configurations"),
    ],
)
def test_mistakes_of_table_and_compare(arguments: list[str], message: str) -> None:
    result = apm_(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_compare_passes_on_the_same_and_fails_by_name_on_another() -> None:
    bench(*DIGITS, "--out", "old")
    same = apm_("compare", "old", "old")
    assert same.exit_code == 0
    assert same.stdout.count(" ok") == 2
    shutil.copytree("old", "new")
    folder = RunFolder("new")
    rows = folder.read("digits").to_pylist()
    changed = [row for row in rows if row["method"] == "tda"][:3]
    for row in changed:
        row["prediction"] = (row["prediction"] + 1) % 10
    for shard in folder.shards("digits"):
        shard.unlink()
    from apm.benchmarks.runs.rows import Row

    folder.append("digits", [Row(**row) for row in rows])
    worse = apm_("compare", "new", "old", "--tolerance", "100")
    assert worse.exit_code == 1
    assert "digits, tda: 3 of 20 predictions changed (1 % allowed)" in worse.stderr
    for row in changed:
        assert row["id"] in worse.stderr
    assert "zero-shot:" not in worse.stderr
    assert apm_("compare", "new", "old", "--tolerance", "100", "--max-changed", "15").exit_code == 0
    lines = [json.loads(line) for line in apm_("compare", "new", "old", "--json").stdout.splitlines()]
    assert {tuple(sorted(line["changed"])) for line in lines if line["method"] == "tda"} == {
        tuple(sorted(row["id"] for row in changed))
    }


def test_grayscale_folders_work_too(animals: Path) -> None:
    Image.new("L", (5, 5)).save(animals / "cat" / "grey.png")
    assert bench("folder", "--root", animals, "--method", "zero-shot", "--out", "run").exit_code == 0


def test_no_name_reaches_the_terminal_as_a_command(tmp_path: Path) -> None:
    """File names, class names, templates and run.json hold what clears a screen, turns text round, or ends a line."""
    evil = "x\x1b[2J\x9b3m\x07\u202e\x7f"
    for name in ("cat", f"dog{evil}"):
        (tmp_path / "animals" / name).mkdir(parents=True)
        for number in range(3):
            picture(number).save(tmp_path / "animals" / name / f"{number}{evil}.png")
    (tmp_path / "animals" / "cat" / f"broken{evil}.png").write_bytes(b"no picture")
    run, plain = f"run{evil}", ("--root", tmp_path / "animals", "--method", "zero-shot")
    results = [
        bench("folder", *plain, "--template", f"a {evil} {{}}.", "--out", run),
        bench("folder", *plain, "--template", f"a {evil}.", "--out", run),
        bench("folder", *plain, "--template", f"the {evil} {{}}.", "--out", run),
        bench(f"fold{evil}"),
    ]
    record = json.loads((Path(run) / "run.json").read_text())
    for cell in record["cells"].values():
        cell.update(title=evil, notes=[evil], prompts=evil)
    record["teacher"]["name"] = evil
    (Path(run) / "run.json").write_text(json.dumps(record))
    results += [apm_("table", run, "--format", name) for name in ("rich", "markdown", "csv", "json", "latex")]
    results += [apm_("compare", run, run), apm_("compare", run, run, "--json"), apm_("report", run, "--out", evil)]
    for result in results:
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        for text in (result.stdout, result.stderr):
            assert all(c.isprintable() or c in "\n\t" for c in text), text
    assert "\\x1b[2J" in results[0].stderr
    assert json.loads(results[7].stdout)["tables"][0]["rows"][0]["teacher"] == evil  # JSON holds the name itself


def test_a_table_too_wide_for_the_terminal_is_turned(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from apm.cli.table import print_table

    headings, rows = ["method", *"abcdefgh"], [["zero-shot", *["55.5 ± 1.0"] * 8], ["apm", *["66.6 ± 1.0"] * 8]]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    three = [*rows, ["tpt", *["77.7 ± 1.0"] * 8]]
    monkeypatch.setenv("COLUMNS", "33")  # three methods abreast would take 42: blocks of two columns
    print_table(headings, three, title="a table")
    blocks = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).split("\n\n")
    assert [block.splitlines()[-4].split() for block in blocks] == [
        ["method", *pair] for pair in ("ab", "cd", "ef", "gh")
    ]
    assert all(len(line) <= 33 for block in blocks for line in block.splitlines())
    assert "".join(blocks).count("a table") == 1
    for width, first in (("200", "a"), ("60", "zero-shot"), ("20", "a")):
        monkeypatch.setenv("COLUMNS", width)
        print_table(headings, rows)
        lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
        assert lines[0].split()[:2] == ["method", first], lines
        assert len(lines) == (9 if width == "60" else 3)
