"""Arguments of public functions: what makes no sense is refused by name before anything is done with it."""

from __future__ import annotations

import operator

from torch import Tensor

from generators.errors import ConfigError


def whole_number(name: str, value: object, *, least: int | None = None) -> int:
    """`value` as an int: of any type that has an index, such as numpy's, but no truth value.

    Raises:
        ConfigError: it is none, or under `least`.
    """
    try:
        found = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        found = None
    if found is None or (least is not None and found < least):
        bound = "" if least is None else f" of at least {least}"
        raise ConfigError(f"{name} must be a whole number{bound}, got {value!r}")
    return found


def real_tensor(name: str, value: object, *, what: str, axes: int | None = None) -> Tensor:
    """`value`, a tensor of floating-point numbers.

    Args:
        name: of the argument.
        value: of it.
        what: which tensor is wanted and where one is to be had, for the message.
        axes: how many it must have, if that is certain.

    Raises:
        ConfigError: it is no such tensor.
    """
    if isinstance(value, Tensor) and value.is_floating_point() and axes in (None, value.dim()):
        return value
    got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise ConfigError(f"{name} must be {what}, a tensor of floating-point numbers, got {got}")
