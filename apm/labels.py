"""Class names and prompt templates: from a user's text or file, and the well-known sets by name.

Nothing here imports torch: names are checked before anything slow is loaded.
"""

from __future__ import annotations

import functools
import importlib.util
import types
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from apm.errors import UsageError, unknown

PROMPT_NAMES = ("single", "simple", "openai")
"""Prompt sets by name: 1, 7 and 80 templates."""

_LARGEST_FILE = 64 << 20  # bytes of a labels file; /dev/zero would never end
_SINGLE = ("a photo of a {}.",)
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_IMAGENETTE = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
# Tiny ImageNet (Stanford CS231n): its 200 wnids in sorted order, as indices of ImageNet-1k.
_TINY_IMAGENET = (
    *(1, 25, 30, 32, 50, 61, 69, 71, 75, 76, 79, 99, 105, 107, 109, 113, 114, 115, 122, 123, 128, 145, 146, 149, 151),
    *(187, 207, 208, 235, 267, 281, 283, 285, 286, 291, 294, 301, 308, 309, 311, 313, 314, 315, 319, 323, 325, 329),
    *(338, 341, 345, 347, 349, 353, 354, 365, 367, 372, 386, 387, 398, 400, 406, 411, 414, 421, 424, 425, 427, 430),
    *(435, 436, 437, 438, 440, 445, 447, 448, 457, 458, 462, 463, 466, 467, 470, 471, 474, 480, 485, 488, 492, 496),
    *(500, 508, 509, 511, 517, 525, 526, 532, 542, 543, 557, 562, 565, 567, 568, 570, 573, 576, 604, 605, 612, 614),
    *(619, 621, 625, 627, 635, 645, 652, 655, 675, 677, 678, 682, 683, 687, 704, 707, 716, 720, 731, 733, 734, 735),
    *(737, 739, 744, 747, 758, 760, 761, 765, 768, 774, 779, 781, 786, 801, 806, 808, 811, 815, 817, 821, 826, 837),
    *(839, 842, 845, 849, 850, 853, 862, 866, 873, 874, 877, 879, 887, 888, 890, 899, 900, 909, 910, 917, 923, 924),
    *(928, 929, 932, 935, 938, 945, 947, 950, 951, 954, 957, 962, 963, 964, 967, 970, 972, 973, 975, 978, 988),
)
_TIMM_SUBSETS = {"imagenet-a": "imagenet_a_synsets.txt", "imagenet-r": "imagenet_r_synsets.txt"}
_WORDS = {"cifar10": _CIFAR10, "digits": _DIGITS}
IMAGENET_SUBSETS = ("imagenet", "imagenet-a", "imagenet-r", "imagenette", "tiny-imagenet")
"""Names that `imagenet_subset` knows."""
LABEL_SET_NAMES = tuple(sorted((*IMAGENET_SUBSETS, *_WORDS, "teacher")))
"""Names that `label_set` knows."""


def label_set(name: str, *, teacher_labels: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the class names of a well-known set, in the order of its class numbers.

    Args:
        name: one of `LABEL_SET_NAMES`.
        teacher_labels: what the set ``teacher`` stands for: the teacher's own classes.

    Returns:
        The names. ImageNet's hold "missile" and "sunglasses" twice, at different class numbers: the names are
        positions there, not keys.

    Raises:
        UsageError: the name is not known (the nearest are suggested), or the teacher has no classes of its own.
    """
    if name == "teacher":
        if not teacher_labels:
            raise UsageError(
                'The label set "teacher" needs a teacher with its own classes, and this one has none.'
                ' Give labels, or another set such as "imagenet".'
            )
        return tuple(teacher_labels)
    if name in _WORDS:
        return _WORDS[name]
    if name not in IMAGENET_SUBSETS:
        raise unknown("label set", name, LABEL_SET_NAMES)
    names = imagenet_names()
    return tuple(names[index] for index in imagenet_subset(name))


def imagenet_names() -> tuple[str, ...]:
    """Return open_clip's curated names of the 1000 ImageNet classes, by class number."""
    return tuple(_open_clip_metadata().IMAGENET_CLASSNAMES)


@functools.cache
def imagenet_wnids() -> tuple[str, ...]:
    """Return the 1000 WordNet ids of ImageNet-1k in sorted order: the position is the class number."""
    return _timm_synsets("imagenet_synsets.txt")


@functools.cache
def imagenet_subset(name: str) -> tuple[int, ...]:
    """Return the ImageNet-1k class numbers of a set of ImageNet classes, in the order of its own class numbers.

    Args:
        name: one of `IMAGENET_SUBSETS`.

    Raises:
        UsageError: the name is not known.
    """
    if name == "imagenet":
        return tuple(range(1000))
    if name == "imagenette":
        return _IMAGENETTE
    if name == "tiny-imagenet":
        return _TINY_IMAGENET
    if name in _TIMM_SUBSETS:
        number = {wnid: index for index, wnid in enumerate(imagenet_wnids())}
        return tuple(number[wnid] for wnid in _timm_synsets(_TIMM_SUBSETS[name]))
    raise unknown("set of ImageNet classes", name, IMAGENET_SUBSETS)


def prompt_templates(name: str) -> tuple[str, ...]:
    """Return the templates of a prompt set, each with one ``{}`` for the class name.

    Args:
        name: ``single`` (the one of CoOp's papers), ``simple`` (CLIP's best 7 of its 80) or ``openai`` (all 80).

    Raises:
        UsageError: the name is not known.
    """
    if name == "single":
        return _SINGLE
    if name not in PROMPT_NAMES:
        raise unknown("prompt set", name, PROMPT_NAMES)
    metadata = _open_clip_metadata()
    functions = metadata.SIMPLE_IMAGENET_TEMPLATES if name == "simple" else metadata.OPENAI_IMAGENET_TEMPLATES
    return tuple(function("{}") for function in functions)


def check_words(
    labels: Sequence[str] | None, label_set: str | None, prompts: str | None, templates: Sequence[str] | None
) -> None:
    """Refuse what is said twice, and names of sets that are unknown."""
    if labels is not None and label_set is not None:
        raise UsageError("labels and label_set exclude each other; give one of them.")
    if prompts is not None and templates is not None:
        raise UsageError("prompts and templates exclude each other; give one of them.")
    if label_set is not None and label_set not in LABEL_SET_NAMES:
        raise unknown("label set", label_set, LABEL_SET_NAMES)
    if prompts is not None:
        prompt_templates(prompts)


def choose_labels(
    labels: Sequence[str] | None, name: str | None, teachers_own: Sequence[str] | None
) -> tuple[str, tuple[str, ...]]:
    """Return where the labels come from, in a word, and the labels: those given, a set's, the teacher's, ImageNet's."""
    if labels is not None:
        return "labels", tuple(labels)
    source = name or ("teacher" if teachers_own else "imagenet")
    return source, label_set(source, teacher_labels=teachers_own)


def choose_templates(
    prompts: str | None, templates: Sequence[str] | None, teachers_own: Sequence[str] | None
) -> tuple[str, tuple[str, ...]]:
    """Return where the templates come from, in a word, and the templates: those given, a set's, the teacher's, one."""
    if templates is not None:
        return "templates", tuple(templates)
    if prompts is None and teachers_own is not None:
        return "teacher", tuple(teachers_own)
    return prompts or "single", prompt_templates(prompts or "single")


def check_templates(templates: Iterable[str]) -> tuple[str, ...]:
    """Return `templates` as a tuple when each has a ``{}`` for the class name.

    Raises:
        UsageError: there is none, or one has no ``{}``.
    """
    checked = tuple(templates)
    if not checked:
        raise UsageError('No prompt template was given. One such as "a photo of a {}." is needed.')
    for template in checked:
        if "{}" not in template:
            raise UsageError(f'The template "{template}" has no {{}} where the class name goes: "a photo of a {{}}."')
    return checked


def parse_labels(text: str) -> tuple[str, ...]:
    """Split ``"cat, dog"`` into class names.

    Args:
        text: names separated by commas or line ends. White space around a name and empty names are dropped, inner
            white space is reduced to single blanks, and Unicode is brought to its composed form.

    Raises:
        UsageError: as `check_labels`.
    """
    return check_labels(split_labels(text))


def split_labels(text: str) -> tuple[str, ...]:
    """Split class names as `parse_labels` does, without checking them."""
    return _tidied(part for line in text.splitlines() for part in line.split(","))


def read_labels_file(path: str | Path) -> tuple[str, ...]:
    """Read class names from a UTF-8 text file of up to 64 MiB with one name a line; a name may hold commas.

    Raises:
        UsageError: the file cannot be read, is not UTF-8, or as `check_labels`; the message names the file.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
        if len(content) > _LARGEST_FILE:
            raise UsageError(
                f'The labels file "{path}" is larger than {_LARGEST_FILE >> 20} MiB: it is no list of names.'
            )
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f'The labels file "{path}" is not UTF-8 text (byte {error.start}). Save it as UTF-8, one name per line.'
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f'The labels file "{path}" cannot be read: {reason}.') from error
    return check_labels(text.splitlines(), source=f'the labels in "{path}"')


def check_labels(labels: Iterable[str], *, source: str = "the labels") -> tuple[str, ...]:
    """Tidy class names that a user gave, and refuse those that no answer could be read from.

    Args:
        labels: the names. White space is tidied as `parse_labels` says; empty ones are dropped.
        source: where they come from, for the message.

    Returns:
        At least two different names, in the order given.

    Raises:
        UsageError: none or only one is left, some occur twice (capital letters aside: text towers fold them), or one
            holds characters that cannot be printed.
    """
    names = _tidied(labels)
    for name in names:
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
            raise UsageError(f"{_capital(source)} hold characters that cannot be printed: {name!a}.")
    if not names:
        raise UsageError(f'{_capital(source)} contain no name. Give at least two, such as "cat,dog".')
    folded = Counter(name.casefold() for name in names)
    twice = {name: None for name in names if folded[name.casefold()] > 1}
    if twice:
        listing = ", ".join(f'"{name}"' for name in twice)
        raise UsageError(f"{_capital(source)} contain names more than once: {listing}. Each name may occur only once.")
    if len(names) == 1:
        raise UsageError(
            f'{_capital(source)} contain only one name, "{names[0]}", whose probability is always 1. Give at least two.'
        )
    return names


def _tidied(labels: Iterable[str]) -> tuple[str, ...]:
    return tuple(tidy for label in labels if (tidy := " ".join(unicodedata.normalize("NFC", label).split())))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


@functools.cache
def _open_clip_metadata() -> types.ModuleType:
    """Load open_clip's module of names and templates by itself: through the package it would import torch."""
    path = _package_folder("open_clip") / "zero_shot_metadata.py"
    spec = importlib.util.spec_from_file_location("apm._open_clip_metadata", path)
    if spec is None or spec.loader is None:  # pragma: no cover - a path that ends in .py always has a loader
        raise UsageError(f"open_clip's class names were not found at {path}.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _timm_synsets(filename: str) -> tuple[str, ...]:
    """Read one of timm's lists of WordNet ids, without importing timm, which would import torch."""
    path = _package_folder("timm") / "data" / "_info" / filename
    return tuple(path.read_text(encoding="utf-8").split())


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"The package {package} is not installed: pip install apm brings it.")
    return Path(next(iter(spec.submodule_search_locations)))
