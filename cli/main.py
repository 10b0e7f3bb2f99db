"""The `apm` command: which sub-commands there are, and what their errors look like.

A sub-command is imported when it is called or asked for its help, so that `apm --help` needs none of them.
"""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from apm.errors import ApmError, UsageError
from apm.startup import for_one_command

from .groups import Group
from .options import DEBUG_KEY
from .render import failure

COMMANDS: dict[str, tuple[str, str]] = {
    # name: (module of this package; what `apm --help` says). The module holds a function of the same name, or `app`, a
    # group of commands
    "classify": (".classify", "Classify photographs, adapting a new student to each."),
    "segment": (".segment", "Segment photographs: label maps, overlays, shares and bounding boxes."),
    "teachers": (".teachers", "List the teachers and which of them are on this machine."),
    "encode": (".encode", "Encode images and views once, into a store that many runs can read."),
    "bench": (".bench", "Run methods on data sets and record every answer."),
    "table": (".table", "Print tables from the records of runs, beside the published numbers."),
    "report": (".report", "Write one HTML page from the records of runs."),
    "reproduce": (".reproduce", "Run a table of the paper and compare it with the published numbers."),
    "compare": (".compare", "Check a run against an earlier one, sample by sample."),
    "profile": (".profile", "Count the parameters and operations of student and teacher, and time a step."),
    "islands": (".islands", "Show how a student's field forms, and whether its regions follow the image."),
    "pretrain": (".pretrain", "Train one student on many images, against a teacher's grids."),
    "interpolate": (".interpolate", "Interpolate between the trigger columns of two images."),
    "field": (".field", "Query a trained student's field of an image, at any locations."),
    "colourise": (".colourise", "Colour black-and-white photographs with a student trained on grey images."),
    "glom": (".glom", "Train GLOM on images, show its columns, probe its levels."),
    "mae": (".mae", "Train masked autoencoders and heads, for the methods vit-probe and ttt-mae."),
    "prompts": (".prompts", "Learn prompts with CoOp or CoCoOp, or convert learned ones, for apm bench."),
    "corrupt": (".corrupt", "Write corrupted copies of a folder of images, as in ImageNet-C."),
}

CLOSED_PIPE = 141  # what a shell reports for a program that SIGPIPE ended
UNWIND_SECONDS = 30
"""How long after Ctrl-C a command may take to save its work and to exit by itself."""


class LazyGroup(Group):
    """A group whose commands come from `COMMANDS`, and which turns errors meant for people into exit codes."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, (_, summary) in COMMANDS.items():
            self.add_command(TyperCommand(name, help=summary), name)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, load_command(name) if name in COMMANDS else command, rest

    def invoke(self, ctx: Any) -> Any:
        if sys.stdout is None:  # closed by the caller: nobody reads it; errors go to stderr
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # a closed pipe shows itself here at the latest
            return result
        except BrokenPipeError:
            _silence_stdout()
            raise typer.Exit(CLOSED_PIPE) from None
        except (ApmError, OSError) as error:
            if ctx.meta.get(DEBUG_KEY):
                traceback.print_exc()
            failure(str(error))
            raise typer.Exit(2 if isinstance(error, UsageError) else 1) from None


def load_command(name: str) -> Any:
    """Import the module of a sub-command and build the command, or the group of commands, that it holds."""
    module = importlib.import_module(COMMANDS[name][0], __package__)
    if not hasattr(module, name):
        group = typer.main.get_group(module.app)
        group.name = name
        return group
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(name)(getattr(module, name))
    return typer.main.get_command(single)


def _silence_stdout() -> None:
    """Point stdout at nothing: Python flushes it once more on the way out, and would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_version(value: bool) -> None:
    if value:
        from apm import __version__

        typer.echo(f"apm {__version__}")
        raise typer.Exit


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def apm(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Zero-shot image classification that adapts to each image (Asynchronous Perception Machines)."""


def _interrupt(*_: object) -> None:
    """Raise `KeyboardInterrupt`, and have the system end the process if that does not.

    An interrupt that arrives while Python acquires the lock of a `threading.Condition` leaves it locked: a thread that
    needs it never ends, and the process would wait for that thread for ever.
    """
    signal.alarm(UNWIND_SECONDS)
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line; never returns."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler and hasattr(signal, "alarm"):
        signal.signal(signal.SIGINT, _interrupt)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where the terminal or the locale lacks "→", it prints "?"
    for_one_command()
    app(prog_name="apm")
