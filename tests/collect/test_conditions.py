"""Conditions by suffix against the same filters written in Python."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from collect.conditions import select
from collect.runs import Coded, Row, Runs
from generators.errors import ConfigError, PowerhouseError, UnknownNameError

ROWS: list[Row] = [
    {"id": "a", "architecture": "resnet-8-w4", "seed": 0, "lr": 0.1, "validation_accuracy": 0.95},
    {"id": "b", "architecture": "resnet-14-w4", "seed": 1, "lr": 0.05, "validation_accuracy": 0.9},
    {"id": "c", "architecture": "mlp-1-w4", "seed": 2, "lr": 0.1, "validation_accuracy": math.nan},
    {"id": "d", "architecture": "mlp-2-w4", "seed": 3, "lr": 0.2, "validation_accuracy": math.nan},
]


def as_runs(rows: list[Row]) -> Runs:
    column = {name: [row[name] for row in rows] for name in rows[0]}
    return Runs(
        {
            "id": np.array(column["id"], dtype=np.bytes_),
            "architecture": Coded.of(column["architecture"]),
            "seed": np.array(column["seed"]),
            "lr": Coded.of(column["lr"]),  # of recipes; codes and plain numbers must be judged alike
            "validation_accuracy": np.array(column["validation_accuracy"]),
        }
    )


def ids(runs: Runs) -> list[str]:
    return runs.column("id").tolist()


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (dict(validation_accuracy__gt=0.9), lambda run: run["id"] == "a"),
        (dict(validation_accuracy__ge=0.9), lambda run: run["id"] in "ab"),
        (dict(validation_accuracy__ne=0.9), lambda run: run["id"] in "acd"),
        (dict(lr__le=0.1), lambda run: run["lr"] <= 0.1),
        (dict(lr__lt=0.1), lambda run: run["lr"] < 0.1),
        (dict(lr__eq=0.1), lambda run: run["lr"] == 0.1),
        (dict(seed__in=(0, 2, 9)), lambda run: run["seed"] in (0, 2)),
        (dict(seed=range(1, 3)), lambda run: 1 <= run["seed"] < 3),
        (dict(architecture__startswith="resnet"), lambda run: "resnet" in run["architecture"]),
        (dict(architecture__startswith=("resnet", "mlp-1")), lambda run: run["id"] in "abc"),
        (dict(lr__ge=0.1, seed__lt=3, architecture__ne="mlp-1-w4"), lambda run: run["id"] == "a"),
        (dict(arch="mlp-1-w4"), lambda run: run["id"] == "c"),
        (dict(arch__startswith="resnet", val_acc__gt=0.9), lambda run: run["id"] == "a"),
        (dict(id="b"), lambda run: run["id"] == "b"),
        (dict(id__in={"b", "d", "e"}), lambda run: run["id"] in "bd"),
        (dict(id__startswith=("a", "c")), lambda run: run["id"] in "ac"),
        (dict(lr="0.1"), lambda run: False),
        (dict(seed__in=(0.0, "1", 2)), lambda run: run["seed"] in (0, 2)),
        ({}, lambda run: True),
    ],
)
def test_conditions_against_filters_by_hand(conditions: dict[str, Any], expected: Callable[[Row], bool]) -> None:
    assert ids(select(as_runs(ROWS), conditions)) == [row["id"] for row in ROWS if expected(row)]


@pytest.mark.parametrize(
    ("conditions", "error", "words"),
    [
        (dict(validation_acuracy__gt=0.9), UnknownNameError, "'validation_accuracy'"),
        (dict(lr__let=0.1), UnknownNameError, "comparison 'let'.*'le'"),
        (dict(lr__=0.1), UnknownNameError, "known: eq, ge, gt, in"),
        (dict(lr__gt="0.1"), ConfigError, "give a float"),
        (dict(seed__startswith="1"), ConfigError, "give a int"),
        (dict(architecture__in="mlp-1-w4"), ConfigError, "needs a list"),
        (dict(lr__gt=[0.1]), ConfigError, "cannot be compared"),
    ],
)
def test_wrong_conditions_are_errors(conditions: dict[str, Any], error: type[PowerhouseError], words: str) -> None:
    with pytest.raises(error, match=words):
        select(as_runs(ROWS), conditions)


def test_among_no_runs_names_are_known_all_the_same() -> None:
    nothing = select(as_runs(ROWS), dict(seed=99))
    assert ids(nothing) == ids(select(nothing, dict(lr__gt=1, id__lt=3))) == []
    with pytest.raises(UnknownNameError, match="comparison"):
        select(nothing, dict(lr__more=1))
    with pytest.raises(UnknownNameError, match="column"):
        select(nothing, dict(lrr=1))


@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_stored_in_single_precision_and_compared_as_python_does(name: str) -> None:
    """0.9 is not float32(0.9): a column must not be compared with a rounded bound."""
    values = np.array([0.1, 0.9, np.nextafter(np.float32(0.9), np.float32(1)), np.nan], dtype=np.float32)
    runs = Runs({"id": np.array([b"a", b"b", b"c", b"d"]), "accuracy": values})
    chosen = select(runs, {f"accuracy__{name}": 0.9})
    expected = [getattr(operator, name)(float(value), 0.9) for value in values]
    assert ids(chosen) == [name for name, met in zip("abcd", expected, strict=True) if met]


def test_values_that_are_not_known_meet_nothing_but_ne() -> None:
    runs = Runs({"id": np.array([b"a", b"b"]), "note": Coded.of([None, "x"])})
    assert ids(select(runs, dict(note__ne="x"))) == ["a"] and ids(select(runs, dict(note__startswith="x"))) == ["b"]
    assert ids(select(runs, dict(note=["x", None]))) == ["b"]
    unknown = Runs({"id": np.array([b"a"]), "note": Coded.of([None])})
    assert ids(select(unknown, dict(note="x"))) == [] and ids(select(unknown, dict(note__ne="x"))) == ["a"]


def test_a_value_that_is_nearly_one_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """The view is empty all the same; other values, and comparisons that are no equality, are not commented on."""
    runs = as_runs(ROWS)
    assert not len(select(runs, {"architecture": "resnt-8-w4"}))
    assert "did you mean 'resnet-8-w4'" in caplog.text
    caplog.clear()
    select(runs, {"architecture": ["resnet-8-w4", "another"]})
    select(runs, {"architecture__startswith": "resnt"})
    select(runs, {"architecture__ne": "resnt-8-w4"})
    assert not caplog.text
