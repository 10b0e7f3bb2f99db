"""Where the images of a cell come from: decoded ahead of need, or not at all while their features are known."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from PIL import Image

from apm.errors import ApmError, ImageError
from apm.images.paths import printable

from ..methods.base import KnownViews
from .decoding import Readable, Unreadable, decoded
from .file_state import FileState

if TYPE_CHECKING:
    from ..datasets import Dataset, Sample


class Features(Protocol):
    """Features of images that need not be computed again."""

    record: dict[str, str | int]
    """What they are, for the run's record."""

    def check(self, dataset: Dataset, now: FileState) -> None:
        """Refuse, with a `UsageError`, a data set or files (as they are now) that they are not of."""
        ...

    def cell(self, dataset: Dataset) -> CellFeatures:
        """Those of a data set that was checked."""
        ...


class CellFeatures(Protocol):
    """Features of the samples of one data set, by their number in it."""

    def error(self, number: int) -> str | None:
        """Why there are none of a sample: its image could not be decoded."""
        ...

    def views(self, numbers: Sequence[int]) -> KnownViews:
        """Those of some samples."""
        ...


class CellImages:
    """The images of one cell, in its stream order.

    Args:
        samples: of the cell.
        order: their numbers, in stream order.
        ahead: how many images are decoded before they are needed.
        workers: number of threads that decode.
        known: their features, where they need not be computed. Images are then decoded only from the batch on after
            one in which a method has asked for pixels.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        order: Sequence[int],
        *,
        ahead: int,
        workers: int,
        known: CellFeatures | None = None,
    ) -> None:
        self.samples, self.order, self.ahead, self.workers, self.known = samples, order, ahead, workers, known
        self.decoding = known is None
        """Whether images are decoded ahead; may be set at any time."""

    def __len__(self) -> int:
        return len(self.order)

    def read(self, positions: Iterable[int]) -> Generator[Readable | Unreadable, None, None]:
        """Yield the images at these places of the stream order."""
        left = ((position, self.samples[self.order[position]]) for position in positions)
        while not self.decoding:
            if (item := next(left, None)) is None:
                return
            yield self._as_known(Readable(*item, None))
        for found in decoded(left, ahead=self.ahead, workers=self.workers):
            yield self._as_known(found)

    def views(self, items: Sequence[Readable]) -> KnownViews | None:
        """What is known of some images."""
        if self.known is None:
            return None
        return self.known.views([self.order[item.position] for item in items])

    def opened(self, items: Sequence[Readable]) -> Sequence[Image.Image] | Callable[[], Sequence[Image.Image]]:
        """Some images, or, while none is decoded ahead, a function that decodes them."""
        images = [item.image for item in items if item.image is not None]
        if len(images) == len(items):
            return images
        samples = [item.sample for item in items]
        return lambda: [_load(sample) for sample in samples]

    def _as_known(self, item: Readable | Unreadable) -> Readable | Unreadable:
        """What could not be decoded when the features were made has none, even if it can be now."""
        error = None if self.known is None else self.known.error(self.order[item.position])
        return Unreadable(item.position, item.sample, error) if error else item


def _load(sample: Sample) -> Image.Image:
    try:
        return sample.load()
    except (ImageError, OSError) as error:
        why = printable(" ".join(str(error).split()))
        raise ApmError(
            f"{printable(sample.id)} cannot be read, though its features are known: {why}. Some methods need the "
            "images themselves: leave those out, or put the file back and run again."
        ) from error
