"""The recorded baseline: one small run of every method, kept in the repository, that new code must reproduce.

    python -m apm.benchmarks.studies.baseline record     # after a change that moves numbers on purpose
    python -m apm.benchmarks.studies.baseline check      # repeat the run and compare

The folder may follow as an argument; the default is tests/baseline of this checkout. regression.md says when to do
which.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..tables.compare import MEASURES, Limits
from .study import ROOT, argument_parser, run

FOLDER = ROOT / "tests" / "baseline"

CELLS = tuple(f"--corruption={name}" for name in ("clean", "gaussian_noise", "contrast", "pixelate"))
METHODS = tuple(f"--method={name}" for name in ("zero-shot", "tpt", "mta", "zero", "tda", "apm"))
SETTINGS = (
    *("--target", "cls", "--target", "mta", "--views", "8"),
    *("--preset", "small", "--precision", "fp32", "--steps", "10"),
    *("--limit", "10", "--seed", "0", "--teacher", "embedded", "--device", "cpu", "--record-logits"),
)
"""fp32 on the CPU, so that processors differ by rounding alone; few steps, so that the student is still on its way:
once it has converged, a wrong learning rate no longer shows."""
BENCH = ("digits", *CELLS, *METHODS, *SETTINGS)
"""What is run."""

LIMITS = Limits(tolerance=10, max_changed=10, loss=3e-5, cosine=1e-5, nll=1e-3, logits=2e-4)
"""Of 10 images, one may be answered otherwise: near-ties fall as rounding has it. The others lie between what
processors and threads change here and what the smallest mutation of tests/test_mutations.py does: regression.md."""
COMPARE = (
    *("--tolerance", f"{LIMITS.tolerance}", "--max-changed", f"{LIMITS.max_changed}"),
    *(f"--max-{name}-change={getattr(LIMITS, name)}" for name in MEASURES),
)


def bench(folder: Path) -> int:
    """Run the baseline's command into `folder`; its exit code."""
    folder = folder.resolve()
    # from the folder above, so that the record holds no path of this machine
    command = [sys.executable, "-m", "apm", "bench", *BENCH, "--out", folder.name, "--fresh"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    return subprocess.run(command, stdout=subprocess.DEVNULL, cwd=folder.parent).returncode


def record(folder: Path) -> int:
    """Record a new baseline in `folder`, in place of one that is there."""
    with (
        tempfile.TemporaryDirectory() as temporary
    ):  # beside the tests lies a folder named apm, which Python would take
        new = Path(temporary) / folder.name
        if code := bench(new):
            return code
        (new / ".lock").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.move(new, folder)
    return 0


def check(folder: Path) -> int:
    """Run again and compare with the baseline in `folder`: 0 when it is reproduced."""
    with tempfile.TemporaryDirectory() as temporary:
        new = Path(temporary) / "new"
        if code := bench(new):
            return code
        return subprocess.run([sys.executable, "-m", "apm", "compare", str(new), str(folder), *COMPARE]).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and do it; returns the exit code."""
    parser = argument_parser("baseline", __doc__)
    parser.add_argument("what", choices=("record", "check"))
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    options = parser.parse_args(arguments)
    return {"record": record, "check": check}[options.what](options.folder)


if __name__ == "__main__":
    sys.exit(run(main))
