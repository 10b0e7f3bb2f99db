"""Labelled images to learn from, a few of each class: class folders, a Parquet table, or the training part of a split.

What is made for testing is refused, unless that is asked for by name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from apm.errors import UsageError
from apm.images.load import decode_image
from apm.images.paths import printable
from apm.labels import imagenet_wnids, label_set

from .dataset import fingerprint, rank
from .layouts import data_root, require_layout
from .readers import Listing, Sample, read_folder, read_split_json
from .specs import DATASETS, spec_of

_TESTING = {"val", "valid", "validation", "test", "testing", "eval", "evaluation"}
_IMAGE, _LABEL = "image", "label"


@dataclass(frozen=True)
class TrainingImages:
    """What is learned from."""

    name: str
    samples: tuple[Sample, ...]
    """By class, then by rank within it."""
    class_names: tuple[str, ...]
    fingerprint: str
    """SHA-256 over ids and labels, as hex."""
    notes: tuple[str, ...]


def open_training(
    place: str, *, root: Path | None = None, shots: int, seed: int, allow_test: bool = False
) -> TrainingImages:
    """Choose a number of images of each class.

    Of a Parquet file the chosen images stay in memory as they are encoded.

    Args:
        place: a folder of class folders, a Parquet file, or a data set with a split json (its training part is taken).
        root: folder that holds the data sets, for the latter.
        shots: images of each class; of smaller classes all.
        seed: which images are taken depends on it and their ids alone, and fewer shots are part of more.
        allow_test: take also what its name says is for testing.

    Raises:
        UsageError: nothing that fits is there, or it is for testing.
    """
    if shots < 1:
        raise UsageError(f"{shots} shots: at least one image of each class is needed.")
    path = Path(place).expanduser()
    if place in DATASETS and not path.exists():
        listing = _split(place, root)
    else:
        if not path.exists():
            raise UsageError(
                f"{printable(path)}: no such folder or file. Give a folder of class folders, a .parquet file with the "
                f'columns "{_IMAGE}" and "{_LABEL}", or a data set whose split json has a training part.'
            )
        if not allow_test and (word := _for_testing(path)):
            raise UsageError(
                f'{printable(path)} is test data, going by its name "{word}": a prompt learned on it cannot be '
                "evaluated on it. Give the training part, or --allow-test if you mean it."
            )
        listing = _read_table(path) if path.suffix == ".parquet" else _read_folder(path)
    samples, notes = _few_of_each(listing, shots, seed)
    content = listing.content
    if path.suffix == ".parquet":
        name = path.stem
        samples, content = _with_bytes(path, samples)
    else:
        name = place if place in DATASETS and not path.exists() else "/".join(path.resolve().parts[-2:])
    return TrainingImages(name, samples, listing.class_names, fingerprint(samples, content), (*listing.notes, *notes))


def _for_testing(path: Path) -> str | None:
    """The word in a folder's or file's name, as written or where links lead, that says it is for testing."""
    for name in (path.stem if path.suffix == ".parquet" else path.name, path.resolve().stem):
        for word in re.split(r"[^a-z]+", name.lower()):
            if word in _TESTING:
                return word
    return None


def _split(name: str, root: Path | None) -> Listing:
    spec = spec_of(name)
    if spec.reader != "split-json":
        raise UsageError(
            f"{name} has no training part that is known here. Give the folder of its training images, with a folder "
            "for each class, or a .parquet file."
        )
    return read_split_json(spec, require_layout(spec, data_root(root)).folder, part="train")


def _read_folder(path: Path) -> Listing:
    if not path.is_dir():
        raise UsageError(f"{printable(path)} is one file; give a folder of class folders, or a .parquet file.")
    return read_folder(spec_of("folder"), path)


def _read_table(path: Path) -> Listing:
    """Ids, labels and names of a Parquet file; no image is read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            there = file.schema_arrow.names
            if missing := [name for name in (_IMAGE, _LABEL) if name not in there]:
                raise UsageError(f'{printable(path)} has no column "{missing[0]}"; its columns: {", ".join(there)}.')
            columns = [name for name in (_LABEL, "wnid", "class_name") if name in there]
            table = file.read(columns=columns).to_pydict()
            declared = _declared_names(file.schema_arrow.metadata or {})
    except (pa.ArrowInvalid, OSError) as error:
        raise UsageError(f"{printable(path)} cannot be read as Parquet ({' '.join(str(error).split())}).") from error
    table[_LABEL] = _class_numbers(path, table[_LABEL])
    names = _names(path, table, declared)
    order = {value: number for number, value in enumerate(sorted(names))}
    samples = [
        Sample(f"{path.stem}/{number:08d}", order[value], _not_read)
        for number, value in enumerate(table[_LABEL])
        if value is not None
    ]
    return Listing(samples, tuple(names[value] for value in sorted(names)), "train")


def _class_numbers(path: Path, labels: Sequence[Any]) -> list[int | None]:
    """The labels, None where an image has none, which the library datasets writes as -1."""
    for label in labels:
        if label is not None and type(label) is not int:
            raise UsageError(
                f'{printable(path)}: the column "{_LABEL}" contains {label!r}, which is no class number. Number the '
                'classes from 0, and put their names into a column "class_name".'
            )
    return [None if label is None or label < 0 else label for label in labels]


def _not_read() -> Image.Image:
    raise AssertionError("only chosen images are read")


def _with_bytes(path: Path, samples: Sequence[Sample]) -> tuple[tuple[Sample, ...], str]:
    """The chosen rows of a Parquet file with their encoded images, which are kept in memory, and a hash of these."""
    import pyarrow.parquet as pq

    wanted = {int(sample.id.rpartition("/")[2]) for sample in samples}
    found: dict[int, bytes] = {}
    first = 0
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if rows := [row for row in range(first, first + count) if row in wanted]:
                values = file.read_row_group(group, columns=[_IMAGE]).column(_IMAGE)
                for row in rows:
                    value = values[row - first].as_py()
                    found[row] = (value.get("bytes") if isinstance(value, dict) else value) or b""
            first += count
    digest = hashlib.sha256()
    made = []
    for sample in samples:
        row = int(sample.id.rpartition("/")[2])
        digest.update(hashlib.sha256(found[row]).digest())
        made.append(Sample(sample.id, sample.label, partial(_decoded, found[row], f"{path.name}, row {row}")))
    return tuple(made), digest.hexdigest()


def _decoded(data: bytes, name: str) -> Image.Image:
    return decode_image(data, name).image


def _names(path: Path, table: dict[str, list[Any]], declared: Sequence[str]) -> dict[int, str]:
    """The class name of each label: ImageNet's by wnid, else those in the table, else those of its header."""
    labels = table[_LABEL]
    wnids = {label: wnid for label, wnid in zip(labels, table.get("wnid", ()), strict=False) if wnid}
    known = dict(zip(imagenet_wnids(), label_set("imagenet"), strict=True))
    used = {label for label in labels if label is not None}
    if wnids and used <= wnids.keys() and set(wnids.values()) <= known.keys():
        return {label: known[wnids[label]] for label in used}
    written = {label: name for label, name in zip(labels, table.get("class_name", ()), strict=False) if name}
    if used and used <= written.keys():
        return {label: written[label].replace("_", " ") for label in used}
    if used and max(used) < len(declared):
        return {label: declared[label].replace("_", " ") for label in used}
    raise UsageError(
        f'{printable(path)} does not name its classes: it has no column "wnid" or "class_name", and its '
        "header declares none."
    )


def _declared_names(metadata: dict[bytes, bytes]) -> Sequence[str]:
    """The names of a ClassLabel, as the library datasets writes them."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][_LABEL]["names"]
    except (KeyError, ValueError, TypeError):
        return ()
    return [str(name) for name in names]


def _few_of_each(listing: Listing, shots: int, seed: int) -> tuple[tuple[Sample, ...], list[str]]:
    by_class: dict[int, list[tuple[bytes, int]]] = defaultdict(list)
    for number, sample in enumerate(listing.samples):
        by_class[sample.label].append((rank(seed, sample.id), number))
    chosen = [number for label in sorted(by_class) for _, number in sorted(by_class[label])[:shots]]
    counts = Counter(listing.samples[number].label for number in chosen)
    notes = []
    if empty := [name for label, name in enumerate(listing.class_names) if label not in counts]:
        notes.append(f"{len(empty)} class(es) have no image to learn from, such as {empty[0]}.")
    if short := [label for label, count in counts.items() if count < shots]:
        fewest = min(counts[label] for label in short)
        notes.append(
            f"{len(short)} class(es) have fewer than {shots} images: all of theirs are used, {fewest} at least."
        )
    return tuple(listing.samples[number] for number in chosen), notes


def class_of_each(place: Path, *, allow_test: bool = False) -> tuple[dict[str, int], tuple[str, ...]]:
    """The class of every labelled image in a tree of class folders or in a Parquet file.

    Returns:
        By the names that `apm.pretrain.images.open_images` gives the images, the number of their class; the names of
        the classes.

    Raises:
        UsageError: nothing that fits is there, or it is for testing and `allow_test` is not set.
    """
    if not place.exists():
        raise UsageError(f"{printable(place)}: no such folder or file.")
    if not allow_test and (word := _for_testing(place)):
        raise UsageError(
            f'{printable(place)} is test data, going by its name "{word}": what is trained on its labels cannot be '
            "evaluated on it. Give the training part, or --allow-test if you mean it."
        )
    if place.suffix == ".parquet":
        listing = _read_table(place)
        rows = (int(sample.id.rpartition("/")[2]) for sample in listing.samples)
        names = [f"{place.name}, row {row}" for row in rows]
    else:
        listing = _read_folder(place)
        names = [Path(sample.path or sample.id).relative_to(place).as_posix() for sample in listing.samples]
    return dict(zip(names, (sample.label for sample in listing.samples), strict=True)), listing.class_names
