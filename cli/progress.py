"""Progress: a bar if stderr is a terminal, else a line now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import typer

from .render import above, on_terminal, progress_on_terminal

if TYPE_CHECKING:
    from rich.progress import Progress

LINE_EVERY = 10.0
"""Seconds between two lines."""


class Heartbeat:
    """Counts what is done, and says it on stderr every `LINE_EVERY` seconds from a thread of its own.

    Args:
        total: number of items, None when it is not known.
        doing: the word before the numbers.
    """

    def __init__(self, total: int | None, *, doing: str) -> None:
        self.done = 0
        self._total, self._doing = total, doing
        self._began = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="progress", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._over.wait(LINE_EVERY):
            typer.echo(self.words(), err=True)

    def words(self) -> str:
        """The progress so far, in one line."""
        passed = time.monotonic() - self._began
        if self._total is None:
            return f"{self._doing}: {self.done} done in {passed:.0f} s"
        left = f", about {passed / self.done * (self._total - self.done):.0f} s left" if self.done else ""
        return f"{self._doing}: {self.done} of {self._total} done in {passed:.0f} s{left}"


@contextmanager
def progress(total: int | None, *, wanted: bool, doing: str) -> Iterator[Callable[[Callable[[], None]], None]]:
    """Yield a function that runs what prints one item, out of the bar's way, and counts the item as done.

    Args:
        total: number of items, or None when it is not known.
        wanted: False shows nothing.
        doing: the word before bar and numbers.
    """
    if not wanted:
        yield lambda show: show()
        return
    if on_terminal():
        with progress_on_terminal(total, wanted=total != 1, doing=doing) as bar:

            def with_bar(show: Callable[[], None]) -> None:
                with above(bar):
                    show()

            yield with_bar
        return
    with Heartbeat(total, doing=doing) as beat:

        def counted(show: Callable[[], None]) -> None:
            show()
            beat.done += 1

        yield counted


@contextmanager
def counted(doing: str, *, wanted: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Show on stderr how far some work is: a bar on a terminal, else a line every 10 seconds.

    Args:
        doing: what is done, in a word or two.
        wanted: False shows nothing.

    Yields:
        A function to be called with the number done and the total. Nothing is shown before its first call.
    """
    with ExitStack() as stack:
        bar: Progress | None = None
        last = time.monotonic()

        def show(done: int, total: int) -> None:
            nonlocal bar, last
            if not wanted:
                return
            if on_terminal():
                if bar is None:
                    bar = stack.enter_context(progress_on_terminal(total, wanted=True, doing=doing))
                if bar is not None:
                    bar.update(bar.task_ids[0], completed=done, total=total)
            elif time.monotonic() - last >= LINE_EVERY:
                last = time.monotonic()
                typer.echo(f"{doing}: {done} of {total}", err=True)

        yield show
