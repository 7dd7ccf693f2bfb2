"""Values from JSON, held against the types that they should have."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from generators.errors import ConfigError, unknown_name

WORDS = {
    str: "text", bool: "true or false", int: "a whole number", float: "a number", list: "a list", dict: "an object",
    type(None): "null",
}  # fmt: skip


def _in_words(kind: Any) -> str:
    options = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return " or ".join(map(_in_words, options))
    return f"a list, each item {_in_words(options[0])}" if options else WORDS[kind]


def _fits(value: Any, kind: Any) -> bool:
    """Whether `value` is of a kind: a plain type, `tuple[kind, ...]` or a union; neither true nor NaN is a number."""
    options = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return any(_fits(value, option) for option in options)
    if options:
        return isinstance(value, list) and all(_fits(each, options[0]) for each in value)
    if kind in (int, float):
        return type(value) in (int, kind) and abs(value) < 2**53
    return type(value) is kind


def typed(value: Any, kind: Any, place: str) -> Any:
    """`value`, as a float where one is due: 0 and 0.0 are one setting and must give one id.

    Raises:
        ConfigError: it is of another kind.
    """
    if not _fits(value, kind):
        raise ConfigError(f"{place} must be {_in_words(kind)}, got {json.dumps(value)[:60]}")
    return float(value) if kind is float else value


def keys(value: Any, known: Iterable[str], place: str, what: str) -> dict[str, Any]:
    """`value`, an object with some of the known keys.

    Raises:
        ConfigError: it is no object.
        UnknownNameError: it has another key.
    """
    for key in typed(value, dict, place):
        if key not in known:
            raise unknown_name(what, key, known, way_out=f"It stands in {place}.")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of two values for one key, `json` would take the last without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key is there twice among {', '.join(name for name, _ in pairs)}")
    return found


def load(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ConfigError: missing, or no JSON.
    """
    try:
        return json.loads(path.read_text(), object_pairs_hook=_once)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); `python -m collect plan --help` shows a spec"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} cannot be read as JSON ({error}); `python -m collect plan --help` shows a spec"
        ) from error
