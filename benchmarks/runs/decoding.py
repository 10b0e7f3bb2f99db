"""Images of a run, decoded in threads, a bounded number of them ahead of the methods."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from apm.errors import ApmError, ImageError
from apm.images.ahead import in_order
from apm.images.paths import printable

if TYPE_CHECKING:
    from ..datasets import Sample


BATCH_BYTES = 512 << 20
"""Of images that are answered together: fewer are taken where they hold more."""


@dataclass(frozen=True)
class Readable:
    """An image ready to be answered."""

    position: int
    sample: Sample
    image: Image.Image | None
    """None: not decoded, since its features are known."""


@dataclass(frozen=True)
class Unreadable:
    """An image that cannot be decoded, and why."""

    position: int
    sample: Sample
    error: str


def decoded(
    todo: Iterator[tuple[int, Sample]], *, ahead: int, workers: int
) -> Generator[Readable | Unreadable, None, None]:
    """Decode samples in threads, in their order.

    Args:
        todo: position and sample, drawn from as images are taken.
        ahead: how many are decoded before they are needed; bounds the memory, as their bytes do.
        workers: number of threads.

    Raises:
        ApmError: not the image is at fault but where it comes from, such as a stream that broke off.
    """
    return in_order(todo, load, ahead=ahead, workers=workers, size=_bytes)


def load(item: tuple[int, Sample]) -> Readable | Unreadable:
    """Decode one sample.

    Raises:
        ApmError: as `decoded`.
    """
    position, sample = item
    try:
        return Readable(position, sample, sample.load())
    except MemoryError:
        raise
    except ApmError as error:
        if not isinstance(error, ImageError):
            raise
        return Unreadable(position, sample, printable(" ".join(str(error).split())))
    except Exception as error:  # decoders raise all kinds; the image is at fault, not the run
        return Unreadable(position, sample, printable(" ".join(str(error).split())) or type(error).__name__)


def next_batch(
    images: Iterator[Readable | Unreadable], count: int, *, whole: bool = False
) -> list[Readable | Unreadable]:
    """Take up to `count` images, none at the end; unless `whole`, fewer once they hold `BATCH_BYTES`."""
    batch: list[Readable | Unreadable] = []
    held = 0
    while len(batch) < count and (whole or held < BATCH_BYTES) and (item := next(images, None)) is not None:
        batch.append(item)
        held += _bytes(item)
    return batch


def _bytes(item: Readable | Unreadable) -> int:
    image = item.image if isinstance(item, Readable) else None
    return 4 * image.width * image.height if image else 0
