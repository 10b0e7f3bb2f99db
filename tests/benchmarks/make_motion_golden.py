"""Write tests/golden/motion_blur_magick.npz: what ImageMagick's motion blur gives for ImageNet-C's radii and sigmas.

Needs ImageMagick 6 (``apt-get install imagemagick``); the tests need only the file:

    python -m tests.benchmarks.make_motion_golden
"""

from __future__ import annotations

import io
import subprocess

import numpy as np
from PIL import Image

from apm.benchmarks.corruptions.blur import _MOTION
from tests.places import GOLDEN

ANGLES = (-43.7, -30.0, 0.0, 17.25, 44.9, -112.5)  # the last as the flakes of snow fall


def magick(image: np.ndarray, radius: int, sigma: float, degrees: float) -> np.ndarray:
    """Blur an RGB picture of 8 bits by ImageMagick."""
    with io.BytesIO() as buffer:
        Image.fromarray(image).save(buffer, "PNG")
        command = ["convert", "png:-", "-motion-blur", f"{radius}x{sigma}{degrees:+}", "png24:-"]
        blurred = subprocess.run(command, input=buffer.getvalue(), capture_output=True, check=True).stdout
    with Image.open(io.BytesIO(blurred)) as picture:
        return np.asarray(picture)


def main() -> None:
    """Write the file."""
    with np.load(GOLDEN / "corruptions_cat.npz") as arrays:
        image = arrays["image"][60:96, 50:90].copy()
    image[:12] = np.random.default_rng(0).integers(0, 256, (12, 40, 3))  # dark and bright pixels side by side
    pictures = [[magick(image, radius, sigma, degrees) for degrees in ANGLES] for radius, sigma in _MOTION]
    version = subprocess.run(["convert", "-version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    np.savez_compressed(
        GOLDEN / "motion_blur_magick.npz", image=image, angles=ANGLES, pictures=pictures, version=version
    )


if __name__ == "__main__":
    main()
