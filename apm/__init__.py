"""Test-time training by Asynchronous Perception Machines (Modi & Rawat, NeurIPS 2024).

The public names below are loaded on first use, so that ``import apm`` stays light::

    import apm

    classifier = apm.Classifier(teacher="embedded", labels=["cat", "dog"])
    answer = classifier("photo.jpg")
    print(answer.top[0].label, answer.top[0].probability)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apm.classifier import Answer, Classifier
    from apm.student.config import APMConfig
    from apm.student.model import APM
    from apm.teachers import load_teacher
    from apm.test_time.options import AdaptConfig, StudentOptions
    from apm.test_time.trainer import AdaptResult, TestTimeTrainer
    from apm.text.zeroshot import ZeroShotHead

__version__ = "0.1.0"

_HOMES = {
    "APM": "apm.student.model",
    "APMConfig": "apm.student.model",
    "AdaptConfig": "apm.test_time.options",
    "AdaptResult": "apm.test_time.trainer",
    "Answer": "apm.classifier",
    "Classifier": "apm.classifier",
    "StudentOptions": "apm.test_time.options",
    "TestTimeTrainer": "apm.test_time.trainer",
    "ZeroShotHead": "apm.text.zeroshot",
    "load_teacher": "apm.teachers",
}

__all__ = [
    "APM",
    "APMConfig",
    "AdaptConfig",
    "AdaptResult",
    "Answer",
    "Classifier",
    "StudentOptions",
    "TestTimeTrainer",
    "ZeroShotHead",
    "__version__",
    "load_teacher",
]


def __getattr__(name: str) -> Any:
    """Import a public name's module when the name is first used (PEP 562)."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'apm' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
