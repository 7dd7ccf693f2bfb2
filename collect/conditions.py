"""Conditions on the columns of runs: `column=value`, or a comparison named by a suffix, `column__gt=value`.

    where(status="ok", lr__le=0.1, seed__in=range(4), arch__startswith="resnet")

A run that has no value in a column (NaN, or a metric that its population does not have) meets no comparison but `ne`.
Columns have short names too: `collect.runs.ALIASES`.
"""

from __future__ import annotations

import difflib
import logging
import operator
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from collect.runs import Coded, Column, Runs, values_of
from collect.split import SPLITS
from generators.errors import ConfigError, unknown_name

log = logging.getLogger(__name__)

VALUES = {"split": tuple(SPLITS), "status": ("ok", "diverged", "stopped")}  # all that these columns can hold
SEVERAL = list | tuple | set | frozenset | range  # what stands for "one of these"


def _each(judge: Callable[[Any], bool], values: np.ndarray) -> np.ndarray:
    return np.fromiter(map(judge, values.tolist()), dtype=bool, count=len(values))


def _in(values: np.ndarray, wanted: Iterable[Any]) -> np.ndarray:
    chosen = wanted if isinstance(wanted, range) else frozenset(wanted)
    return _each(chosen.__contains__, values)


COMPARISONS: dict[str, Callable[[np.ndarray, Any], np.ndarray]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "in": _in,
    "startswith": lambda values, start: _each(lambda value: value.startswith(start), values),
}


def _met(column: Column, suffix: str, wanted: Any) -> np.ndarray:
    """Which runs meet a comparison, bool [N]; of a coded column the distinct values are judged."""
    if not isinstance(column, Coded):
        return COMPARISONS[suffix](values_of(column), wanted)
    known = [value for value in column.values if value is not None]
    judged = COMPARISONS[suffix](np.array(known), wanted) if known else np.zeros(0, dtype=bool)
    verdicts = np.full(len(column.values), suffix == "ne")
    verdicts[[value is not None for value in column.values]] = judged
    return verdicts[column.codes]


def _tell_of_near_values(column: str, known: Column, wanted: Any) -> None:
    """Values that no run has are no error, since a view may be empty, but may be slips of the pen."""
    texts = [value for value in (known.values if isinstance(known, Coded) else ()) if isinstance(value, str)]
    for value in wanted if isinstance(wanted, SEVERAL) else (wanted,):
        if isinstance(value, str) and value not in texts and (near := difflib.get_close_matches(value, texts, n=3)):
            log.warning("where: no run has the %s %r; did you mean %s?", column, value, " or ".join(map(repr, near)))


def condition(runs: Runs, name: str, wanted: Any) -> np.ndarray:
    """Which runs meet one condition, bool [number of runs].

    Args:
        runs: to choose from.
        name: a column, or a column and a key of `COMPARISONS` joined by two underscores.
        wanted: what its value is compared with; a list, tuple, set or range without a suffix means `in`.

    Raises:
        UnknownNameError: no such column, no such comparison, or a value that the column never has (`VALUES`).
        ConfigError: `in` without several values, or text compared with a number.
    """
    short, _, suffix = name.partition("__")
    column = runs.known(short)
    if "__" in name and suffix not in COMPARISONS:
        raise unknown_name("comparison", suffix, COMPARISONS)
    suffix = suffix or ("in" if isinstance(wanted, SEVERAL) else "eq")
    if suffix == "in" and not isinstance(wanted, SEVERAL):
        raise ConfigError(f"where: {name} needs a list, tuple, set or range of values, got {wanted!r}")
    if column in VALUES and suffix in ("eq", "ne", "in"):
        for value in wanted if isinstance(wanted, SEVERAL) else (wanted,):
            if value not in VALUES[column]:
                raise unknown_name(column, str(value), VALUES[column])
    if not len(runs):
        return np.zeros(0, dtype=bool)
    if suffix in ("eq", "in"):
        _tell_of_near_values(column, runs.columns[column], wanted)
    try:
        if isinstance(wanted, SEVERAL) and suffix not in ("in", "startswith"):
            raise TypeError("one value is needed")
        return _met(runs.columns[column], suffix, wanted)
    except (TypeError, AttributeError) as error:
        value = runs[0][column]
        raise ConfigError(
            f"where: {name}={wanted!r} cannot be compared with {value!r}, the {column} of run {runs[0]['id']}; "
            f"give a {type(value).__name__}"
        ) from error


def select(runs: Runs, conditions: dict[str, Any]) -> Runs:
    """The runs that meet all conditions, in their order; see `condition` for what is raised."""
    chosen = np.ones(len(runs), dtype=bool)
    for name, wanted in conditions.items():
        chosen &= condition(runs, name, wanted)
    return runs.take(chosen)
