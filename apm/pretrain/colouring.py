"""Black and white becomes coloured: a, b of CIE Lab from a student with grey input, L from the photograph itself.

From the talks on Modi & Rawat 2024: the trigger column of a grey image, read out by a student trained on colours. The
student sees the WHOLE photograph, squeezed to its square, and not the central square that it was trained on: places are
then shares of the photograph's sides, and sky stays above and ground below whatever the shape.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from apm.errors import UsageError
from apm.images.load import IMAGENET_MEAN, IMAGENET_STD, normalised
from apm.pretrain.student import Student
from apm.student.position import dense_locations

MOST_PLACES = 1024
"""Along a side."""
_STRIP = 1 << 20  # pixels that are coloured at a time: bounds the memory
_SEEN = 0.5  # of L: what clipping to sRGB may change, rounding to 8 bits included; it is invisible
_HALVINGS = 7


def colourise(student: Student, image: Image.Image, *, places: int | None = None) -> Image.Image:
    """Colour a photograph, grey or not, by what the student makes of its luma.

    Args:
        student: trained on grey input.
        image: mode RGB, any size and shape.
        places: along a side, at which the student's field is read; between them colours are interpolated. None: its
            own, those it was trained at.

    Returns:
        RGB, of the same size. Its lightness is the photograph's.

    Raises:
        UsageError: the student was not trained on grey input, or `places` is no number that can work.
    """
    check_student(student)
    side = check_places(student, places)
    return with_chroma(image, chroma(student, student.columns(whole(image, student.config.image_size)[None]), side)[0])


def check_student(student: Student) -> None:
    """Refuse a student that did not learn colours of grey images.

    Raises:
        UsageError: it did not.
    """
    if not student.grey_input:
        raise UsageError(
            f"The {student.describe()}, was trained on colours; `apm pretrain --grey-input` trains one for this."
        )


def check_places(student: Student, places: int | None) -> int:
    """The number of locations per side.

    Raises:
        UsageError: it is not from 1 to `MOST_PLACES`.
    """
    if places is not None and not 1 <= places <= MOST_PLACES:
        raise UsageError(f"The number of locations per side must be from 1 to {MOST_PLACES}, not {places}.")
    return student.config.grid if places is None else places


def whole(image: Image.Image, size: int) -> Tensor:
    """The whole of an RGB image, squeezed to a square (3, size, size), ImageNet-normalised."""
    return normalised(image.resize((size, size), Image.Resampling.BICUBIC), IMAGENET_MEAN, IMAGENET_STD)


def chroma(student: Student, columns: Tensor, places: int) -> NDArray[np.float32]:
    """The student's prediction of a and b, (B, places, places, 2), from the trigger columns (B, N) of grey images."""
    _, colours = student.field(columns.to(student.device), *dense_locations(student.config.grid, places))
    return lab(colours.clamp(0, 1).reshape(-1, places, places, 3).numpy())[..., 1:]


def lab(rgb: NDArray[np.uint8] | NDArray[np.float32]) -> NDArray[np.float32]:
    """sRGB (..., 3), bytes or in [0, 1] -> CIE Lab (..., 3), white point D65; L in [0, 100]."""
    from skimage.color import rgb2lab

    scaled = rgb.astype(np.float32) / 255 if rgb.dtype == np.uint8 else rgb
    return rgb2lab(scaled).astype(np.float32)


def with_chroma(image: Image.Image, found: NDArray[np.float32]) -> Image.Image:
    """Give an RGB image other colours, and leave it its lightness.

    Args:
        image: mode RGB.
        found: a and b (P, Q, 2) in P × Q equal cells laid over the image; between their centres they are interpolated
            (bilinear), past the outermost they are constant.

    Returns:
        RGB of the same size. Where sRGB has no such colour of that lightness, the colour is paler.
    """
    coloured = Image.new("RGB", image.size)
    planes = [Image.fromarray(np.ascontiguousarray(found[..., channel], dtype=np.float32)) for channel in (0, 1)]
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        box = tuple(edge / image.height * len(found) for edge in (top, bottom))
        size, part = (image.width, bottom - top), (0, box[0], found.shape[1], box[1])
        a, b = (np.asarray(plane.resize(size, Image.Resampling.BILINEAR, box=part)) for plane in planes)
        light = lab(np.asarray(image.crop((0, top, image.width, bottom))))[..., 0]
        coloured.paste(Image.fromarray(_bytes(np.stack((light, a, b), axis=-1))), (0, top))
    return coloured


def _bytes(wanted: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Lab (h, w, 3) -> sRGB bytes of the same L; a and b are drawn in where clipping would change it."""
    rgb = _rgb(wanted)
    light = wanted[..., 0]
    off = np.abs(lab(rgb)[..., 0] - light) > _SEEN
    if not off.any():
        return rgb
    outside = wanted[off]
    low, high = np.zeros(len(outside), np.float32), np.ones(len(outside), np.float32)
    for _ in range(_HALVINGS):  # the largest share of the colour that keeps the lightness
        middle = np.float32(0.5) * (low + high)
        fits = np.abs(lab(_rgb(_paler(outside, middle)))[..., 0] - outside[:, 0]) <= _SEEN
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    rgb[off] = _rgb(_paler(outside, low))
    return rgb


def _paler(colours: NDArray[np.float32], share: NDArray[np.float32]) -> NDArray[np.float32]:
    """Lab (n, 3) with that share (n,) of its a and b."""
    return np.concatenate((colours[:, :1], colours[:, 1:] * share[:, None]), axis=1)


def _rgb(colours: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Lab (..., 3) -> the nearest bytes of sRGB; what is outside is clipped."""
    import warnings

    from skimage.color import lab2rgb

    with warnings.catch_warnings():  # about colours that no light has; they are clipped like all others
        warnings.filterwarnings("ignore", message=".*negative Z values", category=UserWarning)
        rgb = lab2rgb(colours)
    return np.rint(np.clip(rgb, 0, 1) * 255).astype(np.uint8)
