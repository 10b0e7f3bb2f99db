"""`make gallery`: makes the pictures of the README with the commands that a user has, on scikit-image's photographs."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .demo import LABELS, photographs

ROOT = Path(__file__).resolve().parent.parent
GALLERY = ROOT / "docs" / "gallery"
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


def main() -> int:
    """Make every picture; returns the exit code of the first command that fails."""
    GALLERY.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for plain, path in photographs().items():
            os.symlink(path, Path(folder, plain))
        os.symlink(CHECKPOINT, Path(folder, "student.safetensors"))
        for name, (arguments, pattern) in PICTURES.items():
            print(f"$ apm {shlex.join(arguments)}", flush=True)
            done = subprocess.run([sys.executable, "-m", "apm", *arguments], cwd=folder, check=False)
            if done.returncode:
                return done.returncode
            (made,) = Path(folder).glob(pattern)
            shutil.copyfile(made, GALLERY / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
