"""From a traced graph to the numbers that a graph hypernetwork reads: one row per node, one relation per close pair.

The features say what a node does and where it stands (GHN-2, Knyazev et al. 2021, arXiv 2110.13100, uses an operation
and a shape embedding); position is given relative to the whole, so that they mean the same at any depth and width.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

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


TILE = 64  # nodes that get messages in one step


@dataclass(frozen=True)
class Tile:
    """T nodes that get messages, and all S nodes that send them any.

    Attributes:
        targets: the T nodes, one after the other.
        sources: int64 `[S]`.
        relation: int64 `[T, S]`, that of the pair, 2 * limit + 1 where there is none.
    """

    targets: slice
    sources: Tensor
    relation: Tensor


@dataclass(frozen=True)
class Level:
    """Nodes of which none comes before another, and the messages that they get.

    Attributes:
        nodes: int64 `[n]`.
        sources: int64 `[E]`, who sends each of the E messages: always a node of an earlier level.
        into: int64 `[E]`, who gets it, as a place in `nodes`.
        steps: int64 `[E]`, distance from source to target, 1 for an edge of the graph.
    """

    nodes: Tensor
    sources: Tensor
    into: Tensor
    steps: Tensor


@dataclass(frozen=True)
class NodeTable:
    """What the encoder reads of one architecture.

    Attributes:
        features: float `[N, F]`, N nodes with F features each.
        pairs: int64 `[2, P]`, source and target of the P ordered pairs of nodes within the distance limit.
            Every node is a pair with itself.
        relation: int64 `[P]`, signed distance of each pair shifted to be an index: 0 is the node itself, d a pair with
            d steps from source to target, limit + d one with d steps against the direction of the data.
        distance_limit: the limit.
    """

    features: Tensor
    pairs: Tensor
    relation: Tensor
    distance_limit: int

    @cached_property
    def dense(self) -> Tensor:
        """int64 `[N, N]`: relation of source (column) to target (row), 2 * limit + 1 where there is none."""
        count = len(self.features)
        table = torch.full((count, count), 2 * self.distance_limit + 1, device=self.pairs.device)
        table[self.pairs[1], self.pairs[0]] = self.relation
        return table

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        """All pairs as small dense tables: about as many entries as pairs, since neighbours have like neighbours."""
        device, count, none = self.pairs.device, len(self.features), 2 * self.distance_limit + 1
        pairs, relation = self.pairs.cpu(), self.relation.cpu()  # what follows is many small steps
        order = torch.argsort(pairs[1])
        (sources, targets), relation = pairs[:, order], relation[order]
        starts = list(range(0, count, TILE))
        bounds = torch.searchsorted(targets, targets.new_tensor([*starts, count])).tolist()
        tiles = []
        for start, (low, high) in zip(starts, itertools.pairwise(bounds), strict=True):
            stop = min(start + TILE, count)
            found, column = torch.unique(sources[low:high], return_inverse=True)
            table = relation.new_full((stop - start, len(found)), none)
            table[targets[low:high] - start, column] = relation[low:high]
            tiles.append(Tile(slice(start, stop), found.to(device), table.to(device)))
        return tuple(tiles)

    @cached_property
    def traversals(self) -> tuple[tuple[Level, ...], tuple[Level, ...]]:
        """The levels along the data, from the inputs on, and those against it, from the output on."""
        along = (self.relation > 0) & (self.relation <= self.distance_limit)
        (sources, targets), steps = self.pairs[:, along].cpu(), self.relation[along].cpu()
        count, device = len(self.features), self.pairs.device
        return _levels(count, sources, targets, steps, device), _levels(count, targets, sources, steps, device)


def _levels(count: int, sources: Tensor, targets: Tensor, steps: Tensor, device: torch.device) -> tuple[Level, ...]:
    """Nodes by the length of the longest way to them, over messages from `sources` to `targets`; moved to `device`."""
    edge = steps == 1
    depth = steps.new_tensor(_longest_ways(count, sources[edge].tolist(), targets[edge].tolist()))
    nodes, arrival = torch.argsort(depth, stable=True), torch.argsort(depth[targets], stable=True)
    sizes = torch.bincount(depth)
    received = torch.bincount(depth[targets], minlength=len(sizes))
    place = torch.empty_like(depth)
    parts = nodes.split(sizes.tolist())
    for part in parts:
        place[part] = torch.arange(len(part), device=place.device)
    messages = (values[arrival].split(received.tolist()) for values in (sources, place[targets], steps))
    return tuple(Level(*(part.to(device) for part in level)) for level in zip(parts, *messages, strict=True))


def _longest_ways(count: int, sources: list[int], targets: list[int]) -> list[int]:
    """Edges on the longest way to each node of a graph without cycles."""
    after: list[list[int]] = [[] for _ in range(count)]
    open_edges = [0] * count
    for source, target in zip(sources, targets, strict=True):
        after[source].append(target)
        open_edges[target] += 1
    depth = [0] * count
    ready = [node for node in range(count) if not open_edges[node]]
    for node in ready:  # it grows on the way
        for target in after[node]:
            depth[target] = max(depth[target], depth[node] + 1)
            open_edges[target] -= 1
            if not open_edges[target]:
                ready.append(target)
    return depth


def node_table(graph: Graph, *, distance_limit: int) -> NodeTable:
    """The table of `graph` with relations between nodes at most `distance_limit` steps apart, both ways."""
    count = len(graph.nodes)
    rows = [_node_row(node, count) for node in graph.nodes]
    source, target, steps = graph.close_pairs(distance_limit)
    itself = torch.arange(count)
    pairs = torch.stack([torch.cat([itself, source, target]), torch.cat([itself, target, source])])
    relation = torch.cat([torch.zeros(count, dtype=torch.int64), steps, distance_limit + steps])
    return NodeTable(torch.tensor(rows, dtype=torch.float32), pairs, relation, distance_limit)
