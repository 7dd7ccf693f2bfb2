"""The runs of a zoo: columns of typed arrays that read like a list of dicts.

A million dicts take seconds to make and gigabytes to hold. Columns take neither; a row becomes a dict when it is asked
for. Columns with few distinct values hold them once (`Coded`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from generators.errors import unknown_name

Row = dict[str, Any]
CHUNK = 4096  # rows that are made at once

# Short names for columns, wherever a column is named.
ALIASES = {
    "arch": "architecture",
    "train_acc": "train_accuracy",
    "val_acc": "validation_accuracy",
    "val_accuracy": "validation_accuracy",
    "val_loss": "validation_loss",
    "test_acc": "test_accuracy",
}


@dataclass(frozen=True)
class Coded:
    """A column of N values, of which few are distinct: value i is `values[codes[i]]`.

    Attributes:
        codes: integers [N].
        values: what JSON can hold: text, numbers, booleans, None for "not known".
    """

    codes: np.ndarray
    values: tuple[Any, ...]

    @staticmethod
    def of(column: Sequence[Any]) -> Coded:
        """Values one by one, coded."""
        numbers: dict[Any, int] = {}
        codes = [numbers.setdefault(value, len(numbers)) for value in column]
        return Coded(np.array(codes, dtype=np.min_scalar_type(len(numbers))), tuple(numbers))

    @staticmethod
    def join(parts: Sequence[Coded]) -> Coded:
        """The parts one after the other."""
        numbers: dict[Any, int] = {}
        codes = []
        for part in parts:
            mapped = np.array([numbers.setdefault(value, len(numbers)) for value in part.values], dtype=np.int64)
            codes.append(mapped[part.codes])
        return Coded(np.concatenate(codes).astype(np.min_scalar_type(len(numbers))), tuple(numbers))

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, chosen: Any) -> Coded:
        return Coded(self.codes[chosen], self.values)

    def decoded(self) -> np.ndarray:
        """The values, [N]; of type object if some are None."""
        if len(self) < len(self.values):
            return np.array([self.values[code] for code in self.codes.tolist()])
        return np.array(self.values)[self.codes]


Column = np.ndarray | Coded


def values_of(column: Column) -> np.ndarray:
    """A column as bool, int64, float64 or text."""
    if isinstance(column, Coded):
        return column.decoded()
    return column.astype({"f": np.float64, "i": np.int64, "u": np.int64, "S": np.str_}.get(column.dtype.kind, bool))


class Runs(Sequence[Row]):
    """Rows of a table that is held by columns.

    Args:
        columns: name -> column, all of one length. Numbers that a run does not have are NaN.
    """

    def __init__(self, columns: Mapping[str, Column]) -> None:
        self.columns = dict(columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return list(self.take(index))
        place = range(len(self))[index]
        return next(iter(self.take(slice(place, place + 1))))

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), CHUNK):
            part = self.take(slice(start, start + CHUNK))
            lists = [values_of(column).tolist() for column in part.columns.values()]
            for row in zip(*lists, strict=True):
                yield dict(zip(self.columns, row, strict=True))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Runs({len(self)} runs, {len(self.columns)} columns)"

    def known(self, name: str) -> str:
        """The column that is meant by `name`: itself, or what it is short for (`ALIASES`).

        Raises:
            UnknownNameError: no such column.
        """
        full = name if name in self.columns else ALIASES.get(name, name)
        if full not in self.columns:
            raise unknown_name("column", name, self.columns)
        return full

    def column(self, name: str) -> np.ndarray:
        """One column over all runs, [number of runs]: bool, int64, float64 or text.

        Raises:
            UnknownNameError: no such column.
        """
        return values_of(self.columns[self.known(name)])

    def take(self, chosen: np.ndarray | slice) -> Runs:
        """The runs that a mask, indices or a slice choose."""
        return Runs({name: column[chosen] for name, column in self.columns.items()})


def join(parts: Sequence[Runs]) -> Runs:
    """The runs of all parts, one after the other. Where a part lacks a column its runs have NaN there, or None."""
    names = dict.fromkeys(name for part in parts for name in part.columns)
    joined: dict[str, Column] = {}
    for name in names:
        columns = [part.columns.get(name) for part in parts]
        coded = any(isinstance(column, Coded) for column in columns)
        there = [_missing(len(part), coded) if column is None else column
                 for part, column in zip(parts, columns, strict=True)]  # fmt: skip
        joined[name] = Coded.join(there) if coded else np.concatenate(there)  # type: ignore[arg-type]
    return Runs(joined)


def _missing(count: int, coded: bool) -> Column:
    return Coded(np.zeros(count, np.uint8), (None,)) if coded else np.full(count, np.nan, np.float32)
