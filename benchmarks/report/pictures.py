"""Small pictures of recorded images, where the data still lie where the run found them. Records hold no pictures."""

from __future__ import annotations

import base64
import io
import re
import warnings
from functools import lru_cache
from pathlib import Path, PurePosixPath

from PIL import Image

from apm.errors import ApmError
from apm.images.paths import EXTENSIONS

from ..corruptions import CROP, RESIZE, VERSION, corrupt_image
from ..datasets.files import read_rgb
from ..datasets.readers import Sample, read_digits
from ..datasets.specs import spec_of
from ..tables.table import Answers

SIDE = 144
"""Longest side of an embedded picture, in pixels."""
_DIGITS = "scikit-learn"
_ESCAPE = re.compile(rb"\\x([89a-f][0-9a-f])")  # how ids spell bytes that are not UTF-8


class Pictures:
    """Finds pictures by the data source and the id in a record.

    An id is taken for a path below the recorded folder and never leads out of it. Corruptions that were generated on
    the fly are generated again, by the run's seed: what is shown is what the methods saw.
    """

    def __init__(self, *, wanted: bool = True) -> None:
        self.wanted = wanted

    def find(self, answers: Answers, identity: str) -> str | None:
        """Return a picture as a data URI, or None where it cannot be had."""
        if not self.wanted:
            return None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                clean = _load(str(answers.cell["source"]), identity)
                image = None if clean is None else _corrupted(clean, answers, identity)
        except (ApmError, Image.DecompressionBombWarning, OSError, ValueError):
            return None
        if image is None:
            return None
        image.thumbnail((SIDE, SIDE))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=82)
        return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")

    def reason(self, answers: Answers) -> str:
        """Why an image of a cell has no picture, for people."""
        if not self.wanted:
            return "Pictures were not asked for."
        source = str(answers.cell["source"])
        if source == _DIGITS or Path(source).is_dir():
            return f"Some pictures cannot be read from the recorded source, {source}."
        if source.startswith("hf:"):
            return f"The images were streamed from {source}: they are not on this machine."
        return f"The recorded source, {source}, is not here: apm report looks for it from the folder it is started in."


def _load(source: str, identity: str) -> Image.Image | None:
    if source == _DIGITS:
        sample = _digits().get(identity)
        return sample.load() if sample else None
    spelt = _ESCAPE.sub(lambda byte: bytes.fromhex(byte[1].decode()), identity.encode("utf-8", "surrogateescape"))
    for name in (identity, spelt.decode("utf-8", "surrogateescape")):
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts or inside.suffix.lower() not in EXTENSIONS:
            continue
        path = Path(source, name)
        if path.is_file():
            return read_rgb(path)
    return None


@lru_cache(maxsize=1)
def _digits() -> dict[str, Sample]:
    return {sample.id: sample for sample in read_digits().samples}


def _corrupted(image: Image.Image, answers: Answers, identity: str) -> Image.Image | None:
    """Corrupt as the run did; None where this version would do it otherwise. Trees of files are shown as they are."""
    cell, config = answers.cell, answers.run.run["config"]
    corruption, level = cell["corruption"], cell["level"]
    from_files = Path(str(cell["source"])).parts[-2:] == (corruption, str(level))
    if corruption is None or not cell["generated"] or from_files:
        return image
    key = next(key for key, one in answers.run.cells.items() if one is cell)
    if config["cells"][key]["generated"] != f"corruptions version {VERSION}":
        return None
    resize = RESIZE if spec_of(cell["dataset"]).reader == "corrupted" else CROP
    return corrupt_image(image, corruption, level, seed=config["seed"], image_id=identity, resize=resize)
