"""Conditions on the columns of runs: `column=value`, or a comparison named by a suffix, `column__gt=value`.

    where(status="ok", lr__le=0.1, seed__in=range(4), architecture__startswith="resnet")

A run that has no value in a column (NaN, or a metric that its population does not have) meets no comparison but `ne`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterable
from typing import Any

from generators.errors import ConfigError, unknown_name

Run = dict[str, Any]
SEVERAL = list | tuple | set | frozenset | range  # what stands for "one of these"
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "in": lambda value, chosen: value in chosen,
    "startswith": lambda value, start: value.startswith(start),
}


def condition(name: str, wanted: Any, columns: Collection[str] | None) -> Callable[[Run], bool]:
    """Whether a run meets one condition, as a function of the run.

    Args:
        name: a column, or a column and a key of `COMPARISONS` joined by two underscores.
        wanted: what its value is compared with; a list, tuple, set or range without a suffix means `in`.
        columns: known columns, None if there is no run that could tell.

    Raises:
        UnknownNameError: no such column or no such comparison.
        ConfigError: `in` without several values, or text compared with a number (raised when a run is judged).
    """
    column, _, suffix = name.partition("__")
    if columns is not None and column not in columns:
        raise unknown_name("column", column, columns)
    if "__" in name and suffix not in COMPARISONS:
        raise unknown_name("comparison", suffix, COMPARISONS, way_out=f"Known: {', '.join(COMPARISONS)}.")
    suffix = suffix or ("in" if isinstance(wanted, SEVERAL) else "eq")
    if suffix == "in" and not isinstance(wanted, SEVERAL):
        raise ConfigError(f"where: {name} needs a list, tuple, set or range of values, got {wanted!r}")
    compare = COMPARISONS[suffix]

    def met(run: Run) -> bool:
        value = run.get(column)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return suffix == "ne"
        try:
            return bool(compare(value, wanted))
        except (TypeError, AttributeError) as error:
            raise ConfigError(
                f"where: {name}={wanted!r} cannot be compared with {value!r}, the {column} of run {run['id']}; "
                f"give a {type(value).__name__}"
            ) from error

    return met


def select(runs: Iterable[Run], conditions: dict[str, Any]) -> list[Run]:
    """The runs that meet all conditions, in their order; see `condition` for what is raised."""
    runs = list(runs)
    columns = {name for run in runs for name in run} if runs else None
    tests = [condition(name, wanted, columns) for name, wanted in conditions.items()]
    return [run for run in runs if all(test(run) for test in tests)]
