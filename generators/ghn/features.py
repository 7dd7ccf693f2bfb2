"""From a traced graph to the numbers that a graph hypernetwork reads: one row per node, one relation per close pair.

The features say what a node does and where it stands (GHN-2, Knyazev et al. 2021, arXiv 2110.13100, uses an operation
and a shape embedding); position is given relative to the whole, so that they mean the same at any depth and width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from generators.graph import NODE_KINDS, Graph, Node

COARSEST = -3.0  # log2 of the side of a grid relative to the input's
POSITION_FREQUENCIES = (0.5, 1.0, 2.0, 4.0)  # half-turns over the whole depth of the network


def _log2(value: float) -> float:
    return math.log2(max(value, 1.0))


def _node_row(node: Node, count: int) -> list[float]:
    """The features of one node, each of the order of 1.

    None may depend on the size of the inputs that the model was traced with, which is often a guess: so the input has
    no width, and only convolutions have a resolution, at the coarsest that of small images after global pooling.
    """
    facts = node.attributes
    outputs, inputs = facts.get("out_channels", 0) if node.kind != "input" else 0, facts.get("in_channels", 0)
    kernel, groups = facts.get("kernel", ()), facts.get("groups", 1)
    resolution = max(facts.get("resolution", 0.0), COARSEST) if node.kind == "convolution" else 0.0
    row = [float(node.kind == kind) for kind in NODE_KINDS]
    row += [
        _log2(outputs) / 8,
        _log2(inputs) / 8,
        (_log2(outputs) - _log2(inputs)) / 2 if inputs and outputs else 0.0,
        _log2(math.prod(kernel)) / 4,
        float(len(kernel) > 0),
        _log2(groups) / 8,
        float(groups > 1 and groups == inputs),
        _log2(max(facts.get("stride", (1,)))),
        resolution / 3,
        float(facts.get("pooled", False)),
        float(bool(facts.get("activation"))),
        1.0 / (1.0 + max(facts.get("to_output", count), 0)),
        1.0 / (1.0 + node.index),
        _log2(count) / 8,
        node.depth,
        node.index / max(count - 1, 1),
    ]
    for frequency in POSITION_FREQUENCIES:
        row += [math.sin(math.pi * frequency * node.depth), math.cos(math.pi * frequency * node.depth)]
    return row


FEATURES = len(NODE_KINDS) + 16 + 2 * len(POSITION_FREQUENCIES)


@dataclass(frozen=True)
class NodeTable:
    """What the encoder reads of one architecture.

    Attributes:
        features: float `[N, F]`, N nodes with F features each.
        pairs: int64 `[2, P]`, source and target of the P ordered pairs of nodes within the distance limit.
        relation: int64 `[P]`, signed distance of each pair shifted to be an index: 0 is the node itself, d a pair with
            d steps from source to target, limit + d one with d steps against the direction of the data.
    """

    features: Tensor
    pairs: Tensor
    relation: Tensor


def node_table(graph: Graph, *, distance_limit: int) -> NodeTable:
    """The table of `graph` with relations between nodes at most `distance_limit` steps apart, both ways."""
    count = len(graph.nodes)
    rows = [_node_row(node, count) for node in graph.nodes]
    forward = graph.distances(distance_limit)  # [N, N], -1 where out of reach
    source, target = torch.where(forward > 0)
    steps = forward[source, target]
    itself = torch.arange(count)
    pairs = torch.stack([torch.cat([itself, source, target]), torch.cat([itself, target, source])])
    relation = torch.cat([torch.zeros(count, dtype=torch.int64), steps, distance_limit + steps])
    return NodeTable(torch.tensor(rows, dtype=torch.float32), pairs, relation)
