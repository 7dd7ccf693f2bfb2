"""A graph that grows while a model is traced: its nodes, and what every traced tensor stands for.

A traced tensor carries a mark: a `Stream` (it holds the result of a node, perhaps reshaped, pooled or activated since),
a `Made` (it is computed from parameters alone, such as a standardised weight or an expanded token), or nothing (a
constant).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

from generators.graph import operations as ops
from generators.graph.drafts import POOLED, Call, Draft, Made, Mark, Stream, Weights, sources_of
from generators.graph.geometry import layer_attributes


class Nodes:
    """The graph so far.

    Args:
        shapes: name -> shape of every parameter.

    Attributes:
        drafts: the nodes so far, in topological order.
        grid: number of positions of the first input and of its grid axes.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.drafts: list[Draft] = []
        self.grid: tuple[float, int] = (0.0, 1)
        self._marks: dict[int, Mark] = {}
        self._alive: list[Tensor] = []  # an id is a name only as long as its object lives
        self._sequences: dict[int, Tensor] = {}  # inputs of three axes that no layer has consumed yet
        self._free: dict[tuple[str, ...], int] = {}  # parameters -> their node of kind "parameter"

    # ---- marks ------------------------------------------------------------------------------------------------------

    def mark_of(self, value: Tensor) -> Mark:
        mark = self._marks.get(id(value))
        if mark is None and is_functorch_wrapped_tensor(value):
            return self.mark_of(get_unwrapped(value))
        return mark

    def mark(self, value: Tensor, mark: Mark) -> None:
        if is_functorch_wrapped_tensor(value):  # inside torch.vmap: what leaves it is the tensor within
            self.mark(get_unwrapped(value), mark)
        if mark is None:
            self._marks.pop(id(value), None)
        elif self._marks.get(id(value)) != mark:
            self._marks[id(value)] = mark
            self._alive.append(value)

    def parameter(self, value: Tensor, name: str) -> None:
        """Announce a parameter."""
        self.mark(value, Made((name,)))

    def input(self, value: Tensor) -> None:
        """Announce an input: a node of its own. Images and signals are channels-first, vectors channels-only.

        Whether three axes are a signal or a sequence (channels-last) shows when a layer consumes them.
        """
        floating = value.is_floating_point()
        grid = floating and value.ndim >= 3
        channels = value.shape[1] if grid else value.shape[-1] if floating and value.ndim == 2 else 1
        draft = Draft("input", (), attributes={"out_channels": channels})
        draft.place(value, channels)
        if not self.drafts:
            self.grid = draft.positions, max(value.ndim - 2, 1) if grid else 1
        if floating and value.ndim == 3:
            self._sequences[len(self.drafts)] = value
        self.drafts.append(draft)
        self.mark(value, Stream(len(self.drafts) - 1))

    def _orient(self, node: int, kind: str, facts: Mapping[str, Any]) -> None:
        """Set the channel axis of an input of three axes by the first layer that consumes it."""
        value = self._sequences.pop(node)
        last = kind in ("linear", "recurrent") or facts["operation"] in ("layer_norm", "rms_norm")
        if last and value.shape[-1] == facts["in_channels"]:
            self.drafts[node].place(value, value.shape[-1])
            self.drafts[node].attributes["out_channels"] = value.shape[-1]
            if node == 0:
                self.grid = self.drafts[0].positions, 1

    def output(self, values: list[Tensor]) -> None:
        """Announce the outputs: one node that they all feed."""
        streams = [self.stream(mark) for mark in map(self.mark_of, values) if mark is not None]
        self.drafts.append(Draft("output", sources_of(streams)))

    # ---- nodes ------------------------------------------------------------------------------------------------------

    def stream(self, mark: Stream | Made) -> Stream:
        """The mark as a stream: parameters that meet one become a node of their own, one per set of parameters."""
        if isinstance(mark, Stream):
            return mark
        if mark.parameters not in self._free:
            names = self._main_first(mark.parameters)
            shape = self.shapes[names[0]]
            draft = Draft("parameter", (), names, ("weight", *("gain",) * (len(names) - 1)), shape)
            draft.channels = shape[-1] if shape else 1
            draft.positions = math.prod(shape) / max(draft.channels, 1)
            self.drafts.append(draft)
            self._free[mark.parameters] = len(self.drafts) - 1
        return Stream(self._free[mark.parameters])

    def _main_first(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(names, key=lambda name: -math.prod(self.shapes[name])))

    def add_layer(
        self, call: Call, kind: str, streams: list[Stream], made: Weights, data: Tensor, *, result: Tensor | None = None
    ) -> Stream:
        """A node that owns parameters: of the operands `made`, the first is the weight.

        Args:
            call: the operation.
            kind: of the node.
            streams: what feeds it.
            made: its parameter operands.
            data: the operand that it works on.
            result: its result, if that is not the one of the operation.
        """
        result = call.result if result is None else result
        slots: dict[str, str] = {}
        for place, (value, mark) in enumerate(made):
            bias = place > 0
            if kind in ("convolution", "linear", "recurrent"):
                bias = value.ndim < 2 and (place > 0 or call.base in ops.LAYERS)
            for rank, name in enumerate(self._main_first(mark.parameters)):
                slots.setdefault(name, "bias" if bias else "gain" if rank else "weight")
        names = tuple(slots)
        stored = self.shapes[names[0]]
        attributes, positions = layer_attributes(kind, call, [value for value, _ in made], data, result, stored)
        draft = Draft(kind, sources_of(streams), names, tuple(slots.values()), stored, attributes)
        for node in draft.sources:
            if node in self._sequences:
                self._orient(node, kind, attributes)
        return self.add(draft, result, streams, attributes["out_channels"], positions)

    def add(
        self, draft: Draft, result: Tensor, streams: list[Stream], channels: float, positions: float | None = None
    ) -> Stream:
        """Append a node whose result is a tensor with that many channels."""
        draft.place(result, channels)
        if positions is not None:
            draft.positions = positions
        if any(stream.flags & POOLED for stream in streams):
            draft.attributes["pooled"] = True
        self.drafts.append(draft)
        return Stream(len(self.drafts) - 1)

    def merged_channels(self, draft: Draft, result: Tensor, like: int) -> int:
        """Channels of a merge: those of source `like`, unless streams are concatenated along the channels."""
        first = self.drafts[like]
        if draft.kind == "attention":  # one result per query, whatever the heads
            return int(result.numel() / max(first.positions, 1))
        if draft.kind == "concatenate":
            total = sum(self.drafts[index].channels for index in draft.sources)
            if result.numel() == total * first.positions:
                return total
        return first.channels
