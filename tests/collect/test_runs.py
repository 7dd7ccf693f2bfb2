"""Columns that read like a list of dicts, against the list of dicts."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from collect.runs import ALIASES, Coded, Runs, join
from generators.errors import UnknownNameError

ROWS = [{"id": f"r{number}", "architecture": "ab"[number % 2], "lr": number / 4, "seed": number} for number in range(9)]


def as_runs(rows: list[dict]) -> Runs:
    return Runs(
        {
            "id": np.array([row["id"] for row in rows], dtype=np.bytes_),
            "architecture": Coded.of([row["architecture"] for row in rows]),
            "lr": np.array([row["lr"] for row in rows], dtype=np.float32),
            "seed": np.array([row["seed"] for row in rows]),
        }
    )


def test_rows_against_dicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collect.runs.CHUNK", 4)
    runs = as_runs(ROWS)
    assert len(runs) == 9 and runs == ROWS and list(runs) == ROWS
    assert runs[3] == ROWS[3] and runs[-1] == ROWS[-1] and runs[2:5] == ROWS[2:5] and runs[::-2] == ROWS[::-2]
    assert runs != ROWS[:-1] and runs != [*ROWS[:-1], ROWS[0]] and runs != 3
    assert ROWS[2] in runs and [run["id"] for run in reversed(runs)] == [row["id"] for row in ROWS[::-1]]
    assert {type(value) for value in runs[0].values()} == {str, float, int}
    for place in (9, -10):
        with pytest.raises(IndexError):
            runs[place]
    assert pickle.loads(pickle.dumps(runs)) == ROWS
    assert runs.take(np.array([True, False] * 4 + [True])) == ROWS[::2]
    assert runs.take(np.array([5, 1])) == [
        ROWS[5],
        ROWS[1],
    ]


def test_columns_have_their_type_and_short_names() -> None:
    runs = as_runs(ROWS)
    assert runs.column("lr").dtype == np.float64 and runs.column("seed").dtype == np.int64
    assert runs.column("arch").tolist() == runs.column("architecture").tolist() == list("ababababa")
    with pytest.raises(UnknownNameError, match="'lr'"):
        runs.column("lrr")
    with pytest.raises(UnknownNameError):
        runs.column("val_acc")  # short for a column that is not there
    runs.columns["arch"] = np.arange(9)
    assert runs.column("arch").tolist() == list(range(9))  # a column of this name comes first
    assert not set(ALIASES) & set(ALIASES.values())


def test_parts_are_joined_and_what_a_part_lacks_is_missing() -> None:
    first, second = as_runs(ROWS[:2]), as_runs(ROWS[2:4])
    assert join([first, second]) == ROWS[:4]
    second.columns |= {"accuracy": np.array([0.5, 1], dtype=np.float32), "note": Coded.of(["x", "y"])}
    del second.columns["lr"]
    joined = join([first, second])
    np.testing.assert_array_equal(joined.column("accuracy"), [np.nan, np.nan, 0.5, 1])
    np.testing.assert_array_equal(joined.column("lr"), [0, 0.25, np.nan, np.nan])
    assert joined.column("note").tolist() == [None, None, "x", "y"]


def test_codes_are_as_small_as_they_can_be() -> None:
    assert Coded.of(["a"] * 9).codes.dtype == np.uint8
    many = Coded.of(range(300))
    assert many.codes.dtype == np.uint16 and many.decoded().tolist() == list(range(300))
    assert Coded.join([many, Coded.of([1, -1])]).decoded().tolist() == [*range(300), 1, -1]
