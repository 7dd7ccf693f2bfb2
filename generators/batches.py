"""Data for initialisers that look at it: batches that can be read again, and a model's answer to one of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from generators.errors import DataError, ModelError


class Replayed:
    """An iterator that can be iterated over again: what it gave is kept, and no more is taken than is asked for."""

    def __init__(self, source: Iterator) -> None:
        self._source, self._seen = source, list[Any]()

    def __iter__(self) -> Iterator:
        taken = 0
        while True:
            if taken == len(self._seen):
                try:
                    self._seen.append(next(self._source))
                except StopIteration:
                    return
            yield self._seen[taken]
            taken += 1


def check_iterable(data: Iterable) -> None:
    """Raise `DataError` unless `data` can give batches: a tensor or data set gives examples, a mapping its keys."""
    single = isinstance(data, Tensor | Mapping) or (isinstance(data, Dataset) and not isinstance(data, IterableDataset))
    if single or not (isinstance(data, Iterable) or hasattr(data, "__getitem__")):
        raise DataError(
            f"data must be an iterable of batches (inputs, targets), got {type(data).__name__}; "
            "pass a list [(inputs, targets)] or a DataLoader"
        )


def readable_again(data: Iterable | None) -> Iterable | None:
    """`data`, such that every step of a chain meets the batches from the first one on.

    Raises:
        DataError: see `check_iterable`.
    """
    if data is None:
        return None
    check_iterable(data)
    return Replayed(data) if isinstance(data, Iterator) else data


def first_batch(data: Iterable | None, name: str) -> Any:
    """The first batch of `data`, for the initialiser `name`.

    Raises:
        DataError: the data is empty, or missing.
    """
    batch = next(iter(data), None) if data is not None else None
    if batch is None or (isinstance(batch, list | tuple) and not batch):
        raise DataError(f"{name} needs data, but the data passed is empty")
    return batch


def inputs_of(batch: Any) -> Any:
    """The inputs of a batch `(inputs, targets)`; a batch that is a lone tensor or mapping is inputs."""
    return batch[0] if isinstance(batch, list | tuple) else batch


def pair_of(batch: Any, name: str) -> tuple[Any, Any]:
    """Inputs and targets of a batch, for the initialiser `name`; a mapping is both, for losses that look into it.

    Raises:
        DataError: the batch has another form.
    """
    if isinstance(batch, Mapping):
        return batch, batch
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        count = f" of {len(batch)}" if isinstance(batch, list | tuple) else ""
        raise DataError(
            f"{name} needs batches (inputs, targets), got {type(batch).__name__}{count}; pass [(inputs, targets)], "
            "where inputs may be a mapping of keyword arguments"
        )
    return batch[0], batch[1]


def _is_named(value: Any) -> bool:
    """Whether it is a named tuple, such as a packed sequence."""
    return isinstance(value, tuple) and hasattr(value, "_fields")


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """`value` with `function` of each of its tensors, also of those in tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, part) for key, part in value.items()}
    if not isinstance(value, list | tuple):
        return value
    parts = [map_tensors(function, part) for part in value]
    return type(value)(*parts) if _is_named(value) else type(value)(parts)


def to_device_of(model: nn.Module, value: Any) -> Any:
    """`value` with its tensors where the first parameter of `model` is.

    Raises:
        DataError: a tensor is on the meta device, so there is nothing to move.
    """
    device = next(model.parameters()).device

    def move(tensor: Tensor) -> Tensor:
        if tensor.is_meta and device.type != "meta":
            raise DataError("the data hold a tensor on the meta device, which has no values; pass real batches")
        return tensor.to(device)

    return map_tensors(move, value)


def arguments_of(inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """Inputs as positional and keyword arguments: one argument, a tuple of them, or a mapping by keyword.

    A named tuple, such as a packed sequence, is one argument.
    """
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) and not _is_named(inputs) else (inputs,)), {}


def in_full_precision(device_type: str) -> AbstractContextManager:
    """Without the caller's autocast, which rounds weights and goes on with copies of those that have changed since."""
    known = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if known else nullcontext()


def uncompiled() -> AbstractContextManager:
    """Compiled modules run as the Python that they were made from: what is looked at once is not worth compiling, and
    compiled code has no second derivatives.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def call(model: nn.Module, inputs: Any) -> Any:
    """`model` on inputs that are one argument, a tuple of arguments, or a mapping of keyword arguments.

    Raises:
        ModelError: the model's own exception, as the cause.
    """
    arguments, keywords = arguments_of(to_device_of(model, inputs))
    try:
        with in_full_precision(next(model.parameters()).device.type):
            return model(*arguments, **keywords)
    except Exception as error:  # whatever a foreign forward raises; it is chained, not swallowed
        raise ModelError(f"{type(model).__name__} cannot be run on the first batch of the data: {error}") from error
