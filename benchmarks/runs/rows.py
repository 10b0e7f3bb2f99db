"""One image answered by one method: what a row is, in memory, in Parquet, and read back as arrays.

`Row` is the one description. The Parquet schema is made from its fields; what a method computes beside its logits goes
into the field of that name, or among the extras; `MethodRows` takes its columns by their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from types import UnionType
from typing import Any, get_args, get_type_hints

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .run_json import SCHEMA_VERSION


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One image answered by one method.

    Where `error` is set, everything from `prediction` to `logits` is None.
    """

    id: str
    """The sample's id: its path relative to the data set's root, posix."""
    position: int
    """Place in the stream order of the cell, from 0."""
    label: int
    """True class, an index into the cell's class names."""
    method: str
    prediction: int | None = None
    """Class with the largest logit."""
    probability: float | None = None
    """Softmax probability of `prediction`, in (0, 1]."""
    nll: float | None = None
    """Negative log of the probability of the true class, in nats."""
    rank: int | None = None
    """Rank of the true class: 1 when the prediction is right."""
    teacher_prediction: int | None = None
    """What the teacher's own token answers with the same text features."""
    loss: float | None = None
    """Loss of the adapted student, for methods that have one."""
    cosine: float | None = None
    """Cosine of the adapted student's token to its target, for methods that have one."""
    steps: int | None = None
    """Adaptation steps made, for methods that adapt."""
    seconds: float | None = None
    """The method's own share of its batch's wall time, without decoding and without what methods share."""
    shared_seconds: float | None = None
    """Share of the wall time of what is computed once for all methods and this method uses: teacher token, views. None
    where these came from a store."""
    step_predictions: tuple[int, ...] | None = None
    """Prediction before the first step and after each, where per-step predictions were asked for."""
    logits: tuple[float, ...] | None = None
    """The logit of every class, where logits were asked for."""
    extras: tuple[tuple[str, float], ...] | None = None
    """What else the method computed, name and figure: entropies before and after tuning, the share of votes, …"""
    error: str | None = None
    """Why there is no answer: the image cannot be decoded, or the numbers are not finite."""


_ARROW = {
    str: pa.string(),
    int: pa.int32(),
    float: pa.float32(),
    tuple[int, ...]: pa.list_(pa.int32()),
    tuple[float, ...]: pa.list_(pa.float32()),
    tuple[tuple[str, float], ...]: pa.map_(pa.string(), pa.float32()),
}


def _schema() -> pa.Schema:
    """The fields of `Row` as Parquet holds them: 32 bits a number, null for None."""
    columns = []
    for name, hint in get_type_hints(Row).items():
        optional = isinstance(hint, UnionType)  # X | None
        columns.append(pa.field(name, _ARROW[get_args(hint)[0] if optional else hint], nullable=optional))
    return pa.schema(columns, metadata={"apm.schema": str(SCHEMA_VERSION)})


ROW_SCHEMA = _schema()


def joined(parts: Sequence[Any], name: str) -> Any:
    """One column of several `MethodRows`, or of what has such columns, one behind the other."""
    return np.concatenate([getattr(part, name) for part in parts])


def row_table(rows: Sequence[Row]) -> pa.Table:
    """Rows as a table of `ROW_SCHEMA`."""
    columns = [pa.array([getattr(row, field.name) for row in rows], field.type) for field in ROW_SCHEMA]
    return pa.Table.from_arrays(columns, schema=ROW_SCHEMA)


@dataclass(frozen=True)
class MethodRows:
    """All rows of one method in one cell, by position in the stream: fields of `Row` as arrays of n.

    Failed rows hold -1 or nan.
    """

    id: NDArray[np.object_]
    label: NDArray[np.int64]
    prediction: NDArray[np.int64]
    probability: NDArray[np.float64]
    nll: NDArray[np.float64]
    rank: NDArray[np.int64]
    teacher_prediction: NDArray[np.int64]
    loss: NDArray[np.float64]
    cosine: NDArray[np.float64]
    seconds: NDArray[np.float64]
    shared_seconds: NDArray[np.float64]
    error: NDArray[np.object_]
    step_predictions: NDArray[np.int64] | None
    """(n, K + 1); None where not recorded. A row that stopped early keeps its last prediction."""
    logits: NDArray[np.float64] | None
    """(n, C), nan in failed rows; None where not recorded."""

    @classmethod
    def of(cls, table: pa.Table) -> MethodRows:
        """Take rows of `ROW_SCHEMA`, in their order."""
        return cls(**{field.name: _array(table[field.name]) for field in fields(cls)})

    def __len__(self) -> int:
        return len(self.id)


def _array(column: pa.ChunkedArray) -> Any:
    """A column as an array: -1 or nan for null; lists as rows of equal length, None where there are none."""
    if pa.types.is_string(column.type):
        texts = np.empty(len(column), dtype=object)
        texts[:] = column.to_pylist()
        return texts
    lists = pa.types.is_list(column.type)
    whole = pa.types.is_integer(column.type.value_type if lists else column.type)
    missing, kind = (-1, np.int64) if whole else (np.nan, np.float64)
    if not lists:
        return column.fill_null(missing).to_numpy().astype(kind)
    rows = [row or [missing] for row in column.to_pylist()]
    width = max((len(row) for row in rows), default=0)
    if not any(column.is_valid().to_pylist()):
        return None
    return np.array([row + row[-1:] * (width - len(row)) for row in rows], dtype=kind)
