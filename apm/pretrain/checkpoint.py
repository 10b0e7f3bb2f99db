"""Checkpoints of a training on images: one safetensors file, read and written whole.

Tensors: ``model.<name>``, and until training is finished ``exp_avg.<name>`` and ``exp_avg_sq.<name>``: moments.
Metadata, entry ``apm``: a JSON record with ``format``, sizes under the network's name (``student``), ``settings`` (all
that decides the weights), ``step`` and ``finished``. Order of the images and learning rate are functions of settings
and step: no state of a random generator has to be kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Generic, TypeVar, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from apm.errors import UsageError
from apm.images.files import write_atomically
from apm.images.paths import printable
from apm.settings import differences, refuse_other
from apm.student.config import APMConfig
from apm.student.model import APM, parameter_shapes

_FORMAT = 1
_MADE_BY = {
    "student": "apm pretrain",
    "stand_in": "apm pretrain --target-layer",
    "glom": "apm glom train",
    "mae": "apm mae train",
}
"""Names of all networks → what makes their checkpoints."""
_MOST_STEPS = 10**9

Sizes = TypeVar("Sizes")


@dataclass(frozen=True)
class Network(Generic[Sizes]):
    """A kind of network that has checkpoints.

    Attributes:
        name: entry of the record that holds its sizes.
        command: what makes such checkpoints.
        sizes: the dataclass of its sizes, all of which have defaults.
        shapes: sizes → shape of every parameter by name.
        draw: sizes and seed → the network, its first weights drawn.
    """

    name: str
    command: str
    sizes: type[Sizes]
    shapes: Callable[[Sizes], Mapping[str, tuple[int, ...]]]
    draw: Callable[[Sizes, int], nn.Module]


STUDENT = Network("student", "apm pretrain", APMConfig, parameter_shapes, lambda sizes, seed: APM(sizes, seed=seed))


@dataclass(frozen=True)
class Checkpoint(Generic[Sizes]):
    """A network in training, or finished.

    Attributes:
        student: its sizes.
        settings: all else that decides its weights: plain JSON values, flat.
        step: optimiser steps made.
        weights: parameters by name.
        moments: ``exp_avg.<name>`` and ``exp_avg_sq.<name>``; empty when training is finished.
        name: of the network.
    """

    student: Sizes
    settings: dict[str, Any]
    step: int
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    name: str = STUDENT.name

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train."""
        return not self.moments

    @property
    def record(self) -> dict[str, Any]:
        """The metadata, without the format."""
        return {
            self.name: {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in asdict(self.student).items()  # type: ignore[call-overload]
            },
            "settings": self.settings,
            "step": self.step,
            "finished": self.finished,
        }


def write_checkpoint(path: str | os.PathLike[str], checkpoint: Checkpoint[Any]) -> None:
    """Write a checkpoint in one step."""
    tensors = {f"model.{name}": tensor for name, tensor in checkpoint.weights.items()} | checkpoint.moments
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    record = json.dumps({"format": _FORMAT, **checkpoint.record})
    data = save(content, metadata={"apm": record})
    write_atomically(path, data)


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint[APMConfig]:
    """Read the checkpoint of a student.

    Raises:
        UsageError: no such file, not a checkpoint of a student, or a damaged one.
    """
    return read_network(path, STUDENT)


def read_network(path: str | os.PathLike[str], network: Network[Sizes]) -> Checkpoint[Sizes]:
    """Read the checkpoint of one kind of network.

    Raises:
        UsageError: no such file, not a checkpoint of such a network, or a damaged one.
    """
    path = Path(path)
    shown = printable(path)
    if not path.exists():
        raise UsageError(f"{shown}: no such checkpoint; `{network.command}` makes one.")
    if path.is_dir():
        raise UsageError(f"{shown} is a folder; a checkpoint is one .safetensors file.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except OSError as error:
        raise UsageError(f"{shown} cannot be read: {error.strerror or error}.") from error
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise UsageError(f"{shown} is not a safetensors file, or is damaged ({error}).") from error
    if "apm" not in metadata:
        raise UsageError(f"{shown} is not a checkpoint of `{network.command}`: it has no record of how it was made.")
    student, settings, step, finished = _parse(shown, metadata["apm"], network)
    weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    moments = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.")}
    if finished == bool(moments):
        raise _damaged(shown, f"finished is {finished}, and it holds {len(moments) or 'no'} moments")
    _check(shown, network.shapes(student), weights, moments)
    return Checkpoint(student, settings, step, weights, moments, network.name)


def check_settings(
    path: str | os.PathLike[str], checkpoint: Checkpoint[Sizes], student: Sizes, settings: Mapping[str, Any]
) -> None:
    """Compare a checkpoint's settings with those given in `settings`.

    Raises:
        UsageError: they differ; every difference is named.
    """
    mine = {**asdict(student), **settings}  # type: ignore[call-overload]
    theirs = {**asdict(checkpoint.student), **checkpoint.settings}  # type: ignore[call-overload]
    refuse_other(path, differences(theirs, mine))


def _damaged(shown: str, what: str) -> UsageError:
    return UsageError(f"{shown} is damaged: {printable(what[:200])}. Restore it, or train again with another --out.")


def _parse(shown: str, text: str, network: Network[Sizes]) -> tuple[Sizes, dict[str, Any], int, bool]:
    """Read the record of a checkpoint, with nothing taken on trust: sizes, settings, step, whether it is finished."""
    try:
        record = json.loads(text)
        form = record["format"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise _damaged(shown, "its record of how it was made cannot be read") from None
    if form != _FORMAT:
        raise UsageError(f"{shown} has format {str(form)[:40]}; this version of apm reads format {_FORMAT}.")
    if network.name not in record and (others := [name for name in _MADE_BY if isinstance(record.get(name), dict)]):
        raise UsageError(
            f"{shown} is not a checkpoint of `{network.command}` but of another network, made by "
            f"`{_MADE_BY[others[0]]}`."
        )
    student, settings = record.get(network.name), record.get("settings")
    step, finished = record.get("step"), record.get("finished")
    if not isinstance(settings, dict) or any(isinstance(value, (dict, list)) for value in settings.values()):
        raise _damaged(shown, "settings are no list of plain values")
    if type(step) is not int or not 0 <= step <= _MOST_STEPS or type(finished) is not bool:
        raise _damaged(shown, f"step is {str(step)[:40]} and finished {str(finished)[:40]}")
    return _sizes(shown, student, network), settings, step, finished


def _sizes(shown: str, found: Any, network: Network[Sizes]) -> Sizes:
    """Make the network's sizes of values that each have the type of their field."""
    defaults, hints = asdict(network.sizes()), get_type_hints(network.sizes)  # type: ignore[call-overload]
    if not isinstance(found, dict) or (other := found.keys() - defaults.keys()):
        named = f": {sorted(other)[0][:40]}" if isinstance(found, dict) else ""
        raise _damaged(shown, f"{network.name} holds something else than sizes{named}")
    sizes: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    for name, value in sizes.items():
        optional = isinstance(hints[name], UnionType) and type(value) in (int, float, type(None))
        if (type(value) is not type(defaults[name]) and not optional) or (
            name == "hidden" and not all(type(size) is int for size in value)
        ):
            raise _damaged(shown, f"{network.name}.{name} is {str(value)[:40]}")
    try:
        return network.sizes(**sizes)
    except UsageError as error:
        raise _damaged(shown, str(error).rstrip(".")) from None


def _check(
    shown: str, shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]
) -> None:
    expected = dict(shapes)
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if moments:
        expected |= {f"{kind}.{name}": shape for kind in ("exp_avg", "exp_avg_sq") for name, shape in shapes.items()}
        found |= {name: tuple(tensor.shape) for name, tensor in moments.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise _damaged(shown, f"{wrong[0]} is {found.get(wrong[0])} and should be {expected.get(wrong[0])}")
    if others := sorted(name for name, tensor in weights.items() if not tensor.is_floating_point()):
        raise _damaged(shown, f"{others[0]} holds whole numbers ({weights[others[0]].dtype})")
    if broken := sorted(name for name, tensor in weights.items() if not torch.isfinite(tensor).all()):
        raise _damaged(shown, f"{broken[0]} holds numbers that are not finite")
