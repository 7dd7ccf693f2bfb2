"""Contraction while tracing: each operation is folded into the graph as it happens, at constant cost per operand.

The rule for an operation turns the marks of its operands (`generators.graph.nodes`) into that of its results, and adds
a node only for layers and merges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from generators.graph import operations as ops
from generators.graph.drafts import POOLED, SCALED, Call, Draft, Made, Mark, Stream, sources_of, union
from generators.graph.geometry import recurrent_stack
from generators.graph.nodes import Nodes


def _place(values: Tensor) -> int:
    """Where a view of channels-last vectors begins in its tensor, -1 if its last axis is not that of the channels."""
    return int(values.storage_offset()) if values.stride(-1) == 1 else -1


class Builder(Nodes):
    """Grows the graph operation by operation."""

    # ---- one operation ----------------------------------------------------------------------------------------------

    def record(
        self, name: str, args: tuple, kwargs: Mapping[str, Any], operands: list[Tensor], results: list[Tensor]
    ) -> None:
        """Fold one executed operation in: `results` were computed (or overwritten) from `operands`."""
        base = ops.base_name(name)
        marks = [self.mark_of(value) for value in operands]
        mark: Mark = None
        if any(marks) and base not in ops.SOURCE_FREE:
            call = Call(base, args, kwargs, operands, marks, results)
            mark = self._rule(call)(call)
        for value in results:
            self.mark(value, mark)

    def _rule(self, call: Call) -> Callable[[Call], Mark]:
        base, marks = call.base, call.marks
        if base in ops.FIRST_ONLY:
            return lambda call: call.marks[0]
        if base == "multi_head_attention_forward":
            return self._multi_head_attention
        if base in ops.STACKED_RECURRENT:
            return self._recurrent
        behind = any(isinstance(mark, Made) for mark in marks[1:])
        if base in ops.LAYERS and (behind or (ops.LAYERS[base] == "embedding" and isinstance(marks[0], Made))):
            return self._layer
        if base in ops.LOOKUPS and isinstance(marks[0], Made) and call.streams:
            return self._layer
        if base in ops.PRODUCTS:
            return self._product
        if base in ops.ATTENTION:
            return self._attention
        if base in ops.FUSED_PRODUCTS:
            return self._fused_product
        return self._join

    # ---- rules ------------------------------------------------------------------------------------------------------

    def _layer(self, call: Call) -> Mark:
        """An operation with data first and parameters behind."""
        kind = ops.LAYERS.get(call.base, "embedding")
        data = 0
        if kind == "embedding":  # some spellings have the table first: data is what is whole-numbered
            data = next((i for i, value in enumerate(call.operands) if not value.is_floating_point()), 0)
        value, mark = call.pairs[data]
        if isinstance(mark, Made) and call.base in ops.STANDARDISATION:
            return union(call.marks)
        rest = [pair for place, pair in enumerate(call.pairs) if place != data]
        streams = [] if mark is None else [self.stream(mark)]
        streams += [other for _, other in rest if isinstance(other, Stream)]
        return self.add_layer(call, kind, streams, [(v, m) for v, m in rest if isinstance(m, Made)], value)

    def _product(self, call: Call) -> Mark:
        """A product of a stream with parameters is linear; of two streams, attention; of parameters, a parameter."""
        if not call.streams:
            return union(call.marks)
        if call.made:
            made = sorted(call.made, key=lambda pair: pair[0].ndim < 2)  # addmm has the bias first
            return self.add_layer(call, "linear", call.streams, made, call.data)
        if len(call.streams) > 1:
            return self._values_of_attention(call) or self._compared(call)
        return call.streams[0]

    def _compared(self, call: Call) -> Mark:
        """The product of two streams: every row of the first with every column of the second."""
        mark = self._merge(call, "attention", always=True)
        if isinstance(mark, Stream) and call.base in ("matmul", "bmm"):
            self.drafts[mark.node].attributes["head_width"] = call.operands[0].shape[-1]
        return mark

    def _values_of_attention(self, call: Call) -> Stream | None:
        """`softmax(q @ k) @ v` is one attention, as if it were the fused operation. None if it is something else."""
        scores, values = call.streams[:2]
        draft = self.drafts[scores.node]
        own = draft.kind == "attention" and draft.attributes.get("activation") == "softmax"
        if not own or values.node >= scores.node:
            return None
        del draft.attributes["activation"]
        draft.attributes["operation"] = "scaled_dot_product_attention"
        draft.attributes["values_at"] = _place(call.operands[-1])
        draft.sources = tuple(dict.fromkeys((*draft.sources, values.node)))
        draft.place(call.result, self.merged_channels(draft, call.result, draft.sources[0]))
        return Stream(scores.node)

    def _attention(self, call: Call) -> Mark:
        """Fused attention: always a node. Parameters that are added to its scores are noted."""
        mark = self._merge(call, "attention", always=True)
        if isinstance(mark, Stream) and len(call.operands) > 2:
            query, _, values = call.operands[:3]
            self.drafts[mark.node].attributes.update(head_width=query.shape[-1], values_at=_place(values))
        bias = call.args[3] if len(call.args) > 3 else call.kwargs.get("attn_mask")
        if isinstance(mark, Stream) and isinstance(bias, Tensor) and isinstance(made := self.mark_of(bias), Made):
            self.drafts[mark.node].attributes["score_bias"] = made.parameters
        return mark

    def _fused_product(self, call: Call) -> Mark:
        """`a + b * c`: first the product, for which the result, of the same shape, stands in."""
        product = self._merge(replace(call, base="mul", operands=call.operands[1:], marks=call.marks[1:]), "multiply")
        operands, marks = [call.operands[0], call.result], [call.marks[0], product]
        return self._merge(replace(call, base="add", operands=operands, marks=marks), "add")

    def _join(self, call: Call) -> Mark:
        """Everything else: contracted away with one stream, a merge with several."""
        kinds = (("add", ops.ADDS), ("multiply", ops.MULTIPLIES), ("concatenate", ops.CONCATENATES))
        return self._merge(call, next((kind for kind, names in kinds if call.base in names), "merge"))

    def _merge(self, call: Call, kind: str, *, always: bool = False) -> Mark:
        if not call.streams:
            return union(call.marks)
        floating = [mark for value, mark in call.pairs if isinstance(mark, Stream) and value.is_floating_point()]
        streams = floating or call.streams  # masks and indices only steer
        if call.made:
            folded = self._fold(call, kind, streams)
            if folded is not None:
                return folded
        elif not always and len(sources_of(streams)) == 1:
            return self._pass(call.base, streams)
        sources = sources_of([*streams, *(self.stream(mark) for _, mark in call.made)])
        draft = Draft(kind, sources, attributes={"operation": call.base})
        return self.add(draft, call.result, streams, self.merged_channels(draft, call.result, streams[0].node))

    def _fold(self, call: Call, kind: str, streams: list[Stream]) -> Stream | None:
        """Layers written by hand: `x @ w + b`, and the scale of a normalisation. None if it is neither."""
        if len(sources_of(streams)) > 1 or len(call.made) > 1:
            return None
        (value, mark), stream = call.made[0], streams[0]
        draft = self.drafts[stream.node]
        if value.numel() < 2 or not value.numel() == max(value.shape) == draft.channels:
            return None  # not one value per channel
        if kind == "multiply" and any(stream.flags & SCALED for stream in streams):
            return self.add_layer(call, "normalisation", streams, call.made, call.data)
        by_hand = draft.kind in ("linear", "convolution") or draft.attributes.get("operation") in ops.MULTIPLIES
        if kind == "add" and by_hand and draft.parameters and "bias" not in draft.slots and not stream.flags:
            draft.add_bias(mark.parameters)
            return stream
        return None

    def _pass(self, base: str, streams: list[Stream]) -> Stream:
        """One stream goes through: only its flags and the node's activation are noted."""
        node, flags = streams[0].node, 0
        for stream in streams:
            flags |= stream.flags
        if base in ops.ACTIVATIONS:
            self.drafts[node].attributes.setdefault("activation", base)
        if base in ops.POOLS:
            flags |= POOLED
        if base in ops.STATISTICS:
            flags |= SCALED
        return Stream(node, flags)

    def _multi_head_attention(self, call: Call) -> Mark:
        """`F.multi_head_attention_forward`: in-projection(s), attention, out-projection."""
        names = (
            "query", "key", "value", "embed_dim", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v",
            "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias",
        )  # fmt: skip
        given = {**dict(zip(names, call.args, strict=False)), **call.kwargs}

        def marked(*keys: str) -> list[tuple[Tensor, Mark]]:
            return [(given[key], self.mark_of(given[key])) for key in keys if given.get(key) is not None]

        def linear(streams: list[Stream], weights: list[tuple[Tensor, Mark]], data: Tensor) -> list[Stream]:
            made = [(value, mark) for value, mark in weights if isinstance(mark, Made)]
            return [self.add_layer(call, "linear", streams, made, data, result=data)] if made else streams

        def streams_of(*keys: str) -> list[Stream]:
            return [self.stream(mark) for _, mark in marked(*keys) if mark is not None]

        query = given["query"]
        if given.get("in_proj_weight") is not None:
            inside = linear(streams_of("query", "key", "value"), marked("in_proj_weight", "in_proj_bias"), query)
            self.drafts[-1].attributes.update(projections=3, out_channels=given["in_proj_weight"].shape[0])
        else:
            inside = []
            for key in ("query", "key", "value"):
                inside += linear(streams_of(key), marked(f"{key[0]}_proj_weight"), given[key])
            for stream in inside:
                for mark in (mark for _, mark in marked("in_proj_bias") if isinstance(mark, Made)):
                    self.drafts[stream.node].add_bias(mark.parameters)
        sources = sources_of([*inside, *streams_of("bias_k", "bias_v")])
        facts = {
            "operation": "scaled_dot_product_attention", "head_width": query.shape[-1] // given["num_heads"],
            "values_at": 2 * query.shape[-1],
        }  # fmt: skip
        draft = Draft("attention", sources, attributes=facts)
        attention = self.add(draft, query, inside, query.shape[-1])
        return linear([attention], marked("out_proj_weight", "out_proj_bias"), call.result)[0]

    def _recurrent(self, call: Call) -> Mark:
        """`lstm` and kin over stacked layers: one node per layer and direction, directions concatenated."""
        stack = recurrent_stack(call.args)
        weights = [(value, mark) for value in stack.weights if isinstance(mark := self.mark_of(value), Made)]
        size = len(weights) // (stack.layers * stack.directions)
        own = {id(value) for value in stack.weights}
        streams = [self.stream(mark) for value, mark in call.pairs if mark is not None and id(value) not in own]
        for layer in range(stack.layers):
            groups = [weights[(layer * stack.directions + side) * size :][:size] for side in range(stack.directions)]
            streams = [self.add_layer(call, "recurrent", streams, group, call.operands[0]) for group in groups]
            if stack.directions > 1:
                draft = Draft("concatenate", sources_of(streams), attributes={"operation": call.base})
                streams = [self.add(draft, call.result, streams, call.result.shape[-1])]
        return streams[0]
