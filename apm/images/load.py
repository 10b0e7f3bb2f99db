"""A file's bytes → an RGB image, safely; and the student's view of it.

The one place where bytes of images are read, for photographs of users, data sets and training alike. Files come from
anywhere: their size is checked before anything is decoded, every failure is an `ImageError` of one line that names the
file and the cause, and what was done to an unusual file is told in notes.

Memory. Decoding takes 8 bytes a pixel at most for the common formats, `_CODEC` more for those whose codec holds the
whole picture. Threads that decode side by side take `DECODING_BYTES` together; a picture that needs more than that by
itself is decoded alone. The C library may keep some of what a thread has given back.
"""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from apm.errors import ImageError
from apm.images.paths import file_problem, printable

if TYPE_CHECKING:
    from torch import Tensor

MAX_PIXELS = 89_478_485
"""Default limit on width × height: 256 MiB of RGB, the size from which Pillow itself suspects an attack."""

DECODING_BYTES = 8 * MAX_PIXELS
"""What all threads together may take for decoding: 683 MiB, one picture of `MAX_PIXELS` in a common format."""

MIN_SIDE = 2
MAX_ASPECT = 100
"""Long side over short side. Scaling a strip's short side up to a network's input would multiply its pixels."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Named so that no rarely used decoder, nor one that starts other programs (EPS), ever sees a stranger's file.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

# Bytes a pixel that a codec holds beside the picture it gives, where it does not go line by line (measured).
_CODEC = {"JPEG": 4, "WEBP": 12, "AVIF": 12, "JPEG2000": 16, "TIFF": 4}
_STRIP = 1 << 20  # pixels that are converted at a time


@dataclass(frozen=True, kw_only=True)
class LoadedImage:
    """A decoded file.

    Attributes:
        image: mode RGB, upright, at least `MIN_SIDE` pixels on each side.
        notes: what the user should know of the decoding ("several frames: only the first is used"); often empty.
    """

    image: Image.Image
    notes: tuple[str, ...] = ()


def load_image(
    path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS, as_published: bool = False
) -> LoadedImage:
    """Read one file as an RGB image.

    16-bit and float images are scaled by their range, transparency is laid on white, of an animation the first frame is
    taken, EXIF orientation is honoured.

    Args:
        path: the file.
        max_pixels: largest width × height that is decoded at all.
        as_published: decode as published evaluations do, so that numbers stay comparable with theirs: EXIF orientation
            and transparency are not looked at. Grey images of 16 bits and more are scaled all the same, where that
            code would cut them off at 255.

    Raises:
        ImageError: the file is missing, unreadable, not an image, damaged, too small or too large.
    """
    with ExitStack() as held:
        return _load(Path(path), held, max_pixels, as_published)


@contextmanager
def opened_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Iterator[LoadedImage]:
    """Do what `load_image` does, hold the image's part of `DECODING_BYTES` until the body is left, and close the image.

    For threads that make something small of each image: what they do with it is within the bound. The body opens no
    other image.
    """
    with ExitStack() as held:
        loaded = _load(Path(path), held, max_pixels, False)
        try:
            yield loaded
        finally:
            loaded.image.close()


def _load(path: Path, held: ExitStack, max_pixels: int, as_published: bool) -> LoadedImage:
    with _explained(path):
        if (problem := file_problem(path)) is not None:
            raise ImageError(problem)
        with path.open("rb") as file:
            return _decode(file, held, max_pixels, as_published)


def decode_image(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS, as_published: bool = False) -> LoadedImage:
    """Read the bytes of one file, as `load_image` reads a file; `name` is what errors call it.

    Raises:
        ImageError: no image, damaged, too small or too large.
    """
    with ExitStack() as held, _explained(name):
        if not data:
            raise ImageError("empty file")
        return _decode(io.BytesIO(data), held, max_pixels, as_published)


def _decode(file: IO[bytes], held: ExitStack, max_pixels: int, as_published: bool) -> LoadedImage:
    """Decode an open file; what it takes of the budget is given back when `held` is left."""
    with _pillow_in_hand(), _identify(file) as image:
        _check_size(image.width, image.height, max_pixels, limit_is_ours=as_published)
        notes = list(_frame_notes(image))
        held.enter_context(_BUDGET.reserved(_decoding_bytes(image)))
        image.load()
        rgb, more = _to_rgb(image, transparency=not as_published)
        if not as_published:
            _set_upright(rgb, image)
    return LoadedImage(image=rgb, notes=(*notes, *more))


def from_pixels(image: Image.Image) -> LoadedImage:
    """Treat an opened image as `load_image` treats a file: upright, RGB, wide values scaled, transparency on white.

    Raises:
        ImageError: it is too small, or cannot be decoded.
    """
    with _explained("image"):
        _check_size(*image.size, image.width * image.height)
        rgb, notes = _to_rgb(image)
        _set_upright(rgb, image)
        return LoadedImage(image=rgb, notes=notes)


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
    import torch  # not above: listing and decoding data sets does without it

    # In numpy: torch would open a team of OpenMP threads in each thread that decodes. With more such threads than cores
    # OpenMP lets its threads sleep between any two operations, and each step of the student takes a quarter longer.
    pixels = np.array(image, dtype=np.float32)  # (H, W, 3)
    pixels /= np.float32(255)
    pixels -= np.array(mean, dtype=np.float32)
    pixels /= np.array(std, dtype=np.float32)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


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


def _identify(file: IO[bytes]) -> Image.Image:
    """Open the header only; no pixel is decoded."""
    Image.init()
    known = [name for name in _FORMATS if name in Image.OPEN]  # AVIF and JPEG2000 depend on how Pillow was built
    try:
        return Image.open(file, formats=known)
    except UnidentifiedImageError as error:
        file.seek(0)
        kind = "text, not an image" if _looks_like_text(file.read(512)) else "not an image of a known format"
        raise ImageError(f"{kind} (known: {', '.join(known)})") from error


def _looks_like_text(start: bytes) -> bool:
    return all(byte >= 32 or byte in b"\t\n\r\f" for byte in start)


def _check_size(width: int, height: int, max_pixels: int, *, limit_is_ours: bool = False) -> None:
    if min(width, height) < MIN_SIDE:
        raise ImageError(
            f"{width}×{height} pixels is too small to show anything; at least {MIN_SIDE}×{MIN_SIDE} is needed"
        )
    if width * height > max_pixels:
        raise ImageError(
            f"{width}×{height} pixels is more than the limit of {max_pixels} pixels; not decoded"
            + ("" if limit_is_ours else " (raise max_pixels, --max-pixels on the command line, if you trust the file)")
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


def _set_upright(rgb: Image.Image, source: Image.Image) -> None:
    """Turn an image in place as the EXIF data of its source ask for."""
    with suppress(Exception):  # damaged EXIF data says nothing about the picture, which did decode
        rgb.getexif()[ExifTags.Base.Orientation] = source.getexif().get(ExifTags.Base.Orientation, 1)
        ImageOps.exif_transpose(rgb, in_place=True)


def _decoding_bytes(image: Image.Image) -> int:
    """What an identified image takes while it is decoded and converted: codec, pixels as they are, RGB."""
    own = {"1": 1, "L": 1, "P": 1}.get(image.mode, 2 if image.mode.startswith("I;16") else 4)
    return image.width * image.height * (_CODEC.get(image.format or "", 0) + own + 4)


def _to_rgb(image: Image.Image, *, transparency: bool = True) -> tuple[Image.Image, tuple[str, ...]]:
    """Return the image in mode RGB, and notes. Strip by strip: beside both images, memory does not grow with them."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_wide(image)
    if transparency and ("A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info):
        opaque = True

        def on_white(strip: Image.Image) -> Image.Image:
            nonlocal opaque
            layer = strip.convert("RGBA")
            if layer.getchannel("A").getextrema() == (255, 255):
                return layer.convert("RGB")
            opaque = False
            return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")

        rgb = _converted(image, on_white)
        return rgb, () if opaque else ("transparent parts are shown on white",)
    return _converted(image, lambda strip: strip.convert("RGB")), ()


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Cut an image into strips of about `_STRIP` pixels; yields the row where each begins, and the strip."""
    width, height = image.size
    rows = max(1, _STRIP // width)
    for top in range(0, height, rows):
        yield top, image.crop((0, top, width, min(top + rows, height)))


def _converted(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    if image.width * image.height <= _STRIP:
        return convert(image)
    rgb = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        rgb.paste(convert(strip), (0, top))
    return rgb


def _from_wide(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """Scale a grey image of 16 or 32 bits, integer or float, to 8 bits by its range, not cut off at 255."""

    def values(strip: Image.Image) -> NDArray[np.float64]:
        return np.nan_to_num(np.asarray(strip, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)

    # PNG and PGM hold at most 16 bits, also where Pillow widens them to mode I; elsewhere 32 bits mean what they reach.
    sixteen_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    notes: tuple[str, ...] = ()
    black, factor = 0.0, 1 / 257
    if not sixteen_bit:
        ranges = [(float(part.min()), float(part.max())) for part in (values(strip) for _, strip in _strips(image))]
        low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
        if image.mode == "F" and low >= 0 and high <= 1:
            factor = 255.0
        elif low >= 0 and high <= 255:
            factor = 1.0
        elif not (low >= 0 and high <= 65535):
            black, factor = low, 255 / (high - low)
            notes = (f"values from {low:g} to {high:g} are stretched over black to white",)

    def scaled(strip: Image.Image) -> Image.Image:
        grey = (values(strip) - black) * factor
        return Image.fromarray(np.rint(grey.clip(0, 255)).astype(np.uint8)).convert("RGB")

    return _converted(image, scaled), notes


class _Budget:
    """Bytes that threads share: who wants more than is left waits, who wants more than there is waits to be alone."""

    def __init__(self, total: int) -> None:
        self._total, self._taken = total, 0
        self._changed = threading.Condition()

    @contextmanager
    def reserved(self, wanted: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + wanted <= self._total)
            self._taken += wanted
        try:
            yield
        finally:
            with self._changed:
                self._taken -= wanted
                self._changed.notify_all()


_BUDGET = _Budget(DECODING_BYTES)

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
