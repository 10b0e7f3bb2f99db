"""Data sets of the Hugging Face hub, or local folders in its forms, streamed through `datasets`.

Rows are read in their order. Pictures that were read are kept, still encoded, in a temporary file, so that no order of
access takes more than one pass; the file grows to their size.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

from PIL import Image

from apm.errors import ApmError, UsageError
from apm.images.load import MAX_PIXELS, decode_image
from apm.labels import imagenet_subset, imagenet_wnids, label_set

from .files import is_wnid, read_rgb
from .readers import Listing, Sample, subset_wnids
from .specs import DatasetSpec

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
_LABEL_COLUMNS = ("wnid", "label", "labels", "cls", "class_name")
_SPLITS = ("test", "validation", "val", "train")
_SECONDS = 4.0  # to wait for the first answer of the hub
_WORDS = (".md", ".gitattributes")  # endings of files that hold no images
_READ_WHOLE_BELOW = 64 << 20  # bytes: a local folder is hashed in full up to this size
_SAMPLED, _SAMPLE = 64, 1 << 20  # of a larger one: the number of files, and bytes at both ends of each


def parse_source(source: str) -> tuple[str, str | None]:
    """Split ``hf:REPO[:SPLIT]`` (REPO may be a local folder) into repository and split.

    Raises:
        UsageError: another form.
    """
    scheme, _, rest = source.partition(":")
    if scheme != "hf" or not rest:
        raise UsageError(
            f'The source "{source}" is not understood. Expected hf:REPOSITORY[:SPLIT] or hf:FOLDER[:SPLIT].'
        )
    repository, colon, split = rest.rpartition(":")
    if not colon or Path(rest).exists():
        return rest, None
    return repository, split or None


def read_hub(spec: DatasetSpec, source: str) -> Listing:
    """Open a streamed data set and list its rows.

    Labels are read in a first pass. Their meaning, first match: a ``wnid`` column; class names of the label feature
    that are wnids; names that are those of the label space; 1000 names or numbers of ImageNet for a subset of it; plain
    numbers of the label space.

    Args:
        spec: the data set that it claims to be; ``folder`` takes the names that the data bring.
        source: ``hf:REPO[:SPLIT]``.

    Raises:
        UsageError: not reachable within seconds, no such split, no columns of images and labels, labels without names.
    """
    if spec.reader in ("corrupted", "digits"):
        raise UsageError(f"{spec.name} cannot be streamed with --source hf:…")
    repository, wanted = parse_source(source)
    stream, split, content = _open(repository, wanted)
    features = dict(stream.features or {})
    with _told(source):
        columns = list(features) or list(next(iter(stream), {}))
    image_column = _first(_IMAGE_COLUMNS, columns, repository)
    label_column = _first(_LABEL_COLUMNS, columns, repository)
    rows = _Rows(stream, image_column)
    # A webdataset cannot be read without its images; a table can.
    with _told(source):
        labels = rows.read_all(label_column) if "__key__" in columns else _labels_only(stream, label_column)
    if not labels:
        raise UsageError(f"{source}: its split {split} is empty.")
    names = getattr(features.get(label_column), "names", None) or _names_file(repository)
    numbers, class_names = _interpret(spec, labels, names, source)
    samples = [Sample(f"{split}/{row:07d}", label, partial(rows.load, row)) for row, label in enumerate(numbers)]
    notes = [f"Streamed from {source}, split {split}; columns {image_column}, {label_column}."]
    if spec.reader in ("split-json", "aircraft"):
        notes.append(f"Not CoOp's split of {spec.name}: do not compare with numbers on that split.")
    return Listing(samples, class_names, split, tuple(notes), content)


def _first(known: Sequence[str], columns: Sequence[str], repository: str) -> str:
    for name in known:
        if name in columns:
            return name
    raise UsageError(f"{repository} has none of the columns {', '.join(known)}; it has {', '.join(columns)}.")


def _open(repository: str, wanted: str | None) -> tuple[Any, str, str]:
    """Return the stream of one split, the split's name, and what changes with the content of the files."""
    if Path(repository).exists():
        revision, content = None, folder_content(Path(repository))
    else:
        revision, content = _ask_hub(repository)
    import datasets

    try:
        splits = datasets.load_dataset(repository, streaming=True, revision=revision)
    except Exception as error:  # every builder of the library raises its own kinds
        raise UsageError(f"hf:{repository} cannot be opened: {_first_line(error)}") from error
    names = list(splits)
    if wanted is None:
        wanted = next((name for name in _SPLITS if name in names), names[0])
    if wanted not in names:
        raise UsageError(f'hf:{repository} has no split "{wanted}"; it has {", ".join(names)}.')
    return splits[wanted], wanted, content


def folder_content(folder: Path) -> str:
    """Return the SHA-256 over names, sizes and content of the files in a folder, or of one file, as hex.

    Of more than 64 MiB, content is what stands at the beginning and the end of 64 files that are spread over all.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else [folder]
    sizes = [path.stat().st_size for path in files]
    step = 1 if sum(sizes) <= _READ_WHOLE_BELOW else max(1, len(files) // _SAMPLED)
    sample = _READ_WHOLE_BELOW if sum(sizes) <= _READ_WHOLE_BELOW else _SAMPLE
    digest = hashlib.sha256()
    for number, (path, size) in enumerate(zip(files, sizes, strict=True)):
        name = path.relative_to(folder).as_posix() if folder.is_dir() else path.name
        digest.update(f"{name}\0{size}\n".encode("utf-8", "surrogateescape"))
        if number % step == 0:
            with path.open("rb") as file:
                digest.update(file.read(sample))
                file.seek(max(0, size - sample))
                digest.update(file.read(sample))
    return digest.hexdigest()


def _ask_hub(repository: str) -> tuple[str | None, str]:
    """Ask the hub once for the repository, with a short limit: the library itself would retry for minutes.

    Returns:
        The commit, so that what is read is what was asked for; and the SHA-256 over names and contents of all files
        but those of words, as hex. None and "" where the answer does not say.

    Raises:
        UsageError: offline by setting, not reachable, no such repository, or no permission.
    """
    from huggingface_hub import constants, get_token

    if repository.startswith((".", "/", "~")) or repository.count("/") > 1:
        raise UsageError(f"hf:{repository}: there is no such folder.")
    if constants.HF_HUB_OFFLINE:
        raise UsageError(f"hf:{repository}: the hub is switched off (HF_HUB_OFFLINE), and there is no such folder.")
    token = get_token()
    request = Request(f"{constants.ENDPOINT}/api/datasets/{quote(repository)}?blobs=true")
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urlopen(request, timeout=_SECONDS) as answer:
            return _commit_and_content(answer.read())
    except HTTPError as error:
        error.close()
        raise UsageError(
            f"hf:{repository}: {constants.ENDPOINT} answers {error.code} {error.reason}: there is no such data set, or"
            " it is not shown to you. For a gated one accept its terms there and log in (hf auth login)."
        ) from error
    except (OSError, ValueError) as error:
        raise UsageError(f"hf:{repository}: {constants.ENDPOINT} is not reachable: {_first_line(error)}") from error


def _commit_and_content(answer: bytes) -> tuple[str | None, str]:
    """Read the hub's description of a repository; see `_ask_hub`."""
    try:
        said = json.loads(answer)
        files = sorted((file["rfilename"], file["blobId"]) for file in said["siblings"])
        images = [file for file in files if not file[0].endswith(_WORDS)]
        return said["sha"], hashlib.sha256(json.dumps(images).encode()).hexdigest()
    except (ValueError, TypeError, LookupError):  # a mirror may say less
        return None, ""


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _told(source: str) -> Iterator[None]:
    """Turn whatever the library raises while rows are read into a sentence for people."""
    try:
        yield
    except Exception as error:  # damaged files and broken connections come in all kinds
        raise UsageError(f"{source}: its rows cannot be read: {_first_line(error)}") from error


def _labels_only(stream: Any, column: str) -> list[Any]:
    return [row[column] for row in stream.select_columns([column])]


def _names_file(repository: str) -> list[str] | None:
    """Return the lines of ``classnames.txt``, which clip-benchmark's repositories hold, or None."""
    folder = Path(repository)
    if folder.exists():
        path = (folder if folder.is_dir() else folder.parent) / "classnames.txt"
    else:
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(repository, "classnames.txt", repo_type="dataset", etag_timeout=_SECONDS))
        except Exception:  # it is optional, and the reasons for which it cannot be had are many
            return None
    if not path.is_file():
        return None
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").rstrip().split("\n")]
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {_first_line(error)}.") from error


def _interpret(
    spec: DatasetSpec, labels: Sequence[Any], names: Sequence[str] | None, source: str
) -> tuple[list[int], tuple[str, ...]]:
    """Turn the label column into numbers of the label space, and return the space's names."""
    texts = _as_texts(labels, names)
    if spec.label_space:
        class_names = label_set(spec.label_space)
        if texts is not None and all(is_wnid(text) for text in set(texts)):
            return _look_up(texts, subset_wnids(spec.label_space), spec, source), class_names
        if texts is not None and names is not None and len(names) != len(imagenet_wnids()):
            folded = [name.casefold() for name in class_names]
            if {text.casefold() for text in texts} <= set(folded) and len(set(folded)) == len(folded):
                return _look_up([text.casefold() for text in texts], folded, spec, source), class_names
        return _numbers(spec, labels, names, source), class_names
    if texts is None:
        if any(not isinstance(label, int) or label < 0 for label in labels):
            raise UsageError(f"{source}: its labels are neither names nor numbers.")
        raise UsageError(
            f"{source}: its labels are numbers without names. Put a classnames.txt with one name per line beside the "
            "data."
        )
    if all(is_wnid(text) for text in set(texts)):
        position = {wnid: index for index, wnid in enumerate(imagenet_wnids())}
        present = sorted(set(texts), key=lambda wnid: (position.get(wnid, len(position)), wnid))
        if all(wnid in position for wnid in present):
            imagenet = label_set("imagenet")
            return _look_up(texts, present, spec, source), tuple(imagenet[position[wnid]] for wnid in present)
    space = list(names) if names is not None else sorted(set(texts))
    numbers = _look_up(texts, space, spec, source) if isinstance(labels[0], str) else list(labels)
    return numbers, tuple(name.replace("_", " ") for name in space)


def _as_texts(labels: Sequence[Any], names: Sequence[str] | None) -> list[str] | None:
    """The labels as texts: their own, or the names that their numbers stand for; None where there are none."""
    if all(isinstance(label, str) for label in labels):
        return list(labels)
    if names is None or any(not isinstance(label, int) or not 0 <= label < len(names) for label in labels):
        return None
    return [names[label] for label in labels]


def _look_up(texts: Sequence[str], space: Sequence[str], spec: DatasetSpec, source: str) -> list[int]:
    number = {text: index for index, text in enumerate(space)}
    strange = sorted({text for text in texts if text not in number})
    if strange:
        raise UsageError(f"{source}: {len(strange)} of its classes are not in {spec.name}: {', '.join(strange[:3])}.")
    return [number[text] for text in texts]


def _numbers(spec: DatasetSpec, labels: Sequence[Any], names: Sequence[str] | None, source: str) -> list[int]:
    """Plain numbers: of the label space itself, or of ImageNet's 1000 for a subset of it."""
    if any(not isinstance(label, int) or label < 0 for label in labels):
        raise UsageError(f"{source}: its labels fit neither the names nor the numbers of {spec.name}.")
    subset = imagenet_subset(spec.label_space)
    if max(labels) < len(subset) and (names is None or len(names) <= len(subset)):
        return list(labels)
    if set(labels) <= set(subset):
        position = {index: label for label, index in enumerate(subset)}
        return [position[label] for label in labels]
    raise UsageError(f"{source}: its labels go up to {max(labels)}, but {spec.name} has {len(subset)} classes.")


class _Rows:
    """The encoded images of a stream by row number; safe with threads, not to be pickled."""

    def __init__(self, stream: Any, column: str) -> None:
        import datasets

        self._column = column
        self._stream: Callable[[], Any] = lambda: stream.cast_column(column, datasets.Image(decode=False))
        self._rows: Iterator[Mapping[str, Any]] | None = None
        self._spool = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this object
        weakref.finalize(self, self._spool.close)
        self._spans: list[tuple[int, int] | str] = []  # offset and length in the spool, or the path of a local file
        self._lock = threading.Lock()

    def read_all(self, label_column: str) -> list[Any]:
        """Read every row at once; returns the labels."""
        with self._lock:
            labels = []
            for row in self._stream():
                self._keep(row)
                labels.append(row[label_column])
            return labels

    def load(self, row: int) -> Image.Image:
        """Decode one row, reading the stream on to it when it was not passed yet.

        Raises:
            ImageError: the row holds no picture that can be decoded.
            ApmError: the stream broke off; no fault of the image.
        """
        with self._lock:
            if self._rows is None and row >= len(self._spans):
                self._rows = iter(self._stream())
            while len(self._spans) <= row and self._rows is not None:
                try:
                    self._keep(next(self._rows))
                except Exception as error:  # as above; StopIteration: shorter than when its labels were read
                    raise ApmError(f"The stream broke off at row {row}: {_first_line(error)}.") from error
            span = self._spans[row]
            if isinstance(span, str):
                return read_rgb(span)
            self._spool.seek(span[0])
            encoded = self._spool.read(span[1])
        return decode_image(encoded, f"row {row}", max_pixels=2 * MAX_PIXELS, as_published=True).image

    def _keep(self, row: Mapping[str, Any]) -> None:
        image = row[self._column] or {}
        encoded = image.get("bytes")
        if encoded is None and image.get("path"):
            self._spans.append(str(image["path"]))
            return
        offset = self._spool.seek(0, io.SEEK_END)
        self._spans.append((offset, self._spool.write(encoded or b"")))
