"""Tables in HDF5: rows of plain Python values on one side, arrays with one typed column per name on the other."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
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


def table_of(rows: Sequence[dict[str, Any]], names: Iterable[str]) -> np.ndarray:
    """A structured array with one typed column per name: bool, int64, float64 or text (anything else as JSON text)."""
    columns = {}
    for name in names:
        values = [row[name] for row in rows]
        kinds = {type(value) for value in values}
        if rows and kinds <= {bool}:
            columns[name] = np.array(values, dtype=np.bool_)
        elif rows and kinds <= {int, float}:
            columns[name] = np.array(values, dtype=np.float64 if float in kinds else np.int64)
        else:
            columns[name] = text([value if isinstance(value, str) else json.dumps(value) for value in values])
    table = np.empty(len(rows), dtype=[(name, column.dtype) for name, column in columns.items()])
    for name, column in columns.items():
        table[name] = column
    return table


def rows_of(table: np.ndarray) -> tuple[dict[str, Any], ...]:
    """A structured array as rows of plain Python values."""
    names = table.dtype.names or ()
    return tuple({name: plain(value) for name, value in zip(names, row, strict=True)} for row in table.tolist())
