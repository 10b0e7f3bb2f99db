"""What holds for the command line as a whole: light help, exit codes, signals, pipes."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import apm
from apm.cli.main import COMMANDS, app, load_command
from apm.cli.options import Debug
from apm.errors import ApmError, ImageError, UsageError, did_you_mean, unknown
from tests.launch import HANG, running
from tests.places import ROOT

HEAVY = {
    "torch",
    "torchvision",
    "open_clip",
    "timm",
    "datasets",
    "numpy",
    "PIL",
    "scipy",
    "skimage",
    "sklearn",
    "cv2",
    "pyarrow",
}

# The command with a teacher that needs no weights, in a process of its own, which Ctrl-C ends whoever started it. Where
# it hangs it says in which line.
FAKE = f"""
import faulthandler, signal
faulthandler.dump_traceback_later({HANG}, exit=True)
signal.signal(signal.SIGINT, signal.default_int_handler)
import apm.classifier
import apm.cli.progress
import apm.teachers
from tests.fakes import FakeTeacher
apm.cli.progress.LINE_EVERY = 3600.0  # a slow machine would say how far it is
apm.teachers.check_teacher = lambda spec: None
apm.classifier.load_teacher = lambda *_, **__: FakeTeacher()
from apm.cli.main import main
main()
"""
FAST = ("--teacher", "fake", "--labels", "cat,dog,bird", "--preset", "small", "--precision", "fp32", "--device", "cpu")


def fake_classify(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-c", FAKE, "classify", *FAST, *map(str, arguments)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["clasify"], *([name, "--help"] for name in COMMANDS)]
)
def test_help_needs_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom apm.cli.main import main\nsys.argv = ['apm', *sys.argv[1:]]\n"
        "try:\n    main()\nfinally:\n    print(*sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd="/", check=False
    )
    assert HEAVY.isdisjoint(done.stderr.splitlines()[-1].split())


MISSING = (
    "classify none.png", "segment none.png --labels a,b --out out",
    "segment here.png --labels a,b --min-area 2 --out out",
    "colourise none.png --checkpoint c --out out", "colourise here.png --checkpoint none --out out",
    "islands none.png --out out", "islands none.png --source teacher:1 --out out",
    "interpolate here.png none.png --checkpoint here.png --out out", "field none.png --checkpoint here.png --out out",
    "glom train none --out o.safetensors", "glom show here.png --checkpoint none --out out",
    "glom show none.png --checkpoint here.png --out out", "glom probe none --checkpoint here.png",
    "mae train none --out o.safetensors", "pretrain none --teacher-grid x --out o.safetensors",
)  # fmt: skip
"""Commands of which something can be told at once, each with what is not there or cannot be."""


@pytest.mark.slow
def test_what_is_not_there_is_told_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom apm.cli.main import app\n"
        "for words in sys.argv[1:]:\n    done = CliRunner().invoke(app, words.split())\n"
        "    print(done.exit_code, done.stderr.replace('\\n', ' '))\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    (tmp_path / "here.png").write_bytes(b"something")
    done = subprocess.run(
        [sys.executable, "-c", code, *MISSING], capture_output=True, text=True, cwd=tmp_path, check=False, timeout=HANG
    )
    *told, modules = done.stdout.splitlines()
    assert len(told) == len(MISSING), done.stderr
    for words, line in zip(MISSING, told, strict=True):
        assert line[0] in "12" and ("none" in line or "min_area" in line), (words, line)
    assert HEAVY.isdisjoint(modules.split())


@pytest.mark.slow
def test_import_apm_is_light() -> None:
    code = "import apm, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert HEAVY.isdisjoint(done.stdout.split())


def test_help_lists_every_command() -> None:
    shown = CliRunner().invoke(app, ["--help"])
    assert shown.exit_code == 0
    for name, (_, summary) in COMMANDS.items():
        assert re.search(rf"│ {name} +{re.escape(summary[:30])}", shown.stdout), name


def commands_of(name: str) -> dict[tuple[str, ...], Any]:
    """The command of this name, or those of the group."""
    command = load_command(name)
    found = getattr(command, "commands", None)
    return {(name,): command} if found is None else {(name, one): it for one, it in found.items()}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_loads_and_has_help_and_debug(name: str) -> None:
    assert load_command(name).name == name
    assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0
    for words in commands_of(name):
        shown = CliRunner().invoke(app, [*words, "--help"])
        assert shown.exit_code == 0
        assert "--debug" in shown.stdout


@pytest.mark.parametrize(
    "command",
    [
        ("classify", "x.jpg"),
        ("segment", "x.jpg", "--out", "o"),
        ("colourise", "x.jpg", "--checkpoint", "c", "--out", "o"),
        ("field", "x.jpg", "--checkpoint", "c", "--out", "o"),
        ("interpolate", "x.jpg", "y.jpg", "--checkpoint", "c", "--out", "o"),
        ("glom", "show", "x.jpg", "--checkpoint", "c", "--out", "o"),
    ],
)
@pytest.mark.parametrize("limit", ["0", "-5"])
def test_a_limit_that_lets_no_image_pass_is_wrong_usage(command: tuple[str, ...], limit: str) -> None:
    result = CliRunner().invoke(app, [*command, "--max-pixels", limit])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: --max-pixels must be 1 or more, not {limit}.\n"


@pytest.mark.parametrize("seed", ["-1", str(2**32)])
def test_a_seed_that_scikit_learn_refuses_is_wrong_usage(seed: str) -> None:
    for command in (("islands", "x.jpg", "--out", "o"), ("glom", "probe", "x.parquet", "--checkpoint", "c")):
        result = CliRunner().invoke(app, [*command, "--seed", seed])
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.endswith(f"seed must be from 0 to 4294967295, not {seed}.\n")


def test_a_group_names_the_nearest_of_its_commands() -> None:
    result = CliRunner().invoke(app, ["glom", "trian"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith('error: Unknown command "trian". Did you mean "train"?')


@pytest.mark.slow
def test_version_and_python_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "apm", "--version"], capture_output=True, text=True, check=False, cwd="/"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"apm {apm.__version__}\n", "")


def test_unknown_command_is_told_the_nearest() -> None:
    result = CliRunner().invoke(app, ["clasify", "x.jpg"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith('error: Unknown command "clasify". Did you mean "classify"?')


@pytest.mark.parametrize(
    ("error", "code"),
    [(UsageError("u"), 2), (ImageError("i"), 1), (ApmError("a"), 1), (OSError(28, "No space left"), 1)],
)
def test_exit_codes(error: Exception, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(debug: Debug = False) -> None:
        raise error

    monkeypatch.setattr("apm.cli.classify.classify", failing)
    result = CliRunner().invoke(app, ["classify"])
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", f"error: {error}\n")
    result = CliRunner().invoke(app, ["classify", "--debug"])
    assert result.exit_code == code
    assert result.stderr.startswith("Traceback") and result.stderr.endswith(f"error: {error}\n")


def test_errors_suggest_names() -> None:
    known = ("paper", "small")
    assert did_you_mean("papr", known) == ' Did you mean "paper"?'
    assert did_you_mean("SMALL", known) == ' Did you mean "small"?'
    assert did_you_mean("xyz", known) == ""
    assert str(unknown("preset", "smal", known)) == 'Unknown preset "smal". Did you mean "small"? Known: paper, small.'
    assert "Known" not in str(unknown("name", "x", map(str, range(100))))
    assert issubclass(UsageError, ApmError) and not issubclass(ImageError, UsageError)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["--json", "--quiet", "--top-k=2"])
def test_closed_pipe_is_silent(picture: Path, form: str) -> None:
    command = fake_classify(form, "--steps", "1", *[picture] * 40)
    with running(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (141, b"")


@pytest.mark.slow
def test_closed_streams_are_no_crash(picture: Path) -> None:
    for redirected, code, said in (
        (">&-", 0, ""),
        ("<&-", 2, "error: Paths were to be read from stdin, but it is closed."),
    ):
        command = fake_classify("--quiet", "--steps", "1", "-" if code else picture)
        done = subprocess.run(
            ["bash", "-c", f'"$@" {redirected}', "bash", *command],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            check=False,
        )
        assert (done.returncode, done.stderr.strip()) == (code, said)


@pytest.mark.slow
def test_control_c_keeps_finished_results(picture: Path) -> None:
    command = fake_classify("--json", "--steps", "200", *[picture] * 200)
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited, as under `nohup make test &`
    try:
        with running(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            signal.signal(signal.SIGINT, previous)
            first = process.stdout.readline()
            process.send_signal(signal.SIGINT)
            lines = [first, *process.stdout.read().splitlines()]
            said = process.stderr.read()
    finally:
        signal.signal(signal.SIGINT, previous)
    assert process.returncode == 130, said
    assert all(json.loads(line)["error"] is None for line in lines)
    assert len(lines) < 200
    # it may come between a line and its count
    assert said in [f"interrupted: {count} of 200 images answered.\n" for count in (len(lines) - 1, len(lines))]


STUCK = """
import os, signal, threading, time
import typer
import apm.cli.main
signal.signal(signal.SIGINT, signal.default_int_handler)
apm.cli.main.UNWIND_SECONDS = 1

def waiting_for_ever():
    lock = threading.Lock()
    lock.acquire()
    threading.Thread(target=lock.acquire).start()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)

apm.cli.main.app = lambda **_: waiting_for_ever()
apm.cli.main.main()
"""


@pytest.mark.slow
def test_control_c_ends_a_command_whose_threads_do_not() -> None:
    done = subprocess.run([sys.executable, "-c", STUCK], cwd=ROOT, capture_output=True, timeout=HANG, check=False)
    assert done.returncode == -signal.SIGALRM


@pytest.mark.slow
def test_progress_only_on_a_terminal(picture: Path) -> None:
    """stderr is a terminal: a bar is drawn there, and stdout is the same data as ever."""
    command = fake_classify("--quiet", "--steps", "1", picture, picture)
    plain = subprocess.run(command, capture_output=True, cwd=ROOT, check=True)
    assert plain.stderr == b""
    command.remove("--quiet")
    ours, theirs = pty.openpty()
    with running([*command, "--json"], stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        data, shown = process.stdout.read(), b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # Linux says so when the other end is closed
                break
            if not part:
                break
            shown += part
    os.close(ours)
    assert process.returncode == 0
    assert b"\x1b" not in data and len(data.splitlines()) == 2
    assert b"classify" in shown and b"2/2" in shown


@pytest.mark.slow
def test_ctrl_c_is_quiet_even_while_the_command_is_still_being_imported() -> None:
    code = (
        "import builtins\n"
        "plain = builtins.__import__\n"
        "def interrupted(name, *rest, **more):\n"
        "    if name == 'typer':\n"
        "        raise KeyboardInterrupt\n"
        "    return plain(name, *rest, **more)\n"
        "builtins.__import__ = interrupted\n"
        "from apm.__main__ import main\n"
        "main()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 130
    assert ended.stderr == "interrupted\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoding", "arrow"), [("cp1252", b"?"), ("latin-1", b"?"), ("ascii", b"?"), ("utf-8", "→".encode())]
)
def test_a_terminal_that_knows_few_characters_gets_question_marks(encoding: str, arrow: bytes, picture: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run(
        fake_classify("--steps", "1", picture), capture_output=True, cwd=ROOT, env=environment, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    line = done.stdout.splitlines()[-1]
    assert b"cosine" in line and b" " + arrow + b" " in line
    helped = subprocess.run(
        [sys.executable, "-m", "apm", "bench", "--help"], capture_output=True, cwd="/", env=environment, check=False
    )
    assert (helped.returncode, helped.stderr) == (0, b"")


def test_no_help_text_begins_with_of() -> None:
    for name in COMMANDS:
        for words, command in commands_of(name).items():
            for parameter in command.params:
                told = getattr(parameter, "help", None)
                assert told and not told.startswith("Of "), f"{words} {parameter.name}: {told}"


@pytest.mark.slow
def test_completion_is_installed_and_completes(tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "apm"]
    # Typer looks which shell it was called from: bash is its parent here.
    done = subprocess.run(
        ["bash", "-c", '"$@"; exit $?', "bash", *command, "--install-completion"],
        capture_output=True,
        text=True,
        env=environment,
        cwd="/",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / ".bash_completions").iterdir())
    asked = {**environment, "COMP_WORDS": "apm classify --pre", "COMP_CWORD": "2", "_APM_COMPLETE": "complete_bash"}
    shown = subprocess.run(command, capture_output=True, text=True, env=asked, cwd="/", check=False).stdout.split()
    assert sorted(shown) == ["--precision", "--preset"]
