"""Draws against what their names promise: bounds, shares, and values that can be read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from collect.distributions import DISTRIBUTIONS, checked, draw
from generators.errors import ConfigError, UnknownNameError

PLACES = np.linspace(0, 1, 4000, endpoint=False)


def values(distribution: dict[str, list], kind: type = float) -> list[Any]:
    found = checked(distribution, kind, "random.field")
    return [draw(found, place) for place in PLACES]


def test_uniform_fills_its_bounds_evenly() -> None:
    found = values({"uniform": [0.8, 0.95]})
    assert min(found) == 0.8 and 0.9499 < max(found) <= 0.95
    assert np.histogram(found, bins=10)[0] == pytest.approx(400, abs=2)


def test_log_uniform_fills_every_decade_evenly() -> None:
    found = values({"log_uniform": [0.01, 10]})
    assert min(found) == 0.01 and 9.9 < max(found) <= 10
    assert np.histogram(np.log10(found), bins=3)[0] == pytest.approx(4000 / 3, abs=2)


@pytest.mark.parametrize(
    ("bounds", "expected"), [([4, 7], [4, 5, 6, 7]), ([8, 20, 6], [8, 14, 20]), ([8, 19, 6], [8, 14]), ([3, 3], [3])]
)
def test_integers_are_equally_likely(bounds: list[int], expected: list[int]) -> None:
    found, counts = np.unique(values({"integer": bounds}, int), return_counts=True)
    assert found.tolist() == expected
    assert counts == pytest.approx(4000 / len(expected), abs=1)


def test_choices_are_equally_likely() -> None:
    found = values({"choice": ["he", "xavier", "orthogonal"]}, str)
    assert {name: found.count(name) for name in found} == pytest.approx(dict.fromkeys(found, 4000 / 3), abs=1)


def test_numbers_are_short_and_stay_within_long_bounds() -> None:
    third = 1 / 3
    found = values({"uniform": [third, 2 * third]})
    assert min(found) == third and all(third <= value <= 2 * third for value in found)
    assert all(len(f"{value}") <= len("0.123456") for value in found[1:])
    assert all(type(value) is float for value in values({"log_uniform": [1, 2]}))


@pytest.mark.parametrize(
    ("distribution", "kind", "error", "words"),
    [
        ({"log_unifrom": [1, 2]}, float, UnknownNameError, "'log_uniform'"),
        ([0.1, 0.2], float, ConfigError, "random.field must be an object"),
        ({}, float, ConfigError, "needs one of uniform"),
        ({"uniform": [0, 1], "choice": [3]}, float, ConfigError, "got uniform, choice"),
        ({"uniform": 3}, float, ConfigError, "must be a list"),
        ({"uniform": []}, float, ConfigError, "empty list"),
        ({"uniform": [1]}, float, ConfigError, r"\[low, high\]"),
        ({"uniform": [2, 1]}, float, ConfigError, "low <= high"),
        ({"uniform": [0, "1"]}, float, ConfigError, r"uniform\[1\] must be a number"),
        ({"uniform": [0, math.nan]}, float, ConfigError, r"uniform\[1\] must be a number, got NaN"),
        ({"log_uniform": [0, 1]}, float, ConfigError, "above 0"),
        ({"integer": [1, 2.5]}, int, ConfigError, "a whole number"),
        ({"integer": [1, 5, 0]}, int, ConfigError, "step"),
        ({"uniform": [1, 5]}, int, ConfigError, "draws must be a whole number"),
        ({"integer": [1, 5]}, str, ConfigError, "draws must be text"),
        ({"choice": [True, 1]}, bool, ConfigError, r"choice\[1\] must be true or false"),
    ],
)
def test_what_is_no_distribution(distribution: Any, kind: type, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        checked(distribution, kind, "random.field")


def test_every_distribution_is_tested_above() -> None:
    assert set(DISTRIBUTIONS) == {"uniform", "log_uniform", "integer", "choice"}
