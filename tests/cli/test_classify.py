"""`apm classify`: what it prints, in which order, and what it says about bad input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from apm import classifier as module
from apm.cli.main import app
from apm.errors import TeacherError
from apm.images.files import alone_with
from apm.images.load import MAX_PIXELS
from apm.test_time.options import AdaptConfig
from apm.test_time.targets import TARGETS
from tests.fakes import FakeTeacher, png_of_size
from tests.schemas import schema

pytestmark = pytest.mark.usefixtures("fake_teacher", "narrow_students")

SCHEMA = schema("cli/classify.json")
FAST = ("--preset", "small", "--steps", "2", "--precision", "fp32", "--device", "cpu")
LABELS = ("--labels", "cat, dog,bird,house")


def classify(*arguments: str | Path, stdin: str | bytes | None = None, labels: tuple[str, ...] = LABELS) -> Result:
    command = ["classify", "--teacher", "fake", *labels, *FAST, *map(str, arguments)]
    return CliRunner().invoke(app, command, input=stdin)


def records(result: Result) -> list[dict[str, Any]]:
    lines = [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        for line in result.stdout.splitlines()
    ]
    for line in lines:
        SCHEMA.validate(line)
    return lines


def test_the_schema_is_one(picture: Path) -> None:
    (good,) = records(classify("--json", picture))
    for change in ({"top": []}, {"agree": None}, {"adaptation": None}, {"extra": 1}, {"error": "no"}):
        with pytest.raises(jsonschema.ValidationError):
            SCHEMA.validate({**good, **change})


@pytest.mark.parametrize("quiet", [(), ("--quiet",)])
def test_the_slower_precision_is_never_taken_silently(
    picture: Path, quiet: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apm.student.matmul.bf16_gain", lambda device: 0.5)
    assert classify(*quiet, "--precision", "bf16", picture).stderr.splitlines() == [
        "note: Products in bf16 are slower than in fp32 on this machine (2.0 times as long in a small test): "
        "--precision auto takes the faster."
    ]
    assert classify(*quiet, "--precision", "fp32", picture).stderr == ""


def test_json_record(picture: Path, fake_teacher: FakeTeacher) -> None:
    result = classify("--json", "--top-k", "3", "--seed", "5", "--lr", "0.001", picture)
    assert result.exit_code == 0 and result.stderr == ""
    (record,) = records(result)
    assert record["path"] == str(picture)
    assert record["teacher"] == {"name": "fake", "identity": fake_teacher.identity, "fallback": False, "notes": []}
    assert record["labels"] == {"source": "labels", "count": 4}
    assert record["prompts"] == {"source": "single", "count": 1}
    assert len(record["top"]) == len(record["teacher_top"]) == 3
    assert record["agree"] == (record["top"][0]["label"] == record["teacher_top"][0]["label"])
    adaptation = record["adaptation"]
    assert (adaptation["steps"], adaptation["seed"], adaptation["lr"], adaptation["preset"]) == (2, 5, 0.001, "small")
    assert (adaptation["target"], adaptation["views"]) == ("cls", 1)
    assert record["unsure"] is False and record["file"]["bytes"] == picture.stat().st_size
    assert "losses" not in adaptation and "cosines" not in adaptation
    (detailed,) = records(classify("--json", "--steps-detail", picture))
    assert len(detailed["adaptation"]["losses"]) == len(detailed["adaptation"]["cosines"]) == 2


def test_view(picture: Path) -> None:
    result = classify(picture)
    assert result.exit_code == 0 and result.stderr == ""
    title, heading, first, *_ = result.stdout.splitlines()
    assert title == str(picture)
    assert heading.split() == ["student", "teacher", "fake"]
    assert re.fullmatch(r"  \w+ +\d+\.\d% +\w+ +\d+\.\d%", first)
    assert first.index("%") + 3 == heading.index("teacher")
    assert all(line == line.rstrip() for line in result.stdout.splitlines())
    assert re.search(r"(agree|DISAGREE) · 2 steps · loss \S+ → \S+ · cosine -?0\.\d{4} · \d+\.\d s\n", result.stdout)


def test_quiet(picture: Path) -> None:
    result = classify("--quiet", picture)
    path, label, probability = result.stdout.rstrip("\n").split("\t")
    assert (path, result.stderr) == (str(picture), "")
    assert label in ("cat", "dog", "bird", "house") and 0 <= float(probability) <= 1


def test_order_and_sources_of_paths(picture: Path, tmp_path: Path) -> None:
    folder = tmp_path / "many pictures"
    folder.mkdir()
    for name in ("b.png", "a.jpg", "c.webp"):
        Image.new("RGB", (12, 10), "orange").save(folder / name)
    result = classify(
        "--json", "--batch-size", "2", f"{folder}/*.webp", "-", folder, stdin=f"{picture}\n\n{folder}/b.png\n"
    )
    assert result.exit_code == 0
    assert [Path(record["path"]).name for record in records(result)] == [
        *("c.webp", "picture.jpg", "b.png"),
        *("a.jpg", "b.png", "c.webp"),
    ]


def test_nothing_on_stdin() -> None:
    result = classify("-", stdin="\n")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Stdin held no path" in result.stderr


@pytest.fixture
def bad(tmp_path: Path, picture: Path) -> dict[str, Path]:
    """Return one file of each bad kind, by what must be said about it."""
    folder = tmp_path / "bad"
    (folder / "empty folder").mkdir(parents=True)
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("hello")
    (folder / "cut.jpg").write_bytes(picture.read_bytes()[:-300])
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    (folder / "huge.png").write_bytes(png_of_size(30_000, 30_000))
    (folder / "line\nbreak.jpg").touch()
    return {
        "no such file": folder / "missing.jpg",
        "a folder without images": folder / "empty folder",
        "empty file": folder / "empty.jpg",
        "text, not an image": folder / "text.jpg",
        "truncated": folder / "cut.jpg",
        "1×1 pixels": folder / "dot.png",
        "30000×30000 pixels": folder / "huge.png",
        r"line\nbreak.jpg: empty file": folder / "line\nbreak.jpg",
    }


def test_each_bad_input_gets_one_line_and_the_rest_is_answered(bad: dict[str, Path], picture: Path) -> None:
    result = classify("--json", *bad.values(), picture)
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert len(lines) == len(bad) and "Traceback" not in result.stderr
    *failed, good = records(result)
    assert [record["path"] for record in failed] == [str(path) for path in bad.values()]
    # What the names alone show is told at once, the rest as it comes; the records stand in the inputs' order.
    assert sorted(f"error: {record['error']}" for record in failed) == sorted(lines)
    for record, (cause, path) in zip(failed, bad.items(), strict=True):
        assert cause in record["error"] and path.name.split("\n")[0] in record["error"]
    assert good["error"] is None and good["path"] == str(picture)


def test_view_prints_nothing_for_a_failed_file(picture: Path, tmp_path: Path) -> None:
    result = classify(tmp_path / "missing.jpg", picture)
    assert result.exit_code == 1
    assert "missing" not in result.stdout and str(picture) in result.stdout


def test_max_pixels(picture: Path) -> None:
    result = classify("--max-pixels", "1000", picture)
    assert result.exit_code == 1 and "limit of 1000 pixels" in result.stderr


def _palette(path: Path) -> None:
    image = Image.new("P", (9, 9))
    image.putpalette([0, 128, 128])
    image.save(path, transparency=0)


KINDS: dict[str, tuple[Callable[[Path], None], str | None]] = {
    "cmyk.jpg": (lambda path: Image.new("CMYK", (9, 9)).save(path), None),
    "sixteen.png": (lambda path: Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(path), None),
    "palette.png": (_palette, "on white"),
    "grey alpha.png": (lambda path: Image.new("LA", (9, 9), (9, 9)).save(path), "on white"),
    "moving.gif": (
        lambda path: Image.new("RGB", (9, 9)).save(
            path, save_all=True, append_images=[Image.new("RGB", (9, 9), "red")]
        ),
        "only the first is used",
    ),
    "naïve [bold]猫[red].png": (lambda path: Image.new("RGB", (9, 9)).save(path), None),
}


@pytest.mark.parametrize("name", KINDS)
def test_unusual_images_work(name: str, tmp_path: Path) -> None:
    make, note = KINDS[name]
    make(tmp_path / name)
    (record,) = records(classify("--json", tmp_path / name))
    assert record["error"] is None
    assert (record["notes"] == []) if note is None else (note in record["notes"][0])
    view = classify(tmp_path / name).stdout
    assert name in view and (note is None or note in view)


def test_undecodable_name(tmp_path: Path) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.png")
    Image.new("RGB", (9, 9)).save(os.fsdecode(path), format="PNG")
    (record,) = records(classify("--json", tmp_path))
    assert os.fsencode(record["path"]) == path
    assert r"caf\udce9.png" in classify(tmp_path).stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--labels", "cat,dog", "--label-set", "imagenet"), "--labels and --label-set exclude each other"),
        (("--labels", "a,b", "--labels-file", "f"), "--labels and --labels-file"),
        (("--labels", ""), "no name"),
        (("--labels", "cat"), "only one name"),
        (("--labels", "cat,dog,cat"), "more than once"),
        (("--labels-file", "{tmp}/missing.txt"), "missing.txt"),
        (("--labels-file", "{tmp}/latin1.txt"), "not UTF-8"),
        (("--label-set", "imagnet"), 'Did you mean "imagenet"'),
        (("--prompts", "opena"), 'Did you mean "openai"'),
        (("--prompts", "single", "--template", "a {}"), "--prompts and --template"),
        (("--template", "a photo"), "{}"),
        (("--steps", "0"), "untrained student"),
        (("--lr", "-0.1"), "-0.1"),
        (("--lr", "nan"), "nan"),
        (("--preset", "smal"), 'Did you mean "small"'),
        (("--readout", "men"), 'Did you mean "mean"'),
        (("--precision", "bf61"), 'Did you mean "bf16"'),
        (("--device", "gpu"), '"gpu"'),
        (("--batch-size", "0"), "--batch-size"),
        (("--batch-size", "many"), '"many"'),
        (("--top-k", "0"), "--top-k must be 1 or more, not 0"),
        (("--seed", "-1"), "-1"),
        (("--teacher-name", "x"), "--teacher"),
        (("--steps", "ten"), "'--steps'"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], words: str, picture: Path, tmp_path: Path) -> None:
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9\nbar\n")
    filled = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    result = classify(picture, *filled, labels=())
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.replace("│", " ").split())
    assert result.stdout == "" and "Traceback" not in result.stderr


def test_what_cannot_work_is_told_before_weights_are_fetched(picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apm.teachers.check_teacher", lambda name: pytest.fail("weights were fetched"))
    for arguments in (
        ("--top-k", "0"), ("--min-probability", "2"), ("--steps", "0"), ("--preset", "smal"), ("--queries", "0"),
        ("--label-set", "imagnet"), ("--prompts", "opena"), ("--template", "a photo"),
    ):  # fmt: skip
        result = classify(picture, *arguments, labels=() if "--label-set" in arguments else LABELS)
        assert result.exit_code == 2 and result.stderr.startswith("error: "), result.stderr


def test_help_states_the_real_defaults() -> None:
    shown = " ".join(CliRunner().invoke(app, ["classify", "--help"]).stdout.replace("│", " ").split())
    assert f"each image. Default: {AdaptConfig().steps}." in shown
    assert f"Default: {AdaptConfig().lr}." in shown
    assert f"Default: {MAX_PIXELS}." in shown


def test_no_path() -> None:
    assert classify().exit_code == 2


def test_labels_file_with_blank_lines(picture: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\n\n  \ntruck, red\n")
    (record,) = records(classify("--json", picture, "--labels-file", str(tmp_path / "names.txt"), labels=()))
    assert record["labels"] == {"source": "labels", "count": 2}
    assert {one["label"] for one in record["top"]} == {"cat", "truck, red"}


def test_teacher_error_is_one_line(picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(*_: object, **__: object) -> None:
        raise TeacherError('No teacher "fake".')

    monkeypatch.setattr(module, "load_teacher", unavailable)
    result = classify(picture)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", 'error: No teacher "fake".\n')
    shown = classify(picture, "--debug")
    assert shown.exit_code == 2 and "Traceback" in shown.stderr and shown.stderr.endswith('error: No teacher "fake".\n')


def test_fallback_is_said_once_and_in_the_output(
    picture: Path, fake_teacher: FakeTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_teacher.notes = ("The default teacher cannot be had; the embedded one is used.",)
    monkeypatch.setattr(module, "load_default_teacher", lambda **_: fake_teacher)
    common = ["classify", *LABELS, *FAST, str(picture), str(picture)]
    result = CliRunner().invoke(app, [*common, "--json"])
    assert result.stderr == "note: The default teacher cannot be had; the embedded one is used.\n"
    assert [record["teacher"]["fallback"] for record in records(result)] == [True, True]
    assert records(result)[1]["teacher"]["notes"] == list(fake_teacher.notes)
    assert CliRunner().invoke(app, common).stdout.count("teacher fake (fallback)") == 2
    assert CliRunner().invoke(app, [*common, "--quiet"]).stderr == result.stderr


def without_slow_imports(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command that must end before torch is imported, which the last line of stdout says."""
    code = (
        "import sys\nfrom apm.cli.main import main\n"
        "try:\n    main()\nfinally:\n    print(*({'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "classify", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_wrong_teacher_is_told_before_the_slow_imports(picture: Path) -> None:
    done = without_slow_imports(picture, "--teacher", "ViT-B-16/opnai")
    assert (done.returncode, done.stdout) == (2, "\n")
    assert 'Did you mean "ViT-B-16/openai"' in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("teacher", [(), ("--teacher", "ViT-B-16/openai")])
def test_a_missing_file_is_named_before_anything_is_loaded(teacher: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = without_slow_imports(tmp_path / "missing.jpg", tmp_path / "empty", *teacher)
    assert (done.returncode, done.stdout) == (1, "\n")
    assert done.stderr.splitlines() == [
        f"error: {tmp_path}/missing.jpg: no such file",
        f"error: {tmp_path}/empty: a folder without images",
        "note: nothing is left to classify.",
    ]


def test_failed_inputs_have_records_even_where_no_teacher_was_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_teacher", lambda *_, **__: pytest.fail("the teacher was loaded"))
    result = classify("--json", tmp_path / "missing.jpg")
    assert result.exit_code == 1
    (record,) = records(result)
    assert record["teacher"] is None and record["error"].endswith("missing.jpg: no such file")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_out_is_written_and_continued(suffix: str, picture: Path, tmp_path: Path, fake_teacher: FakeTeacher) -> None:
    other, out = tmp_path / "other.png", tmp_path / f"answers{suffix}"
    Image.new("RGB", (9, 9), "red").save(other)
    first = classify("--out", out, picture)
    assert (first.exit_code, first.stdout) == (0, "")
    assert first.stderr == f"note: 1 answer is in {out}.\n"
    calls = fake_teacher.image_calls
    again = classify("--out", out, "--json", picture, other, tmp_path / "missing.jpg")
    assert again.exit_code == 1 and fake_teacher.image_calls == calls + 1
    assert [record["path"] for record in records(again)] == [str(other), str(tmp_path / "missing.jpg")]
    assert again.stderr.endswith(f"note: 2 answers are in {out}, 1 of them from before.\n")
    if suffix == ".jsonl":
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        for line in lines:
            SCHEMA.validate(line)
        assert [line["path"] for line in lines] == [str(picture), str(other), str(tmp_path / "missing.jpg")]
    refused = classify("--out", out, "--lr", "0.5", picture)
    assert refused.exit_code == 2 and "lr: 0.0001, now 0.5" in refused.stderr
    wrong = classify("--out", tmp_path / "answers.txt", picture)
    assert wrong.exit_code == 2 and "must end in .jsonl or .csv" in wrong.stderr


def test_a_file_named_twice_on_stdin_has_one_answer_in_the_file(picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    result = classify("--out", out, "-", stdin=f"{picture}\n{picture}\n")
    assert (result.exit_code, len(out.read_text().splitlines())) == (0, 1)
    assert result.stderr == f"note: 1 answer is in {out}.\n"


def test_two_processes_do_not_write_to_one_file(picture: Path, tmp_path: Path) -> None:
    with alone_with(tmp_path / "answers.csv", "writing answers to"):
        result = classify("--out", tmp_path / "answers.csv", picture)
    assert result.exit_code == 2 and "Another process is writing answers to" in result.stderr


def test_improbable_answers_are_marked_unsure(picture: Path) -> None:
    for bound, unsure in (("0", False), ("1", True)):
        assert records(classify("--json", "--min-probability", bound, picture))[0]["unsure"] is unsure
        assert ("UNSURE" in classify("--min-probability", bound, picture).stdout) is unsure
        assert classify("--quiet", "--min-probability", bound, picture).stdout.endswith("\tunsure\n") is unsure


@pytest.mark.parametrize("target", ["mean", "confident", "mta", "best"])
def test_target_is_used_and_said(target: str, picture: Path, fake_teacher: FakeTeacher) -> None:
    plain = records(classify("--json", "--steps-detail", picture))[0]
    (record,) = records(classify("--json", "--steps-detail", "--target", target, picture))
    views = TARGETS[target].views
    assert (record["adaptation"]["target"], record["adaptation"]["views"]) == (target, views)
    assert fake_teacher.image_calls == 1 + views
    assert record["teacher_top"] == plain["teacher_top"]  # the teacher's own answer, whatever the target
    assert record["adaptation"]["losses"] != plain["adaptation"]["losses"]


def test_a_teacher_that_stands_in_without_labels_is_said_to_guess(
    picture: Path, fake_teacher: FakeTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_teacher.default_labels = ("French horn", "church", "parachute")
    monkeypatch.setattr(module, "load_default_teacher", lambda **_: fake_teacher)
    said = [CliRunner().invoke(app, ["classify", *more, *FAST, str(picture)]).stderr for more in ((), LABELS)]
    assert ["guesses wildly" in text and "--labels" in text for text in said] == [True, False]


def test_a_failed_file_is_named_to_the_letter(tmp_path: Path) -> None:
    (tmp_path / "two  blanks.jpg").touch()
    assert classify(tmp_path / "two  blanks.jpg").stderr == f"error: {tmp_path}/two  blanks.jpg: empty file\n"


def test_an_empty_path_is_wrong_usage_not_this_folder(picture: Path) -> None:
    result = classify("", picture)
    assert (result.exit_code, result.stdout) == (2, "") and "empty path" in result.stderr


def test_interrupted(picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapt = module.TestTimeTrainer.adapt
    calls: list[int] = []

    def interrupted_in_the_third(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return adapt(self, *arguments, **options)

    monkeypatch.setattr(module.TestTimeTrainer, "adapt", interrupted_in_the_third)
    result = classify("--json", *[picture] * 5)
    assert result.exit_code == 130
    assert len(records(result)) == 2
    assert result.stderr == "interrupted: 2 of 5 images answered.\n"


def test_not_finite_is_said_not_answered(picture: Path) -> None:
    result = classify("--json", "--lr", "1e30", "--steps", "6", picture)
    assert result.exit_code == 1 and "the loss is not finite" in result.stderr
    (record,) = records(result)
    assert record["top"] == [] and record["adaptation"]["last_loss"] is None


@pytest.mark.parametrize(("distil", "readout"), [("cls", "query"), ("grid", "mean"), ("both", "query")])
def test_distil_is_done_and_said(distil: str, readout: str, picture: Path, fake_teacher: FakeTeacher) -> None:
    result = classify("--json", "--distil", distil, "--rgb-weight", "0.5", picture)
    assert result.exit_code == 0
    (record,) = records(result)
    adaptation = record["adaptation"]
    assert (adaptation["distil"], adaptation["readout"], adaptation["rgb_weight"]) == (distil, readout, 0.5)
    assert adaptation["last_loss"] < adaptation["first_loss"]
    assert fake_teacher.grid_calls == (0 if distil == "cls" else 2)  # once to see that there is one
    assert ("read as the field's mean" in result.stderr) == (distil == "grid")
    assert "read as" not in classify("--quiet", "--distil", distil, picture).stderr
    assert "read as" not in classify("--distil", distil, "--readout", "mean", picture).stderr


def test_fewer_queries_are_used_and_said(picture: Path, fake_teacher: FakeTeacher) -> None:
    few, usual, every = (
        records(classify("--json", "--steps-detail", *more, picture))[0]["adaptation"]
        for more in (("--queries", "9"), (), ("--queries", "all"))
    )
    assert (few["queries"], usual["queries"], every["queries"]) == (9, None, None)
    assert few["losses"] != every["losses"] == usual["losses"]


def test_grid_views_are_made_and_said(picture: Path, fake_teacher: FakeTeacher) -> None:
    result = classify("--json", "--distil", "both", "--grid-views", "5", picture)
    assert json.loads(result.stdout)["adaptation"]["grid_views"] == 5
    assert fake_teacher.grid_calls == 1 + 5
    tokens = classify("--json", "--distil", "grid", "--grid-views", "tokens:4", picture)
    assert json.loads(tokens.stdout)["adaptation"]["grid_views"] == "tokens:4" and fake_teacher.grid_calls == 6


def test_softened_targets_are_made_and_said(picture: Path, fake_teacher: FakeTeacher) -> None:
    plain, soft = (
        records(classify("--json", *more, picture))[0]["adaptation"]
        for more in ((), ("--loss", "soft", "--temperature", "2", "--steps", "30", "--lr", "0.001"))
    )
    assert (plain["loss"], soft["loss"], soft["temperature"], soft["queries"]) == ("mse", "soft", 2.0, None)
    assert soft["last_loss"] < 0.5 * soft["first_loss"]


def test_wrong_distil_is_refused(picture: Path) -> None:
    for arguments, words in (
        (("--distil", "grids"), 'Unknown distil "grids"'),
        (("--grid-views", "16"), "add distil=both"),
        (("--distil", "grid", "--grid-views", "few"), 'grid_views is "few"'),
        (("--distil", "grid", "--readout", "query"), 'choose readout="mean"'),
        (("--rgb-weight", "-1"), "--rgb-weight must be 0 or a positive number"),
        (("--loss", "soft", "--distil", "grid"), 'use distil="both"'),
        (("--temperature", "2"), "add loss=soft"),
        (("--queries", "257"), "queries must not exceed the 256 locations"),
        (("--queries", "some"), 'queries is "some"; it must be a number of 1 or more, all, or auto'),
        (("--queries", "0"), 'queries is "0"'),
        (("--target", "mat"), 'Unknown target "mat". Did you mean "mta"'),
        (("--target", "mta", "--distil", "grid"), "uses no token"),
        (("--min-probability", "2"), "--min-probability must be from 0 to 1, not 2"),
        (("--min-probability", "nan"), "--min-probability must be from 0 to 1, not nan"),
    ):
        result = classify(*arguments, picture)
        assert result.exit_code == 2 and words in result.stderr
        assert result.stdout == ""
