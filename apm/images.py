"""A user's file → an RGB image, safely; and the student's view of it.

Files come from anywhere: their size is checked before anything is decoded, every failure is an `ImageError` of one line
that names the file and the cause, and what was done to an unusual file is told in notes.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from apm.errors import ImageError
from apm.paths import file_problem, printable

MAX_PIXELS = 89_478_485
"""Default limit on width × height: 256 MiB of RGB, the size from which Pillow itself suspects an attack."""

MIN_SIDE = 2
MAX_ASPECT = 100
"""Long side over short side. Scaling a strip's short side up to a network's input would multiply its pixels."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Named so that no rarely used decoder, nor one that starts other programs (EPS), ever sees a stranger's file.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

_UPRIGHT = {  # EXIF orientation (EXIF 2.32, tag 0x0112) → what sets the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, kw_only=True)
class LoadedImage:
    """A decoded file.

    Attributes:
        image: mode RGB, upright, at least `MIN_SIDE` pixels on each side.
        notes: what the user should know of the decoding ("several frames: only the first is used"); often empty.
    """

    image: Image.Image
    notes: tuple[str, ...] = ()


def load_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> LoadedImage:
    """Read one file as an upright RGB image.

    16-bit and float images are scaled by their range, transparency is laid on white, of an animation the first frame is
    taken, EXIF orientation is honoured.

    Args:
        path: the file.
        max_pixels: largest width × height that is decoded at all.

    Raises:
        ImageError: the file is missing, unreadable, not an image, damaged, too small or too large.
    """
    path = Path(path)
    with _explained(path):
        if (problem := file_problem(path)) is not None:
            raise ImageError(problem)
        with _pillow_in_hand(), path.open("rb") as file, _identify(file, path) as image:
            width, height = image.size
            _check_size(width, height, max_pixels)
            notes = list(_frame_notes(image))
            image.load()
            rgb, more = _to_rgb(image)
            rgb = _upright(rgb, image)
    return LoadedImage(image=rgb, notes=(*notes, *more))


def from_pixels(image: Image.Image) -> LoadedImage:
    """Treat an opened image as `load_image` treats a file: upright, RGB, wide values scaled, transparency on white.

    Raises:
        ImageError: it is too small, or cannot be decoded.
    """
    with _explained("image"):
        _check_size(*image.size, image.width * image.height)
        rgb, notes = _to_rgb(image)
        return LoadedImage(image=_upright(rgb, image), notes=notes)


def student_input(image: Image.Image, size: int) -> Tensor:
    """Return the student's view of an RGB image: short side scaled to `size` (bicubic), centre crop, normalised.

    Args:
        image: mode RGB, any size.
        size: side of the square, in pixels.

    Returns:
        float32 tensor of shape (3, size, size), ImageNet mean and standard deviation taken out.
    """
    return normalised(central_square(image, size), IMAGENET_MEAN, IMAGENET_STD)


def central_square(image: Image.Image, size: int) -> Image.Image:
    """Cut the largest square around the centre of an image and scale it to `size` pixels (bicubic)."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    # Cropping in the same call keeps the scaled strip outside the crop from ever being made.
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def normalised(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return an RGB image as float32 (3, H, W): pixels in [0, 1], then mean and deviation of each channel taken out."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255  # (3, H, W)
    return ((pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)).contiguous()


@contextmanager
def _explained(path: str | Path) -> Iterator[None]:
    """Turn whatever goes wrong with a file into an `ImageError` of one line."""
    name = printable(path)
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error
    except FileNotFoundError as error:
        raise ImageError(f"{name}: no such file") from error
    except PermissionError as error:
        raise ImageError(f"{name}: not readable, permission denied") from error
    except MemoryError as error:
        raise ImageError(f"{name}: not enough memory to decode it") from error
    except (
        Exception
    ) as error:  # decoders raise nearly any type on damaged data, and none of it may stop the other files
        cause = " ".join(printable(str(error)).split()) or type(error).__name__
        raise ImageError(f"{name}: damaged or truncated image ({cause})") from error


def _identify(file: IO[bytes], path: Path) -> Image.Image:
    """Open the header only; no pixel is decoded."""
    Image.init()
    known = [name for name in _FORMATS if name in Image.OPEN]  # AVIF and JPEG2000 depend on how Pillow was built
    try:
        return Image.open(file, formats=known)
    except UnidentifiedImageError as error:
        with path.open("rb") as again:
            start = again.read(512)
        kind = "text, not an image" if _looks_like_text(start) else "not an image of a known format"
        raise ImageError(f"{kind} (known: {', '.join(known)})") from error


def _looks_like_text(start: bytes) -> bool:
    return all(byte >= 32 or byte in b"\t\n\r\f" for byte in start)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if min(width, height) < MIN_SIDE:
        raise ImageError(
            f"{width}×{height} pixels is too small to show anything; at least {MIN_SIDE}×{MIN_SIDE} is needed"
        )
    if width * height > max_pixels:
        raise ImageError(
            f"{width}×{height} pixels is more than the limit of {max_pixels} pixels; not decoded (raise max_pixels, "
            "--max-pixels on the command line, if you trust the file)"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(
            f"{width}×{height} pixels is a strip; the long side may be at most {MAX_ASPECT} times the short one"
        )


def _frame_notes(image: Image.Image) -> Iterator[str]:
    # MPO is what phones write for one photograph with a depth map or preview: not an animation to anybody.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        image.seek(0)
        yield f"{image.format} with several frames: only the first is used"


def _upright(rgb: Image.Image, source: Image.Image) -> Image.Image:
    try:
        method = _UPRIGHT.get(source.getexif().get(0x0112, 1))
    except Exception:  # damaged EXIF data says nothing about the picture, which did decode
        method = None
    return rgb if method is None else rgb.transpose(method)


def _to_rgb(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """Return the image in mode RGB, and notes."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_wide(image)
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        if layer.getchannel("A").getextrema() == (255, 255):
            return layer.convert("RGB"), ()
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB"), ("transparent parts are shown on white",)
    return image.convert("RGB"), ()


def _from_wide(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """Scale a grey image of 16 or 32 bits, integer or float, to 8 bits by its range, not cut off at 255."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    notes: tuple[str, ...] = ()
    # PNG and PGM hold at most 16 bits, also where Pillow widens them to mode I; elsewhere 32 bits mean what they reach.
    sixteen_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if sixteen_bit:
        scaled = values / 257
    elif image.mode == "F" and low >= 0 and high <= 1:
        scaled = values * 255
    elif low >= 0 and high <= 255:
        scaled = values
    elif low >= 0 and high <= 65535:
        scaled = values / 257
    else:
        scaled = (values - low) * (255 / (high - low))
        notes = (f"values from {low:g} to {high:g} are stretched over black to white",)
    grey = Image.fromarray(np.rint(scaled.clip(0, 255)).astype(np.uint8))
    return grey.convert("RGB"), notes


_hand_lock = threading.Lock()
_hands = 0
_saved: list[object] = []


@contextmanager
def _pillow_in_hand() -> Iterator[None]:
    """Silence Pillow's warnings and lift its global size limit while any thread is inside; `_check_size` is the limit.

    Both are process-wide switches: the first thread in turns them, the last one out turns them back, so that threads
    can decode side by side.
    """
    global _hands
    with _hand_lock:
        _hands += 1
        if _hands == 1:
            quiet = warnings.catch_warnings()
            quiet.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
            _saved[:] = [quiet, Image.MAX_IMAGE_PIXELS]
            Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        with _hand_lock:
            _hands -= 1
            if _hands == 0:
                quiet, Image.MAX_IMAGE_PIXELS = _saved  # type: ignore[assignment]
                quiet.__exit__(None, None, None)
