"""The recorded baseline: one small run of every method, kept in the repository, that new code must reproduce.

    python -m apm.benchmarks.baseline record tests/baseline     # after a change that moves numbers on purpose
    python -m apm.benchmarks.baseline check tests/baseline      # run the same again elsewhere, and compare

See regression.md for when to do which.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

BENCH = (
    "digits",
    *(
        "--corruption",
        "clean",
        "--corruption",
        "gaussian_noise",
        "--corruption",
        "contrast",
        "--corruption",
        "pixelate",
    ),
    *("--limit", "30", "--seed", "0"),
    *("--method", "zero-shot", "--method", "tpt", "--method", "mta", "--method", "zero", "--method", "tda"),
    *("--method", "apm", "--target", "cls", "--target", "mta", "--views", "16"),
    *("--preset", "small", "--precision", "fp32", "--steps", "30"),
    *("--teacher", "embedded", "--device", "cpu"),
)
"""What is run: fp32 on the CPU, so that processors differ by rounding alone."""

COMPARE = ("--tolerance", "3.4", "--max-changed", "6.7")
"""Of 30 images, one more may be wrong and two may be answered otherwise: near-ties fall as rounding has it."""


def bench(folder: Path) -> int:
    """Run the baseline's command into `folder`; its exit code."""
    folder = folder.resolve()
    # from the folder above, so that the record holds no path of this machine
    command = [sys.executable, "-m", "apm", "bench", *BENCH, "--out", folder.name, "--fresh"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    return subprocess.run(command, stdout=subprocess.DEVNULL, cwd=folder.parent).returncode


def record(folder: Path) -> int:
    """Record a new baseline in `folder`, in place of one that is there."""
    code = bench(folder)
    (folder / ".lock").unlink(missing_ok=True)
    return code


def check(folder: Path) -> int:
    """Run again and compare with the baseline in `folder`: 0 when it is reproduced."""
    with tempfile.TemporaryDirectory() as temporary:
        new = Path(temporary) / "new"
        if code := bench(new):
            return code
        return subprocess.run([sys.executable, "-m", "apm", "compare", str(new), str(folder), *COMPARE]).returncode


def main() -> None:
    """Read the command line and do it."""
    parser = argparse.ArgumentParser(prog="python -m apm.benchmarks.baseline", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("record", "check"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    sys.exit({"record": record, "check": check}[arguments.what](arguments.folder))


if __name__ == "__main__":
    main()
