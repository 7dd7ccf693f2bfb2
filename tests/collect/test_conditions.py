"""Conditions by suffix against the same filters written in Python."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from collect.conditions import Run, select
from generators.errors import ConfigError, PowerhouseError, UnknownNameError

RUNS: list[Run] = [
    {"id": "a", "architecture": "resnet-8-w4", "seed": 0, "lr": 0.1, "validation_accuracy": 0.95},
    {"id": "b", "architecture": "resnet-14-w4", "seed": 1, "lr": 0.05, "validation_accuracy": 0.9},
    {"id": "c", "architecture": "mlp-1-w4", "seed": 2, "lr": 0.1, "validation_accuracy": math.nan},
    {"id": "d", "architecture": "mlp-2-w4", "seed": 3, "lr": 0.2},
]


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
        ({}, lambda run: True),
    ],
)
def test_conditions_against_filters_by_hand(conditions: dict[str, Any], expected: Callable[[Run], bool]) -> None:
    assert select(RUNS, conditions) == [run for run in RUNS if expected(run)]


@pytest.mark.parametrize(
    ("conditions", "error", "words"),
    [
        (dict(validation_acuracy__gt=0.9), UnknownNameError, "'validation_accuracy'"),
        (dict(lr__let=0.1), UnknownNameError, "comparison 'let'.*'le'"),
        (dict(lr__=0.1), UnknownNameError, "Known: eq, ne, lt"),
        (dict(lr__gt="0.1"), ConfigError, "give a float"),
        (dict(seed__startswith="1"), ConfigError, "give a int"),
        (dict(architecture__in="mlp-1-w4"), ConfigError, "needs a list"),
        (dict(lr__gt=[0.1]), ConfigError, "cannot be compared"),
    ],
)
def test_wrong_conditions_are_errors(conditions: dict[str, Any], error: type[PowerhouseError], words: str) -> None:
    with pytest.raises(error, match=words):
        select(RUNS, conditions)


def test_among_no_runs_columns_are_unknown_but_comparisons_are_not() -> None:
    assert select([], dict(anything__gt=1)) == []
    with pytest.raises(UnknownNameError, match="comparison"):
        select([], dict(anything__more=1))
