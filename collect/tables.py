"""Tables in HDF5: lists of plain Python values on one side, arrays with one typed column per name on the other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import h5py
import numpy as np


def text(value: str | Sequence[str]) -> np.ndarray:
    """Text as UTF-8 of fixed width: that of variable length lies in a part of the file that has no checksums."""
    texts = [value.encode()] if isinstance(value, str) else [each.encode() for each in value]
    array = np.array(texts, dtype=h5py.string_dtype("utf-8", max(map(len, texts), default=0) or 1))
    return array.reshape(()) if isinstance(value, str) else array


def plain(value: Any) -> Any:
    """What HDF5 gives back as plain Python values; text decoded."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list):
        return tuple(map(plain, value))
    return value.decode() if isinstance(value, bytes) else value


def column_of(values: Sequence[Any]) -> np.ndarray:
    """Values as one typed array: bool, int64, float64 or text (anything else as JSON text)."""
    kinds = {type(value) for value in values}
    if kinds and kinds <= {bool}:
        return np.array(values, dtype=np.bool_)
    if kinds and kinds <= {int, float}:
        return np.array(values, dtype=np.float64 if float in kinds else np.int64)
    return text([value if isinstance(value, str) else json.dumps(value) for value in values])


def table_of(columns: Mapping[str, Sequence[Any]]) -> np.ndarray:
    """A structured array with one typed column (`column_of`) per name; all are of one length."""
    arrays = {name: column_of(values) for name, values in columns.items()}
    lengths = {len(array) for array in arrays.values()}
    table = np.empty(lengths.pop() if lengths else 0, dtype=[(name, array.dtype) for name, array in arrays.items()])
    for name, array in arrays.items():
        table[name] = array
    return table


def rows_of(table: np.ndarray) -> tuple[dict[str, Any], ...]:
    """A structured array as rows of plain Python values."""
    columns = {name: table[name].tolist() for name in table.dtype.names or ()}
    for name, values in columns.items():
        if table.dtype[name].kind == "S":
            columns[name] = [value.decode() for value in values]
    return tuple(dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
