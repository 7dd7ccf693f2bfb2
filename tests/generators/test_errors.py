"""Errors: one base, and messages with near names."""

from __future__ import annotations

import inspect

import pytest

from generators import errors


def test_all_errors_share_one_base() -> None:
    classes = [value for _, value in inspect.getmembers(errors, inspect.isclass) if value.__module__ == errors.__name__]
    assert len(classes) >= 9
    assert all(issubclass(found, errors.PowerhouseError) for found in classes)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Hee", ["he"]), ("xavier_uniform", ["xavier-uniform", "he-uniform", "xavier"]), ("zzzz", [])],
)
def test_near(name: str, expected: list[str]) -> None:
    assert errors.near(name, ["he", "he-uniform", "xavier", "xavier-uniform"]) == expected


def test_unknown_name_says_what_is_known() -> None:
    close = errors.unknown_name("data set", "cifar11", ["cifar10", "svhn"], way_out="See `list`.")
    assert str(close) == "unknown data set 'cifar11': did you mean 'cifar10'? See `list`."
    far = errors.unknown_name("data set", "q", iter(["svhn", "cifar10"]))
    assert str(far) == "unknown data set 'q': known: cifar10, svhn."
    assert str(errors.unknown_name("data set", "q", [])).endswith("known: none.")
