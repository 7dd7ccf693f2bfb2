"""What is known while the graph grows: marks on tensors, operations as they happen, nodes in the making."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

POOLED, SCALED = 1, 2  # flags of a stream: reduced over positions, divided by its own spread


class Stream(NamedTuple):
    """The tensor holds the result of node `node`; `flags` tell what happened to it since."""

    node: int
    flags: int = 0


class Made(NamedTuple):
    """The tensor is computed from `parameters` and constants alone."""

    parameters: tuple[str, ...]


Mark = Stream | Made | None
Weights = list[tuple[Tensor, Made]]


@dataclass
class Draft:
    """A node in the making: the fields of `Node`, its sources, and the grid of its result.

    `positions` x `channels` is the number of values of the result.
    """

    kind: str
    sources: tuple[int, ...]
    parameters: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    positions: float = 1.0
    channels: int = 1

    def place(self, result: Tensor, channels: float) -> None:
        """Set the grid from the tensor that the node results in."""
        self.channels = max(int(channels), 1)
        self.positions = result.numel() / self.channels

    def add_bias(self, parameters: tuple[str, ...]) -> None:
        self.parameters += parameters
        self.slots += ("bias",) * len(parameters)


@dataclass(frozen=True)
class Call:
    """One executed operation: its base name, arguments, tensor operands with their marks, and tensor results."""

    base: str
    args: tuple
    kwargs: Mapping[str, Any]
    operands: list[Tensor]
    marks: list[Mark]
    results: list[Tensor]

    @cached_property
    def pairs(self) -> list[tuple[Tensor, Mark]]:
        return list(zip(self.operands, self.marks, strict=True))

    @cached_property
    def streams(self) -> list[Stream]:
        return [mark for mark in self.marks if isinstance(mark, Stream)]

    @cached_property
    def made(self) -> Weights:
        return [(value, mark) for value, mark in self.pairs if isinstance(mark, Made)]

    @property
    def data(self) -> Tensor:
        """The first operand that is a stream."""
        return next(value for value, mark in self.pairs if isinstance(mark, Stream))

    @property
    def result(self) -> Tensor:
        return self.results[0]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists, tuples, sets, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        for key in value.__dataclass_fields__:
            yield from tensors_in(getattr(value, key, None))


def union(marks: Iterable[Mark]) -> Made:
    """The mark of what is computed from several parameters."""
    return Made(tuple(dict.fromkeys(name for mark in marks if isinstance(mark, Made) for name in mark.parameters)))


def sources_of(streams: Iterable[Stream]) -> tuple[int, ...]:
    """The nodes behind streams, each once, in order."""
    return tuple(dict.fromkeys(stream.node for stream in streams))
