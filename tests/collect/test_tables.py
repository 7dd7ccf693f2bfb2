"""Rows survive the way through HDF5 with their types."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from collect.tables import plain, rows_of, table_of, text


def _columns(rows: list[dict]) -> dict[str, list]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def test_rows_come_back_through_a_file(tmp_path: Path) -> None:
    rows = [
        {"name": "kürzer", "count": 3, "rate": 0.1, "flag": True, "mixed": 1, "big": 2**62},
        {"name": "", "count": -1, "rate": float("inf"), "flag": False, "mixed": 0.5, "big": 0},
    ]
    with h5py.File(tmp_path / "table.h5", "w") as file:
        file["table"] = table_of(_columns(rows))
        found = file["table"][()]
    assert rows_of(found) == tuple(rows)
    assert [found.dtype[name].kind for name in found.dtype.names] == ["S", "i", "f", "b", "f", "i"]


def test_what_is_no_number_or_text_becomes_json() -> None:
    rows = [{"epochs": (1, 2), "none": None}, {"epochs": "last", "none": None}]
    assert rows_of(table_of(_columns(rows))) == (
        {"epochs": "[1, 2]", "none": "null"}, {"epochs": "last", "none": "null"}
    )  # fmt: skip


def test_a_table_without_rows_keeps_its_columns() -> None:
    empty = table_of({"name": [], "offset": []})
    assert empty.dtype.names == ("name", "offset") and rows_of(empty) == ()


def test_attributes_come_back_as_plain_values(tmp_path: Path) -> None:
    values = {"word": "für", "words": ("a", "bcd"), "count": 3, "rate": 0.5, "flag": True, "numbers": (1, 2)}
    with h5py.File(tmp_path / "attributes.h5", "w") as file:
        for name, value in values.items():
            texts = name.startswith("word")
            file.attrs[name] = text(value) if texts else np.array(value)
        assert {name: plain(value) for name, value in file.attrs.items()} == values
