"""What a teacher is: a frozen image and text model whose image vector, or grid, the student is overfit to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from apm.errors import TeacherError

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor


class TeacherUnavailable(TeacherError):
    """A known teacher whose weights are neither on this machine nor reachable now."""


@runtime_checkable
class GridTeacher(Protocol):
    """A frozen image model that says what is where: a grid of features. It needs no text tower."""

    name: str
    """The name that it was asked for by, such as ``ViT-B-16/openai``."""
    identity: str
    """``name@`` and 16 hex digits of a sha256 over the weights: what caches and records are keyed by."""
    dim: int
    """D, the width of its vectors."""
    notes: tuple[str, ...]
    """What a user must be told about this teacher, one sentence each."""
    device: torch.device
    """The device of the weights."""
    grid_size: int
    """Side, in pixels, to which `encode_grid` scales the square when no size is given."""

    def encode_grid(self, image: Image.Image, *, size: int | None = None) -> Tensor:
        """Return the features of an image's parts.

        Args:
            image: RGB. Its central square is looked at, the one that `apm.images.load.central_square` cuts.
            size: pixels to which the square is scaled; None: `grid_size`.

        Returns:
            (h', w', D) float32 on `device`, NOT normalised; cell (i, j) is about the part [i/h', (i+1)/h') x
            [j/w', (j+1)/w') of the square. Of a `Teacher`: in the space of its texts.

        Raises:
            TeacherError: the model has no grid, or not at this size.
        """
        ...


@runtime_checkable
class Teacher(GridTeacher, Protocol):
    """A frozen CLIP-like model: an image tower and a text tower into the same D-dimensional space.

    Anything with these attributes is a teacher: no base class is needed. One without `encode_grid` can be distilled by
    its token alone. One whose input is not square says so by one more attribute, ``input_shape`` (height, width).
    """

    logit_scale: float
    """Multiplies a cosine to give a logit (already exponentiated, > 0)."""
    image_size: int
    """Side, in pixels, of the square image that `preprocess` returns."""
    mean: tuple[float, float, float]
    """Channel means that `preprocess` subtracts, for pixels in [0, 1]."""
    std: tuple[float, float, float]
    """Channel deviations that `preprocess` divides by."""
    default_labels: tuple[str, ...] | None
    """Class names to use when the user gives none; None when the teacher has no classes of its own."""
    default_templates: tuple[str, ...] | None
    """Prompt templates that suit this teacher best, each with one ``{}``; None for the general default."""

    def preprocess(self, image: Image.Image) -> Tensor:
        """Resize, crop and normalise one RGB image: (3, image_size, image_size) float32 on the CPU."""
        ...

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Map preprocessed images (B, 3, H, W) to CLS tokens after projection (B, D), float32, NOT normalised."""
        ...

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Map T texts to vectors (T, D), float32, NOT normalised; beyond the answer, memory does not grow with T."""
        ...


def check_grid(teacher: Teacher) -> None:
    """Refuse a teacher without a grid as wide as its token; tried on a blank image.

    Raises:
        TeacherError: it has none.
    """
    from PIL import Image

    if not hasattr(teacher, "encode_grid"):
        raise TeacherError(f'The teacher "{teacher.name}" has no grid: only its token can be distilled (distil=cls).')
    shape = tuple(teacher.encode_grid(Image.new("RGB", (teacher.image_size, teacher.image_size))).shape)
    if len(shape) != 3 or shape[2] != teacher.dim:
        raise TeacherError(f'The grid of the teacher "{teacher.name}" is {shape}; (h, w, {teacher.dim}) was expected.')
