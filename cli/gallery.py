"""`make gallery`: makes the pictures of the README with the commands that a user has, on scikit-image's photographs.

It runs them in ``build/gallery``, where the photographs and the trained student lie under the names that the captions
use: there every command of a caption runs as it is written.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from .demo import LABELS, photographs

ROOT = Path(__file__).resolve().parent.parent
GALLERY = ROOT / "docs" / "gallery"
WORKSHOP = ROOT / "build" / "gallery"
CHECKPOINT = ROOT / "benchmarks" / "results" / "pretrained-student.safetensors"
SMALL = ["--teacher", "embedded", "--preset", "small"]
PICTURES: dict[str, tuple[list[str], str]] = {
    # name in the gallery: (arguments, pattern of the file that they make)
    "explain": (["classify", "cat.png", *SMALL, "--labels", LABELS, "--explain", "explain"], "explain/cat*.png"),
    "islands": (["islands", "coffee.png", *SMALL, "--no-controls", "--out", "islands"], "islands/coffee*strip.png"),
    "field": (["field", "cat.png", "--checkpoint", "student.safetensors", "--out", "field"], "field/cat*.png"),
    "walk": (
        ["interpolate", "coffee.png", "astronaut.png", "--checkpoint", "student.safetensors", "--out", "walk"],
        "walk/walk.png",
    ),
}


def lay_out(folder: Path) -> None:
    """Make a new folder with the photographs and the trained student."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for plain, path in {**photographs(), "student.safetensors": CHECKPOINT}.items():
        shutil.copyfile(path, folder / plain)


def main() -> int:
    """Make every picture; returns the exit code of the first command that fails."""
    GALLERY.mkdir(parents=True, exist_ok=True)
    lay_out(WORKSHOP)
    for name, (arguments, pattern) in PICTURES.items():
        print(f"$ apm {shlex.join(arguments)}", flush=True)
        done = subprocess.run([sys.executable, "-m", "apm", *arguments], cwd=WORKSHOP, check=False)
        if done.returncode:
            return done.returncode
        (made,) = WORKSHOP.glob(pattern)
        shutil.copyfile(made, GALLERY / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
