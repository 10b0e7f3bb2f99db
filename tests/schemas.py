"""The schemas that records and documents follow."""

from __future__ import annotations

import functools
import json
from importlib import resources

from jsonschema import Draft202012Validator

PACKAGES = {"benchmarks": "apm.benchmarks", "cli": "apm.cli"}


@functools.cache
def schema(path: str) -> Draft202012Validator:
    """Return what checks a document against a schema, which is itself checked once; `path` is ``cli/classify.json``."""
    folder, _, name = path.partition("/")
    found = json.loads((resources.files(PACKAGES[folder]) / "schemas" / name).read_text())
    Draft202012Validator.check_schema(found)
    return Draft202012Validator(found)
