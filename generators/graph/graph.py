"""The graph: what a model computes, contracted to the operations that own parameters and those that join streams.

A node is a layer (its weight and its bias together), a free parameter, a merge of several streams (add, multiply,
concatenate, attention, ...), an input or the output. Everything else (activations, views, pools, dropout) is contracted
away and leaves at most an attribute. Nodes are in topological order: every edge goes from a lower to a higher index.
All passes over the graph are linear in its edges.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from generators.graph.inputs import Inputs

MATRIX_KINDS = frozenset({"convolution", "linear", "recurrent", "embedding"})
"""Kinds of nodes that multiply by a learned matrix."""

LAYER_KINDS = MATRIX_KINDS | {"normalisation", "activation"}
"""Kinds of nodes that own their parameters; all other parameters are nodes of kind "parameter"."""

MERGE_KINDS = frozenset({"add", "multiply", "concatenate", "attention", "merge"})
"""Kinds of nodes that join streams ("merge": by any other operation)."""

NODE_KINDS = ("input", "parameter", *sorted(LAYER_KINDS), *sorted(MERGE_KINDS), "output")


@dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
        index: its place in `Graph.nodes`.
        kind: one of `NODE_KINDS`.
        parameters: names of the parameters that it consumes, the main weight first. A layer that is applied twice has
            two nodes with the same names.
        slots: per parameter "weight", "gain" (part of how the weight is made, such as the g of weight normalisation) or
            "bias".
        shape: shape of the main weight as the model stores it, () without parameters.
        attributes: facts by name, present where they make sense:
            `operation` (torch's name), `in_channels`, `out_channels`, `kernel`, `stride`, `groups`, `transposed`,
            `resolution` (log2 of the side length of the output's grid relative to the input's, so -1 after a stride of
            2), `activation` (name of the first activation that follows, through a normalisation; "" if none), `pooled`
            (True if pooling or another reduction lies between it and its input), `projections` (stacked matrices in a
            weight, 3 for query-key-value), `score_bias` (parameters that fused attention adds to its scores),
            `head_width` (length of the vectors that attention compares), `values_at` (where its values begin in the
            tensor that they are a view of, -1 if their last axis is not that of the channels), `to_output` (edges on
            the shortest way to the output, -1 if there is none).
        depth: its place on the longest way from an input to the output, 0 to 1.
    """

    index: int
    kind: str
    parameters: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    depth: float = 0.0


@dataclass(frozen=True, eq=False)
class Graph:
    """The graph of one model.

    Attributes:
        nodes: N nodes in topological order.
        edges: int64 `[2, E]`, source and target node of each of E edges, sorted by target.
        unused: names of the parameters that the forward does not touch, in registration order.
        tied: every further name of a shared parameter -> its first name.
        inputs: what the forward was given, without values; nothing if it was run on real inputs.
    """

    nodes: tuple[Node, ...]
    edges: Tensor
    unused: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    inputs: Inputs = field(default_factory=Inputs)

    def __len__(self) -> int:
        return len(self.nodes)

    def __repr__(self) -> str:
        kinds = Counter(node.kind for node in self.nodes)
        listed = ", ".join(f"{kinds[kind]} {kind}" for kind in NODE_KINDS if kinds[kind])
        unused = f", {len(self.unused)} unused parameters" if self.unused else ""
        return f"Graph({len(self.nodes)} nodes, {self.edges.shape[1]} edges: {listed}{unused})"

    @cached_property
    def by_parameter(self) -> dict[str, int]:
        """Name of every used parameter -> index of the first node that consumes it.

        A tied name that the forward does not read on its own leads to the node of the name that it is tied to.
        """
        found: dict[str, int] = {}
        for node in self.nodes:
            for name in node.parameters:
                found.setdefault(name, node.index)
        groups: dict[str, list[str]] = {}
        for name, first in self.tied.items():
            groups.setdefault(first, [first]).append(name)
        for names in groups.values():
            used = next((name for name in names if name in found), None)
            if used is not None:
                for name in names:
                    found.setdefault(name, found[used])
        return found

    @cached_property
    def predecessors(self) -> tuple[tuple[int, ...], ...]:
        """Per node the nodes that feed it."""
        lists: list[list[int]] = [[] for _ in self.nodes]
        for source, target in self.edges.T.tolist():
            lists[target].append(source)
        return tuple(map(tuple, lists))

    @cached_property
    def successors(self) -> tuple[tuple[int, ...], ...]:
        """Per node the nodes that it feeds."""
        lists: list[list[int]] = [[] for _ in self.nodes]
        for source, target in self.edges.T.tolist():
            lists[source].append(target)
        return tuple(map(tuple, lists))

    @cached_property
    def output_layers(self) -> frozenset[int]:
        """Matrix nodes whose result reaches the output, and on no way through another matrix: the heads."""
        feeds_matrix = [False] * len(self.nodes)
        found = set()
        for node in reversed(self.nodes):
            after = self.successors[node.index]
            feeds_matrix[node.index] = any(
                feeds_matrix[index] or self.nodes[index].kind in MATRIX_KINDS for index in after
            )
            reaches = node.attributes.get("to_output", -1) >= 0
            if node.kind in MATRIX_KINDS and reaches and not feeds_matrix[node.index]:
                found.add(node.index)
        return frozenset(found)

    @cached_property
    def output_parameters(self) -> frozenset[str]:
        """Names of the parameters of the `output_layers`."""
        return frozenset(name for index in self.output_layers for name in self.nodes[index].parameters)

    @cached_property
    def signature(self) -> str:
        """Hex digest of the structure: kinds, parameter names, shapes, attributes and edges, but no values.

        Equal for two models of one architecture (that were traced with inputs of equal shapes relative to the grid),
        so it serves as a key for whatever is computed per architecture.
        """
        rows = [[node.kind, node.parameters, node.slots, node.shape, dict(node.attributes)] for node in self.nodes]
        text = json.dumps([rows, self.edges.tolist(), self.unused], sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def distances(self, limit: int | None = None) -> Tensor:
        """Lengths of the shortest forward ways.

        Args:
            limit: greater lengths count as unreachable.

        Returns:
            int64 `[N, N]`: entry (i, j) is the number of edges from node i to node j, 0 on the diagonal, -1 if there is
            no way or only a longer one than `limit`.
        """
        limit = len(self.nodes) if limit is None else limit
        ways = self._ways(limit).astype(np.int64)
        ways[ways > limit] = -1
        return torch.from_numpy(ways.T.copy())

    def close_pairs(self, limit: int) -> tuple[Tensor, Tensor, Tensor]:
        """Every pair of different nodes with a forward way of at most `limit` edges: source, target and length.

        What `distances` says, in a fraction of the memory. int64 `[P]` each, ordered by source.
        """
        ways = self._ways(limit)
        np.fill_diagonal(ways, limit + 1)
        source, target = np.nonzero(np.less_equal(ways.T, limit))
        steps = ways[target, source].astype(np.int64)
        return torch.from_numpy(source), torch.from_numpy(target), torch.from_numpy(steps)

    def _ways(self, limit: int) -> np.ndarray:
        """`[N, N]`, target by source: edges on the shortest way, `limit + 1` for longer ones, in few bytes.

        One pass in topological order: the distances to a node are the least of those to its predecessors plus 1.
        """
        count, far = len(self.nodes), limit + 1
        ways = np.full((count, count), far, dtype=np.min_scalar_type(far + 1))
        for index, before in enumerate(self.predecessors):
            if before:
                np.minimum.reduce(ways[list(before)], axis=0, out=ways[index])
                np.minimum(ways[index] + 1, far, out=ways[index], casting="unsafe")
            ways[index, index] = 0
        return ways
