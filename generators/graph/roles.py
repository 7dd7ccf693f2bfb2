"""Roles by use: what the graph knows about a parameter that its owner's class does not say.

A free parameter is named by the operation that consumes it and by its shape: a vector that scales a residual branch is
a layer scale, a table added to a stream is a position table, one added to attention scores is a relative bias, ...
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from generators.graph.graph import Graph, Node
from generators.inventory import BIAS_ROLES, MATRIX_ROLES, ParameterInfo, Role

_WEIGHT = {
    "convolution": Role.CONV_WEIGHT,
    "linear": Role.LINEAR_WEIGHT,
    "recurrent": Role.RECURRENT_WEIGHT,
    "normalisation": Role.NORM_SCALE,
    "embedding": Role.EMBEDDING,
    "activation": Role.SLOPE,
}
_BIAS = {
    "convolution": Role.CONV_BIAS,
    "linear": Role.LINEAR_BIAS,
    "recurrent": Role.RECURRENT_BIAS,
    "normalisation": Role.NORM_SHIFT,
    "multiply": Role.NORM_SHIFT,
}
_UNKNOWN = (Role.MATRIX, Role.OTHER)
_SOFTMAX = ("softmax", "log_softmax")


def refined(info: ParameterInfo, graph: Graph) -> ParameterInfo:
    """`info` with consumer, depth and output from the graph, and role and fans where its owner left them open."""
    index = graph.by_parameter.get(info.name)
    if index is None:
        return info
    node = graph.nodes[index]
    first = graph.tied.get(info.name, info.name)
    slots = zip(node.parameters, node.slots, strict=True)
    slot = next((slot for name, slot in slots if graph.tied.get(name, name) == first), "weight")
    role = info.role
    changes: dict[str, Any] = {}
    if role in _UNKNOWN:
        role = _free_role(graph, node, info) if node.kind == "parameter" else _layer_role(node, slot, info)
        changes = _geometry(node, role, info)
    elif role is Role.EMBEDDING and _is_position_table(graph, node):
        role = Role.POSITION_TABLE
    if role is Role.LINEAR_WEIGHT and len(info.shape) == 2 and _is_query_key_value(graph, node):
        changes = {**changes, "blocks": 3, "fan_out": node.attributes["out_channels"] // 3}
    return replace(
        info, role=role, depth=node.depth, consumer=_consumer(graph, node),
        output=info.name in graph.output_parameters and role in MATRIX_ROLES | BIAS_ROLES, **changes,
    )  # fmt: skip


def _consumer(graph: Graph, node: Node) -> str | None:
    """The kind of the node; of what a free parameter feeds."""
    after = graph.successors[node.index]
    return node.kind if node.kind != "parameter" else graph.nodes[after[0]].kind if after else None


def _long_axes(shape: tuple[int, ...]) -> int:
    return sum(size > 1 for size in shape)


def _layer_role(node: Node, slot: str, info: ParameterInfo) -> Role:
    """Role of a free parameter that a layer consumes."""
    if slot == "bias":
        return _BIAS.get(node.kind, Role.OTHER)
    if slot == "gain" and info.shape[1:] != node.shape[1:]:
        return Role.MATRIX if _long_axes(info.shape) > 1 else Role.GAIN
    role = _WEIGHT[node.kind]
    return Role.OTHER if role in MATRIX_ROLES and len(info.shape) < 2 else role


def _geometry(node: Node, role: Role, info: ParameterInfo) -> dict[str, Any]:
    """Fans of a free weight by what the layer does with it, not by how it is stored."""
    facts = node.attributes
    if role is Role.CONV_WEIGHT:
        area, groups = math.prod(facts["kernel"]), facts["groups"]
        return dict(
            fan_in=facts["in_channels"] // groups * area, fan_out=facts["out_channels"] // groups * area,
            kernel=facts["kernel"], groups=groups, transposed=facts["transposed"],
        )  # fmt: skip
    if role is Role.LINEAR_WEIGHT and len(info.shape) == 3:  # one matrix per head or expert
        return dict(fan_in=facts["in_channels"], fan_out=facts["out_channels"], blocks=info.shape[0])
    if role is Role.LINEAR_WEIGHT and facts.get("transposed"):
        return dict(fan_in=facts["in_channels"], fan_out=facts["out_channels"], transposed=True)
    return {}


def _is_position_table(graph: Graph, node: Node) -> bool:
    """An embedding that is read at constant places, or whose table is added as it is."""
    if node.kind == "embedding":
        return not graph.predecessors[node.index]
    return node.kind == "parameter" and any(graph.nodes[i].kind == "add" for i in graph.successors[node.index])


def _is_query_key_value(graph: Graph, node: Node) -> bool:
    """A linear layer that alone feeds an attention three times as narrow as its result."""
    if node.kind != "linear" or not graph.successors[node.index]:
        return False
    after = [graph.nodes[index] for index in graph.successors[node.index]]
    if any(next_.kind not in ("attention", "multiply", "concatenate") for next_ in after):
        return False
    attentions = [next_ for next_ in after if next_.kind == "attention"]
    alone = any(graph.predecessors[next_.index] == (node.index,) for next_ in attentions)
    width = node.attributes["out_channels"]
    return alone and any(3 * next_.attributes["out_channels"] == width for next_ in attentions)


def _holds_scores(graph: Graph, index: int, steps: int = 3) -> bool:
    """Whether a node's result is attention scores, perhaps scaled or biased since."""
    node = graph.nodes[index]
    if node.kind == "attention":
        return True
    if node.kind not in ("add", "multiply") or not steps:
        return False
    return any(_holds_scores(graph, before, steps - 1) for before in graph.predecessors[index])


def _free_role(graph: Graph, node: Node, info: ParameterInfo) -> Role:
    """Role of a parameter that is a node of its own, by the first node that it feeds."""
    if info.name not in node.parameters[:1] and _long_axes(info.shape) < _long_axes(node.shape):
        return Role.GAIN if _long_axes(info.shape) < 2 else Role.MATRIX
    if not graph.successors[node.index]:
        return Role.OTHER
    user = graph.nodes[graph.successors[node.index][0]]
    others = [index for index in graph.predecessors[user.index] if index != node.index]
    after = [graph.nodes[index] for index in graph.successors[user.index]]
    axes = _long_axes(info.shape)
    if user.kind == "attention" and info.name in user.attributes.get("score_bias", ()):
        return Role.RELATIVE_BIAS
    if user.kind in ("concatenate", "attention") or user.kind in _WEIGHT:
        return Role.TOKEN
    if user.kind == "add":
        if any(_holds_scores(graph, index) for index in others):
            return Role.RELATIVE_BIAS
        if axes > 1:
            return Role.POSITION_TABLE
        sources = (graph.nodes[index].kind for index in others)
        return next((_BIAS[kind] for kind in sources if kind in _BIAS), Role.NORM_SHIFT) if axes else Role.OFFSET
    if user.kind == "multiply":
        if any(_holds_scores(graph, index) for index in others) or user.attributes.get("activation") in _SOFTMAX:
            return Role.TEMPERATURE
        if axes < 2 and any(next_.kind == "attention" for next_ in after):
            return Role.TEMPERATURE
        if not axes:
            return Role.TEMPERATURE if any(next_.kind == "output" for next_ in after) else Role.GAIN
        return Role.LAYER_SCALE if any(_is_residual(graph, next_, user) for next_ in after) else Role.GAIN
    return Role.TOKEN if user.kind == "merge" and axes == 1 else Role.OTHER


def _is_residual(graph: Graph, node: Node, branch: Node) -> bool:
    """Whether `node` adds `branch` to another stream (and not to a parameter)."""
    others = (graph.nodes[index].kind for index in graph.predecessors[node.index] if index != branch.index)
    return node.kind == "add" and any(kind != "parameter" for kind in others)
