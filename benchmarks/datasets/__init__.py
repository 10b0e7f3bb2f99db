"""Data sets: what they are (`specs`), where they lie (`layouts`), how their labels are read (`readers`, `hub`)."""

from __future__ import annotations

from .dataset import Dataset, balanced_subset, find, open_dataset
from .layouts import Found, data_root
from .readers import Sample
from .specs import DATASETS, SUITES, DatasetSpec, expand, spec_of

__all__ = [
    "DATASETS",
    "SUITES",
    "Dataset",
    "DatasetSpec",
    "Found",
    "Sample",
    "balanced_subset",
    "data_root",
    "expand",
    "find",
    "open_dataset",
    "spec_of",
]
