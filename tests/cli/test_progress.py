"""Progress where stderr is no terminal: a line every so many seconds."""

from __future__ import annotations

import io
import re
import time

import pytest

from apm.cli import progress
from apm.cli.progress import Heartbeat

LINE_EVERY = progress.LINE_EVERY  # as it is where no test has changed it


def test_a_line_now_and_then_until_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(progress, "LINE_EVERY", 0.05)
    with Heartbeat(4, doing="classify") as beat:
        deadline = time.monotonic() + 30
        while "0 of 4" not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        beat.done = 2
        while "2 of 4" not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    said = stream.getvalue()
    assert re.search(r"^classify: 0 of 4 done in \d+ s\n", said)
    assert re.search(r"^classify: 2 of 4 done in \d+ s, about \d+ s left\n", said, flags=re.MULTILINE)
    time.sleep(0.2)
    assert stream.getvalue() == said


def test_a_quick_command_says_nothing_and_an_unknown_total_is_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", LINE_EVERY)
    with Heartbeat(None, doing="classify") as beat:
        beat.done = 3
        assert beat.words() == "classify: 3 done in 0 s"
    assert capsys.readouterr().err == "" and LINE_EVERY == 10


def test_a_closed_stderr_has_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    with progress.progress_on_terminal(3, wanted=True, doing="labels") as bar, progress.counted("labels") as show:
        show(1, 3)
    assert bar is None


def test_work_that_takes_long_is_told_every_ten_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress, "LINE_EVERY", LINE_EVERY)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    for wanted in (False, True):
        with progress.counted("encoding labels", wanted=wanted) as show:
            for second in range(25):
                now[0] += 1.0
                show(second, 25)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == ["encoding labels: 9 of 25", "encoding labels: 19 of 25"]
