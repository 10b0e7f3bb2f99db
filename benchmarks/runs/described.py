"""The LLM descriptors of a run: from what a user gives to what is said of the classes of each data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from apm.errors import UsageError, unknown
from apm.text.descriptors import Descriptors, read_descriptors

from ..datasets import DATASETS
from ..methods import REGISTRY, parse_method
from ..methods.published import Published

OPTION = "--descriptors"


def described(
    given: Sequence[str], datasets: Sequence[str], specs: Sequence[str], protocol: str
) -> Mapping[str, Descriptors]:
    """Read the descriptors of every data set.

    Args:
        given: ``DATASET=FILE``, or a file for every data set without one of its own.
        datasets: of the run.
        specs: its methods, as `create_method` takes them.
        protocol: of the run.

    Returns:
        The descriptors by data set; the same object for the same file. Nothing where nothing is given.

    Raises:
        UsageError: a file that cannot be used, a data set without one, one that is not in the run, or a run in which no
            method uses descriptors.
    """
    if not given:
        return {}
    if protocol != "published":
        raise UsageError(
            f"{OPTION} needs --protocol published: with {protocol} all methods have the same prompts alone."
        )
    users = [name for name, make in REGISTRY.items() if getattr(make, "published", Published()).descriptors]
    if not any(parse_method(spec)[0] in users for spec in specs):
        raise UsageError(
            f"{OPTION} is used by {', '.join(users)}, as by their authors, and none of them is among the methods of "
            f"this run ({', '.join(specs)})."
        )
    files = _files(given, datasets)
    if missing := [name for name in datasets if name not in files]:
        raise UsageError(
            f"No descriptors are given for {', '.join(missing)}: add {OPTION} {missing[0]}=FILE, or run "
            f"{'it' if len(missing) == 1 else 'them'} separately, without."
        )
    read = {file: read_descriptors(file) for file in dict.fromkeys(files.values())}
    return {name: read[file] for name, file in files.items()}


def _files(given: Sequence[str], datasets: Sequence[str]) -> dict[str, str]:
    """By data set, the file given for it."""
    own: dict[str, str] = {}
    shared: list[str] = []
    for text in given:
        name, equals, file = text.partition("=")
        if not equals or "/" in name or "\\" in name:  # the path of a file may hold a =
            shared.append(text)
        elif name not in datasets:
            known = f"{name} is not in this run." if name in DATASETS else str(unknown("data set", name, datasets))
            raise UsageError(f"{OPTION} {text}: {known}")
        elif name in own:
            raise UsageError(f"{OPTION} {text}: {name} has a file already, {own[name]}.")
        else:
            own[name] = file
    if len(shared) > 1:
        raise UsageError(
            f"{OPTION} {shared[0]} and {shared[1]} are both for every data set: say which is for which, as in "
            f"{OPTION} {datasets[0]}={shared[0]}."
        )
    return {name: own.get(name, *shared) for name in datasets if name in own or shared}
