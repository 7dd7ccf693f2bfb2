"""Random values for a sweep: from a number in [0, 1) to a value, as a spec (`collect.spec`) writes it.

{"uniform": [low, high]}
{"log_uniform": [low, high]}     as often between 0.01 and 0.1 as between 0.1 and 1
{"integer": [low, high]} or {"integer": [low, high, step]}     low, low + step, ..., high included
{"choice": [value, ...]}
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from collect.typed import keys, typed
from generators.errors import ConfigError

SIGNIFICANT = 6  # digits of drawn numbers: easy to read, and short of the last bits, in which machines may differ


def _rounded(value: float, low: float, high: float) -> float:
    return min(max(float(f"{value:.{SIGNIFICANT}g}"), low), high)


def _uniform(place: float, low: float, high: float) -> float:
    return _rounded(low + place * (high - low), low, high)


def _log_uniform(place: float, low: float, high: float) -> float:
    return _rounded(low * (high / low) ** place, low, high)


def _integer(place: float, low: int, high: int, step: int = 1) -> int:
    return low + step * int(place * ((high - low) // step + 1))


def _choice(place: float, *values: Any) -> Any:
    return values[int(place * len(values))]


DISTRIBUTIONS: dict[str, Callable[..., Any]] = {
    "uniform": _uniform, "log_uniform": _log_uniform, "integer": _integer, "choice": _choice
}  # fmt: skip


def draw(distribution: dict[str, list], place: float) -> Any:
    """The value of a checked distribution at `place`, a number in [0, 1)."""
    ((name, arguments),) = distribution.items()
    return DISTRIBUTIONS[name](place, *arguments)


def checked(value: Any, kind: Any, where: str) -> dict[str, list]:
    """`value`, a distribution of values of a kind, such as `{"uniform": [0.8, 0.95]}` of floats.

    Args:
        value: from JSON.
        kind: type of the values.
        where: the place in the spec, for errors.

    Raises:
        ConfigError: no distribution, impossible bounds, or one that draws values of another kind.
        UnknownNameError: a name that is not in `DISTRIBUTIONS`.
    """
    found = keys(value, DISTRIBUTIONS, where, "distribution")
    if len(found) != 1:
        raise ConfigError(f"{where} needs one of {', '.join(DISTRIBUTIONS)}, got {', '.join(found) or 'none'}")
    ((name, values),) = found.items()
    where = f"{where}.{name}"
    if not typed(values, list, where):
        raise ConfigError(f"{where} needs at least one value, got an empty list")
    number = {"choice": kind, "integer": int}.get(name, float)
    values = [typed(each, number, f"{where}[{place}]") for place, each in enumerate(values)]
    if name != "choice":
        _check_bounds(name, values, where)
    typed(draw({name: values}, 0.0), kind, f"what {where} draws")
    return {name: values}


def _check_bounds(name: str, values: list, where: str) -> None:
    stepped = name == "integer" and len(values) == 3
    if len(values) != 2 + stepped or values[0] > values[1] or (stepped and values[2] < 1):
        form = "[low, high] or [low, high, step]" if name == "integer" else "[low, high]"
        raise ConfigError(f"{where} must be {form} with low <= high, got {json.dumps(values)}")
    if name == "log_uniform" and values[0] <= 0:
        raise ConfigError(f"{where} must have bounds above 0, got {json.dumps(values)}")
