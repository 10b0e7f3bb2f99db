"""Where a data set lies below the user's root: the first layout that fits wins; when none does, the error says why."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from apm.errors import UsageError, few
from apm.labels import imagenet_subset, imagenet_wnids

from .files import beside, class_folders, class_images, dead_links, image_names, is_integer, is_wnid, split_json
from .specs import CORRUPTION_GROUPS, DATASETS, DatasetSpec

AIRCRAFT_NAMES, AIRCRAFT_TEST = "variants.txt", "images_variant_test.txt"
_ENDS = {
    "wnid": "/<wnid>/",
    "corrupted": "/<wnid>/",
    "integer": "/<0..999>/",
    "split-json": " (split json beside it)",
    "aircraft": f" ({AIRCRAFT_NAMES} and {AIRCRAFT_TEST} beside it)",
    "folder": "/<class>/",
    "digits": "",
}


UNKNOWN_VARIANT = "variant-unknown"
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip", ".7z", ".rar")
_GROUP_OF = {corruption: group for group, members in CORRUPTION_GROUPS.items() for corruption in members}


@dataclass(frozen=True)
class Found:
    """A recognised layout: the folder that holds the images or class folders, and its form below the user's root."""

    folder: Path
    layout: str


def data_root(root: str | Path | None) -> Path | None:
    """Return the user's root folder: the argument, else the environment variable APM_DATA, else None."""
    chosen = root or os.environ.get("APM_DATA")
    return Path(chosen).expanduser() if chosen else None


def variant_of(spec: DatasetSpec, place: str | Path) -> str | None:
    """Return which variant of a set a folder or repository holds, by the names on its path.

    Returns:
        One of `DatasetSpec.variants`, `UNKNOWN_VARIANT` where no name tells, None for a set without variants.
    """
    if not spec.variants:
        return None
    if any(str(place).startswith(f"hf:{hub.partition(':')[0]}") for hub in spec.hub):
        return spec.variants[0]
    parts = str(place).split("/") if str(place).startswith("hf:") else Path(place).resolve().parts
    for part in reversed(parts[-3:]):
        for variant in spec.variants:
            if _squeezed(variant) in _squeezed(part):  # threshold0.7, top-images and topimages are all in the field
                return variant
    return UNKNOWN_VARIANT


def _squeezed(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def corruption_named(folder: Path) -> tuple[str, int] | None:
    """Return the corruption and level that a folder's path names (``…/fog/5``), as written or where links lead."""
    for path in (Path(os.path.abspath(folder)), folder.resolve()):
        for name, level in pairwise(path.parts[-4:]):
            if name.lower() in _GROUP_OF and level in {"1", "2", "3", "4", "5"}:
                return name.lower(), int(level)
    return None


def other_set(spec: DatasetSpec, folder: Path) -> str | None:
    """Return which other set of ImageNet's classes a folder is, by the names on its path or by its classes; or None."""
    if not spec.label_space:
        return None
    path = [part.lower() for part in folder.resolve().parts]
    others = [
        one for one in DATASETS.values() if one.label_space and one.name != spec.name and one.name != "imagenet-c"
    ]
    for other in others:
        for layout in other.layouts:
            parts = layout.lower().split("/")
            if path[-len(parts) :] == parts:
                return other.name
    names, wnids = set(_folders(folder)), imagenet_wnids()
    for other in others:
        if other.label_space != "imagenet" and names == {wnids[index] for index in imagenet_subset(other.label_space)}:
            return other.name
    return None


def find_layout(spec: DatasetSpec, root: Path | None, *, corruption: str = "", level: int = 5) -> Found | None:
    """Return the first layout of `spec` that fits below `root`, or None. Looks at folder names only: quick."""
    if root is None or not root.is_dir():
        return None
    for layout, folder in _candidates(spec, root, corruption, level):
        if folder.is_dir() and _fits(spec, folder):
            variant = variant_of(spec, folder)
            said = "" if variant is None else f" ({variant})"
            return Found(folder, layout + _ENDS[spec.reader] + said)
    return None


def require_layout(spec: DatasetSpec, root: Path | None, *, corruption: str = "", level: int = 5) -> Found:
    """Return the layout that fits.

    Raises:
        UsageError: none fits: what was looked for, where the data come from, and the likely mistake.
    """
    found = find_layout(spec, root, corruption=corruption, level=level)
    if found is not None:
        return found
    if root is None:
        problem = "no folder was given (--root FOLDER, or the environment variable APM_DATA)."
    elif not root.is_dir():
        problem = f"{root} is not a folder."
    else:
        problem = _likely_mistake(spec, root, corruption, level) or f"nothing that fits under {root}."
    raise UsageError(f"{spec.name}: {problem}\n{_accepted(spec)}")


def _accepted(spec: DatasetSpec) -> str:
    named = (layout.format(corruption="<corruption>", level="<1-5>", group="<group>") for layout in spec.layouts)
    shapes = ", ".join(layout + _ENDS[spec.reader] for layout in named)
    shapes = f"{shapes}; or the path of the data set's own folder" if shapes else "ROOT/<class>/ or ROOT/<wnid>/"
    if spec.split_file:
        shapes += f" (the json is {spec.split_file})"
    hub = f" Hub: --source hf:{', hf:'.join(spec.hub)}." if spec.hub else ""
    return f"Accepted layouts: {shapes}.\nThe data come from: {spec.origin}.{hub}"


def _candidates(spec: DatasetSpec, root: Path, corruption: str, level: int) -> Iterator[tuple[str, Path]]:
    """Whole layouts first, in their order; then the root taken as a folder on the way; then as the last folder."""
    group = _GROUP_OF.get(corruption, "")
    shapes = [layout.format(corruption=corruption, level=level, group=group) for layout in spec.layouts]
    for shape in shapes:
        yield shape, root / shape
    if spec.reader == "corrupted":
        # Another corruption's folder looks the same: only the names on the path tell which one was given.
        tail = root.resolve().parts[-2:]
        if tail[-1:] == (corruption,):
            yield str(level), root / str(level)
        elif tail == (corruption, str(level)):
            yield ".", root
        return
    rests = dict.fromkeys(rest for shape in shapes for rest in _rests(shape))
    for rest in rests:
        yield rest, root / rest
    yield ".", root


def _rests(shape: str) -> Iterator[str]:
    parts = shape.split("/")
    for start in range(1, len(parts)):
        yield "/".join(parts[start:])


def _fits(spec: DatasetSpec, folder: Path) -> bool:
    if spec.reader == "split-json":
        return split_json(folder, spec.split_file).is_file()
    if spec.reader == "aircraft":
        return all(beside(folder, name).is_file() for name in (AIRCRAFT_NAMES, AIRCRAFT_TEST))
    names = _folders(folder)
    if spec.reader == "folder":
        return any(class_images(folder / name) for name in names)
    if spec.reader == "integer":
        return any(is_integer(name) or is_wnid(name) for name in names) and not _is_corrupted_tree(folder, names)
    return any(map(is_wnid, names))


def _is_corrupted_tree(folder: Path, names: list[str]) -> bool:
    """Whether a folder is ImageNet-C's, or that of one of its archives or corruptions."""
    inside = [name for group in CORRUPTION_GROUPS if group in names for name in _folders(folder / group)]
    return folder.resolve().name.lower() in _GROUP_OF or any(name.lower() in _GROUP_OF for name in (*names, *inside))


def _folders(folder: Path) -> list[str]:
    try:
        return class_folders(folder)
    except UsageError:
        return []


def _images(folder: Path) -> list[str]:
    try:
        return image_names(folder)
    except UsageError:
        return []


def _likely_mistake(spec: DatasetSpec, root: Path, corruption: str, level: int) -> str | None:
    """Look at the folders a user may have meant, and name what is wrong with the first that says something."""
    if not os.access(root, os.R_OK | os.X_OK):
        return f"{root} cannot be read: permission denied."
    places = dict.fromkeys([*(folder for _, folder in _candidates(spec, root, corruption, level)), root])
    for place in places:
        if place.is_dir() and (mistake := _mistake_at(spec, place)):
            return mistake
    below = [place / name for place in places for name in _folders(place)[:100]]
    deeper = [folder / name for folder in below if folder.parent == root for name in _folders(folder)[:100]]
    instead = None
    for place in (*below, *deeper):
        if spec.reader != "corrupted" and place.resolve() != root.resolve() and _fits(spec, place):
            wrong = _why_not(spec, place)
            if wrong is None:
                return f"{root} is not the data set's folder. Did you mean {place}?"
            instead = instead or wrong
    if instead:
        return f"nothing that fits under {root}: {instead}"
    lost = [f"{root / name} is a link to what is not there. Is a drive not mounted?" for name in dead_links(root)]
    packed = [name for name in sorted(os.listdir(root)) if name.lower().endswith(_ARCHIVES)]
    if packed:
        lost.append(f"nothing that fits under {root}, but archives that are not unpacked: {few(packed)}.")
    if lost:
        return lost[0]
    if spec.reader == "corrupted":
        for place in places:
            if place.name == str(level) and (there := _folders(place.parent)) and place.parent != root.parent:
                return f"{place.parent} holds no folder {level} with class folders, but {few(there, 5)}."
        return (
            f"no folder {corruption}/{level} with class folders under {root}. The pictures can be made from clean"
            " ImageNet with --from-clean."
        )
    return None


def _why_not(spec: DatasetSpec, folder: Path) -> str | None:
    """Why a folder of the right form must not be suggested, None where it may be this set's."""
    if is_training(folder):
        return f"{folder} is the training part; the validation part is wanted."
    if spec.label_space and (named := corruption_named(folder)):
        return f"{folder} holds pictures corrupted by {named[0]}, level {named[1]}."
    variant = variant_of(spec, folder)
    if variant in spec.variants[1:]:
        return f"{folder} is another variant, {variant}; published numbers are on {spec.variants[0]}."
    if spec.reader == "wnid":
        wnids = imagenet_wnids()
        if not set(_folders(folder)) <= {wnids[index] for index in imagenet_subset(spec.label_space)}:
            return f"the classes of {folder} are not all its own."
    other = other_set(spec, folder)
    return None if other is None else f"{folder} is {other}, another data set."


def is_training(folder: Path) -> bool:
    """Whether a folder is a training part, by its name."""
    return "train" in (Path(os.path.abspath(folder)).name.lower(), folder.resolve().name.lower())


def _mistake_at(spec: DatasetSpec, place: Path) -> str | None:
    folders = _folders(place)
    if spec.reader == "split-json":
        if (place / spec.split_file).is_file() and not split_json(place, spec.split_file).is_file():
            wanted = spec.layouts[0].split("/")[-1]
            return f"{place / spec.split_file} is there, but the folder of images {place / wanted} is not."
        is_images = place.resolve().name == spec.layouts[0].split("/")[-1]
        return f"{place} is there, but {split_json(place, spec.split_file)} is not." if is_images else None
    if spec.reader == "aircraft":
        missing = [name for name in (AIRCRAFT_NAMES, AIRCRAFT_TEST) if not beside(place, name).is_file()]
        is_images = place.resolve().name == "images"
        return f"{place} is there, but beside it is no {' and no '.join(missing)}." if is_images else None
    if spec.reader in ("wnid", "integer") and folders and _is_corrupted_tree(place, folders):
        return f"{place} is a part of ImageNet-C: name the data set imagenet-c, with --corruption and --level."
    flat = _images(place)
    if flat and not folders:
        if flat[0].startswith("ILSVRC2012_val_"):
            return (
                f"{place} holds {len(flat):,} files ILSVRC2012_val_*.JPEG without class folders: without them there"
                " are no labels. Sort them into <wnid>/ folders first: the script valprep.sh, which many guides use,"
                " does it, and Kaggle's LOC_val_solution.csv says which picture belongs where."
            )
        if is_wnid(place.resolve().name):
            return (
                f"{place} is the folder of one class. Give the folder that holds all classes: {place.resolve().parent}"
            )
        return f"{place} holds {len(flat):,} pictures but no class folders."
    if spec.reader == "wnid" and folders and all(map(is_integer, folders)):
        return f"the folders of {place} are numbers, as those of imagenet-v2, not wnids."
    plain = [name for name in folders if not is_wnid(name)]
    if spec.reader in ("wnid", "integer", "corrupted") and any(_images(place / name) for name in plain[:20]):
        return (
            f"the folders of {place} are not wnids: {few(plain)}. For plain class folders there is the data set"
            ' "folder".'
        )
    return None
