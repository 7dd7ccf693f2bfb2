"""Mimetic initialisation of self-attention (Trockman and Kolter, ICML 2023, arXiv 2305.09828).

In pretrained transformers the products of an attention's projections are close to multiples of the identity. With d
channels, H heads of width k, and Z of independent N(0, 1) entries, they are set to

    W_Q W_K^T  ~  a_1 Z / sqrt(k) + b_1 I,    one draw per head, factored at rank k by the singular value decomposition,
    W_V W_proj ~  a_2 Z / sqrt(d) - b_2 I,    over all heads together, factored at rank H k (exact for H k = d),

where every factor gets the root of the singular values. The paper's values for vision are a_1 = b_1 = 0.7 and
a_2 = b_2 = 0.4; formulas and values are taken from summaries of the paper. Its sinusoidal position tables are left out.

Projections are found on the graph: an attention, the linear layers that feed it and the one that it feeds. Query, key
and value are three layers, or thirds of one, in that order, as where the values begin in it tells. What is not certain
(normalised queries, keys shared by heads, thirds interleaved by head) is left alone, and a note says so.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from generators.graph import Graph, Node
from generators.initialiser import Kind, Proposal, Request, register
from generators.inventory import Inventory
from generators.refining.stored import is_computed, outputs_first
from generators.seeds import plain_tensors, stream


class _Unclear(Exception):
    """Why the projections of an attention cannot be told apart."""


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop` of the weight `name`, outputs first: one projection."""

    name: str
    start: int
    stop: int


class _Weights:
    """The weights that are being changed, by name, as `[outputs, inputs]` in float32."""

    def __init__(self, model: nn.Module, found: Inventory) -> None:
        self.model, self.found = model, found
        self.matrices: dict[str, Tensor] = {}

    def name(self, node: Node) -> str:
        """The weight of a linear layer, if the layer uses it as it is stored."""
        name = node.parameters[0]
        if "gain" in node.slots or is_computed(self.model, self.found[name]):
            raise _Unclear("their weights are computed")
        return self.found[name].tied_to or name

    def shape(self, name: str) -> tuple[int, int]:
        """Outputs and inputs."""
        info = self.found[name]
        if len(info.shape) != 2:
            raise _Unclear("their weights are no matrices")
        return (info.shape[1], info.shape[0]) if info.transposed else (info.shape[0], info.shape[1])

    def rows(self, part: Rows) -> Tensor:
        """The matrix of `part`, to write into."""
        if part.name not in self.matrices:
            stored = self.model.get_parameter(part.name).detach().cpu().float()
            self.matrices[part.name] = outputs_first(stored, self.found[part.name]).clone()
        return self.matrices[part.name][part.start : part.stop]


def halves(target: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`[d, r]` and `[r, d]` whose product is the best approximation of `target` `[d, d]` at rank r."""
    left, values, right = torch.linalg.svd(target)
    roots = values[:rank].sqrt()
    return left[:, :rank] * roots, roots[:, None] * right[:rank]


def projections(graph: Graph, node: Node, weights: _Weights) -> tuple[Rows, Rows, Rows]:
    """Query, key and value projection of the attention `node`."""
    layers = [graph.nodes[index] for index in graph.predecessors[node.index]]
    layers = [layer for layer in layers if layer.kind != "parameter"]
    if any(layer.kind != "linear" for layer in layers) or len(layers) not in (1, 3):
        raise _Unclear("linear layers for query, key and value do not feed them directly")
    if len({graph.predecessors[layer.index] for layer in layers}) > 1 or len(graph.predecessors[layers[0].index]) > 1:
        raise _Unclear("they look at another stream")
    if node.attributes.get("values_at", -1) < 0:
        raise _Unclear("they compare channels, not positions, or are no softmax of products")
    names = [weights.name(layer) for layer in layers]
    if len(layers) == 3:
        shapes = {weights.shape(name) for name in names}
        if len(shapes) > 1 or len(set(names)) < 3:
            raise _Unclear("query, key and value differ in width or are one")
        first, second, third = (Rows(name, 0, weights.shape(name)[0]) for name in names)
        return first, second, third
    width, rest = divmod(weights.shape(names[0])[0], 3)
    if rest or node.attributes.get("values_at") != 2 * width:
        raise _Unclear("nothing shows that query, key and value are thirds of one projection (a cache hides it)")
    first, second, third = (Rows(names[0], part * width, (part + 1) * width) for part in range(3))
    return first, second, third


def output_projection(graph: Graph, node: Node, weights: _Weights, shape: tuple[int, int]) -> Rows:
    """The linear layer after the attention `node`, which must have a weight of `shape` `[d, H k]`."""
    after = [graph.nodes[index] for index in graph.successors[node.index]]
    if len(after) != 1 or after[0].kind != "linear":
        raise _Unclear("no linear layer follows them directly (queries and keys are set)")
    name = weights.name(after[0])
    if weights.shape(name) != shape or shape[1] > shape[0]:
        raise _Unclear("their output has another width than their input (queries and keys are set)")
    return Rows(name, 0, shape[0])


@dataclass(frozen=True)
class Mimetic:
    """Sets query, key, value and output projections of every self-attention; biases are left alone.

    Attributes:
        query_key_noise, query_key_identity: a_1 and b_1.
        value_noise, value_identity: a_2 and b_2.
    """

    query_key_noise: float = 0.7
    query_key_identity: float = 0.7
    value_noise: float = 0.4
    value_identity: float = 0.4
    name: str = "mimetic"
    kind: Kind = Kind.REFINING
    needs: tuple[str, ...] = ("graph",)

    @plain_tensors()
    def propose(self, model: nn.Module, request: Request) -> Proposal:
        """New projections; `figures` has the number of `attentions` that were set."""
        assert request.graph is not None  # it is in `needs`
        weights, unclear, done = _Weights(model, request.inventory), Counter[str](), set[str]()
        for node in request.graph.nodes:
            if node.kind != "attention":
                continue
            try:
                query, key, value = projections(request.graph, node, weights)
                if query.name in done:
                    continue  # shared by several layers
                draws = stream(request.seed, self.name, request.member, query.name)
                self._compare(node, weights, query, key, draws)
                done.add(query.name)
                self._answer(request.graph, node, weights, value, draws)
            except _Unclear as reason:
                unclear[str(reason)] += 1
        return self._account(weights, unclear, len(done))

    def _compare(self, node: Node, weights: _Weights, query: Rows, key: Rows, draws: torch.Generator) -> None:
        """Set query and key projections, head by head."""
        channels, total = weights.shape(query.name)[1], query.stop - query.start
        width = node.attributes.get("head_width", 0)
        if not 0 < width <= channels or total % width:
            raise _Unclear("their heads cannot be counted")
        heads = zip(weights.rows(query).split(width), weights.rows(key).split(width), strict=True)
        for one, other in heads:
            noise = torch.randn(channels, channels, generator=draws) * (self.query_key_noise / math.sqrt(width))
            left, right = halves(noise + self.query_key_identity * torch.eye(channels), width)
            one.copy_(left.T)
            other.copy_(right)

    def _answer(self, graph: Graph, node: Node, weights: _Weights, value: Rows, draws: torch.Generator) -> None:
        """Set value and output projections, all heads at once."""
        channels, total = weights.shape(value.name)[1], value.stop - value.start
        output = output_projection(graph, node, weights, (channels, total))
        noise = torch.randn(channels, channels, generator=draws) * (self.value_noise / math.sqrt(channels))
        left, right = halves(noise - self.value_identity * torch.eye(channels), total)
        weights.rows(value).copy_(left.T)
        weights.rows(output).copy_(right.T)

    def _account(self, weights: _Weights, unclear: Counter[str], count: int) -> Proposal:
        """The proposal for what has been set, with a note for each reason why something was not."""
        proposal = Proposal(figures={"attentions": float(count)})
        for name, matrix in weights.matrices.items():
            proposal.values[name] = outputs_first(matrix, weights.found[name])
            proposal.sources[name] = f"{self.name}: products near multiples of the identity"
        proposal.notes = [f"{self.name}: {number} attentions left alone: {why}" for why, number in unclear.items()]
        if not count and not unclear:
            proposal.notes.append(f"{self.name}: the model has no attention")
        return proposal


register(
    "mimetic", kind=Kind.REFINING, needs=("graph",), paper="Trockman and Kolter, ICML 2023, arXiv 2305.09828",
    summary="self-attention: query-key products near 0.7 I, value-output products near -0.4 I",
)(Mimetic)  # fmt: skip
