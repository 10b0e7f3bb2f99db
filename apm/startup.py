"""A quick start and a quick exit: nothing is imported that is not needed, and no garbage is collected on the way."""

from __future__ import annotations

import atexit
import gc
import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_COMPILER = "torch._dynamo"
_UTILITIES = f"{_COMPILER}.utils"

_for_one_command = False


def for_one_command() -> None:
    """Declare that this process runs one command and exits: what it imports stays, and is never garbage-collected.

    Over a million objects of imported libraries, a first collection takes a quarter of a second, and the interpreter's
    last one a whole second.
    """
    global _for_one_command
    _for_one_command = True
    atexit.register(_leave_quickly)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Collect no garbage inside: imports make a million objects that stay, which each collection looks at anew."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if _for_one_command:
            gc.freeze()
        gc.enable()


def _leave_quickly() -> None:
    if "triton" in sys.modules:  # it complains on stderr about what is not torn down
        gc.unfreeze()
    else:
        gc.freeze()


def import_open_clip() -> Any:
    """Import torchvision, timm and open_clip without torch's compiler, and return the last.

    The compiler takes longer to import than all three. torchvision imports it for one question that it asks when boxes
    are pooled, timm to keep it away from some methods. Here the question waits until it is asked, and timm's methods
    are marked the way torch marks its own, which imports the compiler when they are called. Whoever compiles a model
    finds the compiler as ever.
    """
    if _COMPILER not in sys.modules:
        import torch

        with collector_paused():
            with _waiting_utilities():
                importlib.import_module("torchvision")
            with _lazy_disable(torch.compiler, getattr(torch, "_disable_dynamo", None)):
                importlib.import_module("timm")
    with collector_paused():
        return importlib.import_module("open_clip")


@contextmanager
def _waiting_utilities() -> Iterator[None]:
    """Put a module in the place of the compiler's utilities that is replaced as soon as anything else is wanted."""

    def real() -> Any:
        _remove(waiting)
        return importlib.import_module(_UTILITIES)

    def is_compile_supported(device_type: str) -> bool:
        return bool(real().is_compile_supported(device_type))

    def look_up(name: str) -> Any:
        if name.startswith("__"):  # the import system asks for these
            raise AttributeError(name)
        return getattr(real(), name)

    waiting = types.ModuleType(_UTILITIES)
    waiting.is_compile_supported = is_compile_supported  # type: ignore[attr-defined]
    waiting.__getattr__ = look_up  # type: ignore[method-assign]
    sys.modules[_UTILITIES] = waiting
    try:
        yield
    finally:
        _remove(waiting)


def _remove(module: types.ModuleType) -> None:
    if sys.modules.get(module.__name__) is module:
        del sys.modules[module.__name__]


@contextmanager
def _lazy_disable(compiler: Any, lazy: Any) -> Iterator[None]:
    """Let `torch.compiler.disable` be `lazy`, torch's own form that imports the compiler when it is needed."""
    eager = compiler.disable
    if lazy is not None:

        def disable(fn: Any = None, recursive: bool = True, *, reason: str | None = None) -> Any:
            return lazy(fn, recursive)

        compiler.disable = disable
    try:
        yield
    finally:
        compiler.disable = eager
