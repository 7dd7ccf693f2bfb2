"""Values from JSON against types: what is let through is what Python would call by that type."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from collect.typed import keys, load, typed
from generators.errors import ConfigError, UnknownNameError


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (3, int, 3), (3, float, 3.0), (0.5, float, 0.5), (True, bool, True), ("a", str, "a"), (None, int | None, None),
        (2, int | None, 2), ("all", str | tuple[int, ...], "all"), ([0, 3], str | tuple[int, ...], [0, 3]),
    ],
)  # fmt: skip
def test_what_fits(value: Any, kind: Any, expected: Any) -> None:
    found = typed(value, kind, "here")
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        (True, int, "here must be a whole number, got true"),
        (1, bool, "true or false, got 1"),
        (1.0, int, "a whole number, got 1.0"),
        (2**53, int, "a whole number"),
        (math.inf, float, "a number, got Infinity"),
        ("1", float, 'a number, got "1"'),
        (0.5, int | None, "a whole number or null"),
        ([0, 0.5], str | tuple[int, ...], "text or a list, each item a whole number"),
        ({}, list, "a list, got {}"),
    ],
)
def test_what_does_not(value: Any, kind: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        typed(value, kind, "here")
    assert words in str(caught.value)


def test_keys_are_known_ones() -> None:
    assert keys({"runs": 1}, ["runs", "seed"], "the spec", "key") == {"runs": 1}
    with pytest.raises(UnknownNameError, match="unknown key 'run': did you mean 'runs'.*in the spec"):
        keys({"run": 1}, ["runs", "seed"], "the spec", "key")


def test_a_file_is_read_or_named(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    path.write_text(json.dumps({"a": [1, None]}))
    assert load(path) == {"a": [1, None]}
    for text, words in (('{"a": 1, "a": 2}', "there twice among a, a"), ("[" * 100_000, "value.json"), ("{", "line 1")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            load(path)
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "none.json")
