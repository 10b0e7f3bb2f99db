"""Command line of the speed measurements; see ``python -m apm.benchmarks.speed --help``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from apm.errors import unknown

from ..studies.study import run
from .kind import DOCS, OUT, add

HELP = """usage: python -m apm.benchmarks.speed [KIND] [options]

Measure the student's speed against the machine's own floor, and write a record of it.

kinds:
{kinds}
  report     make docs/speed.md and its plots from the records

`python -m apm.benchmarks.speed KIND --help` tells a kind's options. Without a KIND: step.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the record, print its table; returns the exit code."""
    kind, *rest = given = list(sys.argv[1:] if arguments is None else arguments) or ["step"]
    if kind.startswith("-") and not {"-h", "--help"}.intersection(given):
        kind, rest = "step", given
    progress, log = logging.StreamHandler(), logging.getLogger(__package__)  # to stderr
    log.addHandler(progress)
    log.setLevel(logging.INFO)
    log.propagate = False  # open_clip, once it has warned, has the root logger say everything again
    try:
        return run(lambda: _do(kind, rest))
    finally:
        log.propagate = True
        log.removeHandler(progress)


def _do(name: str, rest: list[str]) -> None:
    from .kinds import KINDS
    from .report import write_report

    if name == "report":
        parser = argparse.ArgumentParser(prog="python -m apm.benchmarks.speed report")
        given = add(parser, OUT | DOCS).parse_args(rest)
        for path in write_report(given.out, given.docs):
            print(path, file=sys.stderr)
    elif name in KINDS:
        KINDS[name].main(rest)
    elif name in ("-h", "--help"):
        print(HELP.format(kinds="\n".join(f"  {one.name:10} {one.question}" for one in KINDS.values())), end="")
    else:
        raise unknown("kind", name, (*KINDS, "report"))


if __name__ == "__main__":
    sys.exit(main())
