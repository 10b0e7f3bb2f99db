"""From a recognised folder to samples and class names: one function for each way that data sets say their labels."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from apm.errors import UsageError, few
from apm.labels import IMAGENET_SUBSETS, imagenet_subset, imagenet_wnids, label_set
from apm.teachers.digits import digit_image, digits_split

from .files import beside, class_folders, class_images, dead_links, is_integer, is_wnid, read_rgb, split_json, stable_id
from .layouts import AIRCRAFT_NAMES, AIRCRAFT_TEST, is_training
from .specs import DatasetSpec


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a data set. The label is for comparing answers, never for a method."""

    id: str
    """Path below the folder of images, with forward slashes: the same wherever the data lie."""
    label: int
    load: Callable[[], Image.Image]
    """Decodes the image as RGB; raises ImageError when that cannot be done."""
    path: str | None = None
    """The file, where the image is one."""


@dataclass(frozen=True)
class Listing:
    """What a reader returns: samples in a fixed order, the names of the label space, what the user must be told."""

    samples: list[Sample]
    class_names: tuple[str, ...]
    split: str
    notes: tuple[str, ...] = ()
    content: str = ""
    """What changes with the images' content, where they are not files that can be looked at one by one."""


def subset_wnids(name: str) -> tuple[str, ...]:
    """Return the wnids of a set of ImageNet classes, by its own class numbers."""
    wnids = imagenet_wnids()
    return tuple(wnids[index] for index in imagenet_subset(name))


def read_class_tree(spec: DatasetSpec, folder: Path) -> Listing:
    """Read ``<wnid>/`` folders (or ``<0..999>/`` for ImageNet-V2) of a set whose classes are known.

    Raises:
        UsageError: a folder's name is no class of the set (named, with a guess which set it is), or no images.
    """
    if is_training(folder):
        beside_it = Path(os.path.abspath(folder)).parent / "val"
        where = f": {beside_it}" if beside_it.is_dir() else ", which is not beside it"
        raise UsageError(f"{spec.name}: {folder} is the training part; give the validation part{where}.")
    names = class_folders(folder)
    wnids = subset_wnids(spec.label_space)
    if spec.reader == "integer" and all(map(is_integer, names)):
        labels = _integer_labels(spec, folder, names, len(wnids))
    else:
        labels = _wnid_labels(spec, folder, names, wnids)
    samples, empty = _tree_samples(folder, labels)
    notes = [*_empty_notes(empty), *_dead_notes(folder, samples)]
    if len(names) < len(wnids):
        notes.append(f"{len(names):,} of {len(wnids):,} classes are present; logits are over all {len(wnids):,}.")
    return Listing(samples, label_set(spec.label_space), "val" if spec.name == "imagenet" else "test", tuple(notes))


def _integer_labels(spec: DatasetSpec, folder: Path, names: Sequence[str], classes: int) -> dict[str, int]:
    labels = {name: int(name) for name in names}
    outside = [name for name, label in labels.items() if label >= classes]
    if outside or len(set(labels.values())) < len(labels):
        problem = (
            f"are outside 0..{classes - 1}: {few(outside)}" if outside else "name one class twice (such as 1 and 01)"
        )
        raise UsageError(f"{spec.name}: folders in {folder} {problem}.")
    return labels


def _wnid_labels(spec: DatasetSpec, folder: Path, names: Sequence[str], wnids: Sequence[str]) -> dict[str, int]:
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    no_wnids = [name for name in names if not is_wnid(name)]
    if no_wnids:
        raise UsageError(f"{spec.name}: {len(no_wnids)} folder(s) in {folder} are not wnids: {few(no_wnids)}.")
    outside = [name for name in names if name not in label_of]
    if outside:
        fitting = [
            other for other in ("imagenet-a", "imagenet-r", "imagenet") if set(names) <= set(subset_wnids(other))
        ]
        guess = f" They fit {' and '.join(fitting)}." if fitting else ""
        raise UsageError(
            f"{spec.name}: {len(outside)} of {len(names)} class folders in {folder} are not among its {len(wnids)} "
            f"classes: {few(outside)}.{guess}"
        )
    return {name: label_of[name] for name in names}


def _tree_samples(folder: Path, labels: dict[str, int]) -> tuple[list[Sample], list[str]]:
    """Return the samples, class by class, and the names of the classes without pictures."""
    samples, empty = [], []
    for name, label in labels.items():
        images = class_images(folder / name)
        if not images:
            empty.append(name)
        for image in images:
            path = f"{name}/{image}"
            samples.append(_file_sample(stable_id(path), label, folder, path))
    if not samples:
        raise UsageError(f"No pictures in the {len(labels)} class folders of {folder}.")
    return samples, empty


def _file_sample(identity: str, label: int, folder: Path, inside: str) -> Sample:
    path = os.path.join(folder, inside)
    return Sample(identity, label, partial(read_rgb, path), path)


def _empty_notes(empty: Sequence[str]) -> Iterable[str]:
    if empty:
        yield f"{len(empty)} class folder(s) hold no pictures: {few(empty)}."


def _dead_notes(folder: Path, samples: Sequence[Sample]) -> Iterable[str]:
    """Say which links lead nowhere: those of pictures, which become error rows, and those of whole classes.

    Raises:
        UsageError: all pictures are such links.
    """
    places = sorted({os.path.dirname(sample.id) for sample in samples})
    links = {stable_id(f"{place}/{name}") for place in places for name in dead_links(folder / place)}
    dead = [sample.id for sample in samples if sample.id in links]
    if len(dead) == len(samples):
        raise UsageError(f"All {len(dead):,} pictures of {folder} are links to files that are not there: {few(dead)}.")
    if dead:
        yield f"{len(dead):,} picture(s) are links to files that are not there, recorded as errors: {few(dead)}."
    if lost := dead_links(folder):
        yield f"{len(lost):,} link(s) beside the class folders lead nowhere, their pictures are missing: {few(lost)}."


def read_folder(spec: DatasetSpec, folder: Path, *, names_from: str | None = None) -> Listing:
    """Read any tree of class folders.

    When all folders are ImageNet wnids the names are ImageNet's, in ImageNet's order; otherwise a folder's name is its
    class's name, underscores read as spaces. The label space is the classes present, unless `names_from` names a
    label set: then it is all of that set.

    Raises:
        UsageError: a wnid that is none of ImageNet-1k's, pictures of one class only, or a class that the label set
            does not hold.
    """
    folders = class_folders(folder)
    known = set(imagenet_wnids())
    strange = [name for name in folders if is_wnid(name) and name not in known]
    if strange:
        raise UsageError(f"{len(strange)} folder(s) in {folder} are not wnids of ImageNet-1k: {few(strange)}.")
    all_wnids = all(map(is_wnid, folders))
    if not all_wnids and any(map(is_wnid, folders)):
        plain = [name for name in folders if not is_wnid(name)]
        raise UsageError(f"{folder} mixes wnids with other folders: {few(plain)}. Leave only one kind.")
    names = dict(zip(imagenet_wnids(), label_set("imagenet"), strict=True)) if all_wnids else {}
    shown = {name: names.get(name, stable_id(name).replace("_", " ")) for name in folders}
    notes = []
    if names_from is None:
        if len(folders) < 2:
            raise UsageError(
                f"{folder} contains only one class, {few(folders)}: there is nothing to choose from. --label-set NAME "
                "may help."
            )
        labels = {name: label for label, name in enumerate(folders)}
        class_names = tuple(shown.values())
        notes.append(f"Label space: the {len(folders):,} classes present.")
    else:
        class_names = label_set(names_from)
        labels = _labels_in(folder, shown, names_from, class_names, by_wnid=all_wnids)
        notes.append(f"Label space: {names_from}, {len(class_names):,} classes, of which {len(folders):,} are present.")
    if not all_wnids and all(map(is_integer, folders)):
        notes.append("The folders are plain numbers: they were taken as class names.")
    samples, empty = _tree_samples(folder, labels)
    if names_from is None and len(folders) - len(empty) < 2:
        full = next(name for name in folders if name not in empty)
        raise UsageError(
            f"Of the {len(folders)} folders of {folder} only {full} contains pictures: there is nothing to choose "
            "from. A wrong parent folder? Give the folder of the classes; --label-set NAME if there is but one class."
        )
    return Listing(samples, class_names, "all", (*notes, *_empty_notes(empty), *_dead_notes(folder, samples)))


def _labels_in(
    folder: Path, shown: dict[str, str], set_name: str, class_names: Sequence[str], *, by_wnid: bool
) -> dict[str, int]:
    if by_wnid and set_name in IMAGENET_SUBSETS:
        label_of = {wnid: label for label, wnid in enumerate(subset_wnids(set_name))}
        found = {name: label_of.get(name) for name in shown}
    else:
        by_name: dict[str, int] = {}
        for label, name in enumerate(class_names):
            by_name.setdefault(name.casefold(), label)  # of equal names the first: it wins where logits are equal
        found = {name: by_name.get(text.casefold()) for name, text in shown.items()}
    missing = [shown[name] for name, label in found.items() if label is None]
    if missing:
        raise UsageError(f"{len(missing)} class(es) of {folder} are not in the label set {set_name}: {few(missing)}.")
    return {name: label for name, label in found.items() if label is not None}


def read_split_json(spec: DatasetSpec, folder: Path, *, part: str = "test") -> Listing:
    """Read the test split of a CoOp split json: ``{"train"|"val"|"test": [[path, label, name], …]}``; or another part.

    Class names are the json's own with underscores read as spaces (EuroSAT's json holds CoOp's longer ones, such as
    "Annual Crop Land"). Classes that no split of the json names are unknown: then the others are renumbered, and that
    is said. Images that are named but absent stay samples: they become error rows and are counted.

    Raises:
        UsageError: the json is damaged or of another form, its test split is empty, or every image is absent.
    """
    path = split_json(folder, spec.split_file)
    splits = _load_splits(path)
    names: dict[int, str] = {}
    for entry in (entry for split in splits.values() for entry in split):
        if names.setdefault(entry[1], entry[2]) != entry[2]:
            raise UsageError(f'{path}: class {entry[1]} is called both "{names[entry[1]]}" and "{entry[2]}".')
    test = splits[part]
    if not test:
        raise UsageError(f"{path}: its {part} split is empty.")
    number = {label: position for position, label in enumerate(sorted(names))}
    samples = [_file_sample(entry[0], number[entry[1]], folder, entry[0]) for entry in test]
    absent = [entry[0] for entry in test if not (folder / entry[0]).is_file()]
    if len(absent) == len(test):
        raise UsageError(f"{path} names {len(test):,} {part} images, and none of them is in {folder}: {few(absent)}.")
    notes = []
    if absent:
        notes.append(f"{path.name} names {len(absent):,} absent image(s), recorded as errors: {few(absent)}.")
    if max(names) + 1 > len(names) or len(names) < spec.classes:
        notes.append(
            f"{path.name} names {len(names)} of {spec.classes or max(names) + 1} classes: logits are over these,"
            " renumbered."
        )
    return Listing(samples, tuple(names[label].replace("_", " ") for label in sorted(names)), part, tuple(notes))


def _load_splits(path: Path) -> dict[str, list[tuple[str, int, str]]]:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as a split json: {error}.") from error
    expected = '{"train": […], "val": […], "test": [[relative path, label, class name], …]}'
    if not isinstance(content, dict) or not isinstance(content.get("test"), list):
        raise UsageError(f"{path} is not a split json; expected {expected}.")
    splits: dict[str, list[tuple[str, int, str]]] = {}
    for split in ("train", "val", "test"):
        entries = content.get(split) or []
        if not isinstance(entries, list):
            raise UsageError(f"{path} is not a split json: {split} is not a list; expected {expected}.")
        splits[split] = [_split_entry(path, split, entry) for entry in entries]
    counts = Counter(entry[0] for entry in splits["test"])
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise UsageError(f"{path}: the test split names {len(twice)} image(s) twice: {few(twice)}.")
    return splits


def _split_entry(path: Path, split: str, entry: Any) -> tuple[str, int, str]:
    """One [path, label, class name] of a split json, its path without needless parts (``./a.jpg`` is ``a.jpg``)."""
    fitting = isinstance(entry, list) and [type(value) for value in entry] == [str, int, str]
    if not fitting or entry[1] < 0 or not (entry[0].strip() and entry[2].strip()) or not _is_text(entry[0] + entry[2]):
        raise UsageError(f"{path}: in {split}, {json.dumps(entry)[:80]} is not [path, label, class name].")
    pure = PurePosixPath(entry[0])
    if pure.is_absolute() or ".." in pure.parts:
        raise UsageError(f'{path}: in {split}, the path "{entry[0]}" leaves the folder of images.')
    return str(pure), entry[1], entry[2]


def _is_text(text: str) -> bool:
    """Whether a string can be written to a file: json can hold halves of characters, and null characters."""
    try:
        return "\0" not in text and bool(text.encode())
    except UnicodeEncodeError:
        return False


def read_aircraft(spec: DatasetSpec, folder: Path) -> Listing:
    """Read FGVC Aircraft's variants: names in ``variants.txt``, ``<image> <variant>`` lines of the test split.

    Raises:
        UsageError: a file cannot be read, a line names no variant, or every image is absent.
    """
    names = _lines(beside(folder, AIRCRAFT_NAMES))
    test = beside(folder, AIRCRAFT_TEST)
    label_of = {name: label for label, name in enumerate(names)}
    samples, absent = [], []
    for line in _lines(test):
        image, _, variant = line.partition(" ")
        if variant not in label_of:
            raise UsageError(f'{test}: "{line}" names no variant of {AIRCRAFT_NAMES}.')
        path = f"{image}.jpg"
        samples.append(_file_sample(path, label_of[variant], folder, path))
        if not (folder / path).is_file():
            absent.append(path)
    if len(absent) == len(samples):
        raise UsageError(f"{AIRCRAFT_TEST} names {len(samples):,} images, and none of them is in {folder}.")
    notes = (
        [f"{AIRCRAFT_TEST} names {len(absent):,} absent image(s), recorded as errors: {few(absent)}."] if absent else []
    )
    return Listing(samples, tuple(names), "test", tuple(notes))


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}.") from error


def read_digits() -> Listing:
    """The test half of scikit-learn's digits (`apm.teachers.digits`), as 96×96 RGB pictures."""
    split = digits_split()
    rows = zip(split.test_indices, split.test_labels, split.test_images, strict=True)
    samples = [Sample(f"digits/{index:04d}", int(label), partial(digit_image, pixels)) for index, label, pixels in rows]
    return Listing(samples, label_set("digits"), "test half")
