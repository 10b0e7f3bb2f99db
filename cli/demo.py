"""`make demo`: `apm classify` on four photographs that scikit-image brings along."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PHOTOGRAPHS = {
    "cat.png": "chelsea.png",
    "coffee.png": "coffee.png",
    "astronaut.png": "astronaut.png",
    "rocket.jpg": "rocket.jpg",
}
LABELS = "cat,dog,horse,cup of coffee,teapot,banana,mushroom,astronaut,rocket,car,ship,tractor"


def photographs() -> dict[str, Path]:
    """Plain name → file of each photograph."""
    package = importlib.util.find_spec("skimage")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("error: scikit-image is not installed, and the photographs are in it.")
    folder = Path(package.submodule_search_locations[0]) / "data"
    return {plain: folder / name for plain, name in PHOTOGRAPHS.items()}


def main() -> int:
    """Run `apm classify` in a folder where each photograph lies under a plain name; returns its exit code."""
    command = ["classify", "--teacher", "embedded", "--labels", LABELS, "--top-k", "3", *PHOTOGRAPHS, *sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder:
        for plain, path in photographs().items():
            os.symlink(path, Path(folder, plain))
        print(f'$ apm {" ".join(command[:3])} --labels "{LABELS}" {" ".join(command[5:])}', flush=True)
        return subprocess.run([sys.executable, "-m", "apm", *command], cwd=folder, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
