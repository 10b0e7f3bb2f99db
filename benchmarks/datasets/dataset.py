"""Open a data set by its name: recognise the layout, read the labels, corrupt when asked, take a subset when asked."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from apm.errors import UsageError, unknown

from ..corruptions import CORRUPTIONS, CROP, MARK, RESIZE, SETTINGS_FILE, check_level, corrupt_image
from . import readers
from .hub import read_hub
from .layouts import (
    UNKNOWN_VARIANT,
    Found,
    corruption_named,
    data_root,
    find_layout,
    other_set,
    require_layout,
    variant_of,
)
from .readers import Listing, Sample
from .specs import DATASETS, DatasetSpec, spec_of


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set, opened: its samples and what a record says of it. Only the runner may look at labels."""

    name: str
    samples: Sequence[Sample]
    class_names: tuple[str, ...]
    """Names of the label space, by label."""
    templates: tuple[str, ...]
    prompts_name: str
    layout: str
    """The layout that was recognised, for people."""
    source: str
    """Folder or hub repository."""
    split: str
    fingerprint: str
    """SHA-256 over the ids and labels of `samples`, in their order, and of a stream over its files; as hex."""
    notes: tuple[str, ...]
    """What a reader of the numbers must know."""
    total: int
    """Samples before `limit`."""
    warnings: tuple[str, ...] = ()
    """What makes the numbers something else than their name says: for stderr, records and tables."""
    variant: str | None = None
    """Which of the set's variants this is, or `UNKNOWN_VARIANT`; None where a set has none."""
    limit: int | None = None
    corruption: str | None = None
    level: int | None = None
    generated: bool = False
    """Whether the corruption was made here; such numbers are not comparable with those on the official files."""

    @property
    def title(self) -> str:
        """What tables call the data set: its name, with the variant unless that is the one of published numbers."""
        usual = DATASETS[self.name].variants[:1] if self.variant else ()
        return self.name if self.variant is None or self.variant in usual else f"{self.name}-{self.variant}"

    @property
    def cell(self) -> str:
        """Name of the cell in a table: ``dtd``, ``imagenet-v2-top-images``, ``imagenet-c/fog/5``."""
        return self.title if self.corruption is None else f"{self.title}/{self.corruption}/{self.level}"


def find(name: str, root: str | Path | None) -> Found | None:
    """Return where a data set lies under `root` (or APM_DATA), or None. Quick: for `apm bench --list`.

    For imagenet-c any corruption and level will do.

    Raises:
        UsageError: unknown name.
    """
    spec = spec_of(name)
    if not spec.needs_root:
        return Found(Path(), "always there")
    folder = data_root(root)
    if spec.reader != "corrupted":
        return find_layout(spec, folder)
    pairs = ((corruption, level) for level in (5, 4, 3, 2, 1) for corruption in CORRUPTIONS)
    places = (find_layout(spec, folder, corruption=corruption, level=level) for corruption, level in pairs)
    return next((place for place in places if place is not None), None)


def open_dataset(
    name: str,
    root: str | Path | None = None,
    *,
    corruption: str | None = None,
    level: int = 5,
    limit: int | None = None,
    seed: int = 0,
    from_clean: bool = False,
    source: str | None = None,
    label_set: str | None = None,
) -> Dataset:
    """Open a data set; no image is decoded yet.

    Args:
        name: a key of `DATASETS`.
        root: folder that holds data sets, or the data set's own folder; default: the environment variable APM_DATA.
        corruption, level: one of the 15 of ImageNet-C, and its severity, 1 to 5. For imagenet-c they choose the folder
            (or, with `from_clean`, what is made from clean ImageNet); any other set is corrupted on the fly.
        limit: take that many samples, as evenly from all classes as they allow: see `balanced_subset`.
        seed: for `limit` and for corruptions made here.
        from_clean: make imagenet-c from clean ImageNet: short side to 256, central 224×224, as the official files.
        source: ``hf:REPO[:SPLIT]`` instead of a folder.
        label_set: for ``folder`` only: the label space, instead of the classes present.

    Raises:
        UsageError: unknown names, missing data, a wrong folder, a limit below 1. The message says what to do.
    """
    spec = spec_of(name)
    _check_asked(spec, corruption, level, limit, label_set, from_clean=from_clean)
    generated = corruption is not None and (from_clean or spec.reader != "corrupted")
    clean = spec_of("imagenet") if generated and spec.reader == "corrupted" else spec
    listing, layout, place = _read(clean, data_root(root), corruption or "", level, source, label_set)
    notes = [*listing.notes, *_name_notes(listing.class_names), *_count_notes(spec, len(listing.samples))]
    warnings, variant = _warnings(spec, clean, place, source, len(listing.samples))
    if not generated and spec.reader in ("corrupted", "folder") and source is None and _was_generated(place):
        generated = True
        notes.append(f"The corrupted images were {MARK}.")
    elif generated and corruption is not None:
        samples, note = _corrupted(spec, listing.samples, corruption, level, seed)
        listing, notes = replace(listing, samples=samples), [*notes, note]
    opened = Dataset(
        name=name,
        samples=listing.samples,
        class_names=listing.class_names,
        templates=(spec.template,),
        prompts_name=spec.prompts_name,
        layout=layout,
        source=place,
        split=listing.split,
        fingerprint="",
        notes=tuple(notes),
        warnings=tuple(warnings),
        variant=variant,
        total=len(listing.samples),
        corruption=corruption,
        level=level if corruption else None,
        generated=generated,
    )
    return _limited(opened, limit, seed, listing.content)


def _check_asked(
    spec: DatasetSpec,
    corruption: str | None,
    level: int,
    limit: int | None,
    label_set: str | None,
    *,
    from_clean: bool,
) -> None:
    """Refuse, before anything is read, what no data set has, or this one has not."""
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit} leaves no images: use 1 or more.")
    if label_set is not None and spec.reader != "folder":
        raise UsageError(f"{spec.name} has its own labels: --label-set is for the data set folder.")
    if corruption is not None:
        if corruption not in CORRUPTIONS:
            raise unknown("corruption", corruption, CORRUPTIONS)
        check_level(level)
    elif spec.reader == "corrupted":
        raise UsageError(f"{spec.name} needs a corruption: {', '.join(CORRUPTIONS)}.")
    elif from_clean:
        raise UsageError(f"--from-clean makes corrupted images: name a --corruption for {spec.name}.")


def _limited(dataset: Dataset, limit: int | None, seed: int, content: str) -> Dataset:
    """The data set with the samples that are used, and their fingerprint."""
    samples = dataset.samples if limit is None else balanced_subset(dataset.samples, limit, seed)
    identity = fingerprint(samples, content)
    if len(samples) == dataset.total:
        return replace(dataset, samples=samples, fingerprint=identity)
    note = f"Subset: {len(samples):,} of {dataset.total:,} images, class-balanced, drawn with seed {seed}."
    return replace(dataset, samples=samples, fingerprint=identity, limit=limit, notes=(*dataset.notes, note))


def _read(
    spec: DatasetSpec, root: Path | None, corruption: str, level: int, source: str | None, label_set: str | None
) -> tuple[Listing, str, str]:
    """Return the listing, the layout recognised and where that is."""
    if source is not None:
        return read_hub(spec, source), "rows of a streamed data set", source
    if spec.reader == "digits":
        return readers.read_digits(), "built in", "scikit-learn"
    found = require_layout(spec, root, corruption=corruption, level=level)
    if spec.reader == "folder":
        listing = readers.read_folder(spec, found.folder, names_from=label_set)
    elif spec.reader == "split-json":
        listing = readers.read_split_json(spec, found.folder)
    elif spec.reader == "aircraft":
        listing = readers.read_aircraft(spec, found.folder)
    else:
        listing = readers.read_class_tree(spec, found.folder)
    return listing, found.layout, str(found.folder)


def _name_notes(class_names: Sequence[str]) -> list[str]:
    twice = [name for name, count in Counter(class_names).items() if count > 1]
    if not twice:
        return []
    return [f"Class names that occur more than once cannot be told apart: {', '.join(twice)}."]


def _count_notes(spec: DatasetSpec, images: int) -> list[str]:
    if not spec.images or images == spec.images:
        return []
    which = " (the usual subset of 5,000)" if spec.reader == "corrupted" and images == 5000 else ""
    return [f"{images:,} images{which}; {spec.name} has {spec.images:,}: compare with care."]


def _warnings(
    spec: DatasetSpec, clean: DatasetSpec, place: str, source: str | None, images: int
) -> tuple[list[str], str | None]:
    """What makes the numbers something else than the name says, and which variant of the set this is."""
    variant = variant_of(spec, place)
    if variant is not None and images > spec.images:
        variant = UNKNOWN_VARIANT  # several in one tree
    warnings = [*_variant_warnings(spec, variant, place), *_corrupted_warnings(clean, place, source)]
    if source is None and (other := other_set(clean, Path(place))):
        warnings.append(f"By the names of its folders, {place} is {other}: do not report it as {clean.name}.")
    return warnings, variant


def _variant_warnings(spec: DatasetSpec, variant: str | None, place: str) -> list[str]:
    if variant is None or variant == spec.variants[0]:
        return []
    usual = spec.variants[0]
    if variant == UNKNOWN_VARIANT:
        return [
            f"Which variant of {spec.name} {place} holds ({', '.join(spec.variants)}) cannot be told from its name and "
            f"its number of pictures. Published numbers are on {usual}: if it is that one, put {usual} into the "
            f"folder's name. Here it is called {spec.name}-{variant}."
        ]
    return [
        f"{place} holds the variant {variant}. Published numbers of {spec.name} are on {usual} and do not compare. "
        f"Here it is called {spec.name}-{variant}."
    ]


def _corrupted_warnings(spec: DatasetSpec, place: str, source: str | None) -> list[str]:
    """Warn where pictures that stand for clean ones lie in a folder of corrupted ones."""
    named = corruption_named(Path(place)) if source is None and spec.needs_root else None
    if named is None or spec.reader == "corrupted":
        return []
    corruption, level = named
    hint = f" Corrupted ImageNet is: apm bench imagenet-c --corruption {corruption} --level {level}."
    return [
        f"By its name, {place} holds pictures corrupted by {corruption} at level {level}, not clean ones: do not "
        f"report them as clean {spec.name}." + (hint if spec.label_space and corruption in CORRUPTIONS else "")
    ]


def _was_generated(place: str) -> bool:
    """Whether a folder ``<corruption>/<level>`` lies in a tree that `apm corrupt` wrote."""
    return (Path(place).resolve().parent.parent / SETTINGS_FILE).is_file()


def _corrupted(
    spec: DatasetSpec, samples: Sequence[Sample], corruption: str, level: int, seed: int
) -> tuple[list[Sample], str]:
    """The samples, corrupted when they are opened, and a note of it."""
    # Official pictures were cut from a short side of 256; other sets keep their whole field of view.
    resize = RESIZE if spec.reader == "corrupted" else CROP
    made = [
        Sample(sample.id, sample.label, partial(_load_corrupted, sample, corruption, level, seed, resize), sample.path)
        for sample in samples
    ]
    note = f"Corruption {corruption}, level {level}, {MARK} (seed {seed}, short side {resize}, crop {CROP})."
    return made, note


def _load_corrupted(sample: Sample, corruption: str, level: int, seed: int, resize: int) -> Image.Image:
    return corrupt_image(sample.load(), corruption, level, seed=seed, image_id=sample.id, resize=resize)


def balanced_subset(samples: Sequence[Sample], limit: int, seed: int) -> list[Sample]:
    """Take `limit` samples, class by class in turn, in the data set's order.

    Samples are ranked within their class, and classes among themselves, by a hash of seed and id: no dependence on the
    order of files, and the subset of a smaller limit is part of that of a larger one.
    """
    by_class: dict[int, list[tuple[bytes, int]]] = defaultdict(list)
    for position, sample in enumerate(samples):
        by_class[sample.label].append((rank(seed, sample.id), position))
    turns = sorted(
        (turn, rank(seed, f"class {label}"), position)
        for label, members in by_class.items()
        for turn, (_, position) in enumerate(sorted(members))
    )
    chosen = np.sort([position for _, _, position in turns[:limit]])
    return [samples[position] for position in chosen]


def rank(seed: int, text: str) -> bytes:
    """Return the key by which a name is sorted for a seeded choice; it does not depend on other names."""
    return hashlib.sha256(f"{seed}\0{text}".encode("utf-8", "surrogateescape")).digest()


def fingerprint(samples: Sequence[Sample], content: str = "") -> str:
    """Return the SHA-256 over `Listing.content`, and over ids and labels in their order, as hex."""
    digest = hashlib.sha256(content.encode())
    for sample in samples:
        digest.update(f"{sample.id}\0{sample.label}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
