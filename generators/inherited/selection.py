"""Weight selection: a model starts from a choice of the weights of a larger trained relative.

Xu, Chen, Vishniakov, Yin, Shen, Darrell, Liu and Liu, "Initializing Models with Larger Ones", ICLR 2024, arXiv
2311.18823. Layers: the first N of each stage (`generators.inherited.matching` has the rule). Elements: of an axis of
length L in the relative and S in the model, the indices

    uniform      i L / S if S divides L, else round(i (L - 1) / (S - 1))    for i = 0 .. S - 1
    consecutive  0 .. S - 1
    random       S of L without replacement, in ascending order, drawn once per (L, S)

They depend on L and S alone, so channels that feed each other are chosen alike in all layers of the same widths, which
the paper finds essential. So that this also holds within an axis that is a product, its factors are chosen one by one:
stacked matrices (query-key-value, gates) and the inputs of a linear layer behind a flattened grid (channels x
positions). Values are copied as they are; the paper does not rescale them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from generators.errors import ConfigError
from generators.graph import MATRIX_KINDS, Graph
from generators.inherited.matching import Layer, graph_of_relative, is_pointwise, layers_of, match
from generators.initialiser import Kind, Proposal, Request, register
from generators.inventory import ParameterInfo, Role
from generators.pointwise import HE
from generators.seeds import stream

Mode = Literal["uniform", "consecutive", "random"]
Factors = tuple[int, ...]
"""Lengths whose product is the length of an axis, the slowest first."""


def indices(large: int, small: int, mode: Mode = "uniform", generator: torch.Generator | None = None) -> Tensor:
    """Which of `large` elements of an axis are chosen for `small` ones: int64 `[small]`, ascending and distinct.

    Raises:
        ConfigError: the mode is unknown, or `small` exceeds `large`.
    """
    if small > large:
        raise ConfigError(f"cannot select {small} of {large} elements; the relative must not be the smaller one")
    if mode == "consecutive":
        return torch.arange(small)
    if mode == "random":
        return torch.randperm(large, generator=generator)[:small].sort().values
    if mode != "uniform":
        raise ConfigError(f"element selection {mode!r}: choose 'uniform', 'consecutive' or 'random'")
    if large % small == 0:
        return torch.arange(small) * (large // small)
    steps = small - 1
    return (2 * torch.arange(small) * (large - 1) + steps) // (2 * steps)  # rounded, in whole numbers


def select(
    value: Tensor, large: tuple[Factors, ...], small: tuple[Factors, ...], pick: Callable[[int, int], Tensor]
) -> Tensor:
    """The chosen elements of `value`.

    Args:
        value: a tensor of the relative.
        large: per axis its factors in the relative.
        small: per axis its factors in the model, as many as in the relative.
        pick: `(large, small)` to the indices of a factor.
    """
    for axis, (theirs, ours) in enumerate(zip(large, small, strict=True)):
        chosen = torch.zeros(1, dtype=torch.int64)
        for length, wanted in zip(theirs, ours, strict=True):
            chosen = (chosen[:, None] * length + pick(length, wanted)).flatten()
        value = value.index_select(axis, chosen.to(value.device))
    return value


@dataclass(frozen=True)
class Piece:
    """A tensor of a layer: its state-dict name, and what its axes are made of.

    `fixed` is the axis whose elements mean something outside the model, so that there is no choice: the classes of an
    output layer, the words of a vocabulary.
    """

    name: str
    factors: tuple[Factors, ...]
    fixed: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(lengths) for lengths in self.factors)


def pieces_of(layer: Layer, model: nn.Module, graph: Graph) -> list[Piece]:
    """The parameters of a layer and its running statistics; two layers of one kind have the same list of them.

    The kernel axes of a 1 x 1 convolution are left out, so it is chosen from as a linear layer is.
    """
    made = []
    for info in layer.parameters:
        parts: list[Factors] = [(1, size) for size in (info.shape[:2] if is_pointwise(info) else info.shape)]
        if info.shape:  # a bias is stacked as its weight is
            whole = info.shape[info.block_axis]
            alike = (other for other in layer.parameters if other.shape and other.shape[other.block_axis] == whole)
            stacked = max(other.blocks for other in alike)
            if whole % stacked == 0:
                parts[info.block_axis] = (stacked, whole // stacked)
        if info.role is Role.LINEAR_WEIGHT and len(info.shape) == 2 and not info.transposed:
            parts[1] = _flattened(info, graph)
        outward = info.output or info.role is Role.EMBEDDING
        made.append(Piece(info.name, tuple(parts), int(info.transposed and len(parts) > 1) if outward else None))
    for leaf in layer.buffers:
        name = layer.full(leaf)
        made.append(Piece(name, tuple((1, size) for size in model.get_buffer(name).shape)))
    return made


def _flattened(info: ParameterInfo, graph: Graph) -> Factors:
    """Factors of the inputs of a linear layer: channels x positions behind a convolution, tokens x channels else."""
    whole = info.shape[1]
    before = graph.predecessors[graph.by_parameter[info.name]] if info.name in graph.by_parameter else ()
    channels = graph.nodes[before[0]].attributes.get("out_channels", whole) if len(before) == 1 else whole
    if channels in (0, whole) or whole % channels:
        return (1, whole)
    node = before[0] if before else None
    while node is not None and graph.nodes[node].kind not in MATRIX_KINDS and graph.predecessors[node]:
        node = graph.predecessors[node][0]
    grid = node is not None and graph.nodes[node].kind in ("convolution", "input")
    return (channels, whole // channels) if grid else (whole // channels, channels)


def _misfit(small: Piece, large: Piece) -> str:
    """Why no choice of `large` makes `small`, "" if one does."""
    for axis, (ours, theirs) in enumerate(zip(small.factors, large.factors, strict=True)):
        kept = axis == small.fixed and small.shape[axis] != large.shape[axis]
        if kept or any(wanted > length for wanted, length in zip(ours, theirs, strict=True)):
            what = "classes or words" if kept else "too small a counterpart"
            return f"{what}: {small.name} {small.shape}, in the relative {large.name} {large.shape}"
    return ""


@dataclass(frozen=True)
class WeightSelection:
    """Chooses layers and elements of a larger trained relative; what has no counterpart there is drawn by He.

    Running statistics are chosen with the channels that they describe. The axis of a model's outputs and that of a
    vocabulary are not chosen from: layers where these differ (the classifier for other classes) count as without
    counterpart. Biases go with their weights.

    Attributes:
        mode: how elements are chosen.
    """

    mode: Mode = "uniform"
    name: str = "weight-selection"
    kind: Kind = Kind.INHERITED
    needs: tuple[str, ...] = ("relative", "graph")

    def propose(self, model: nn.Module, request: Request) -> Proposal:
        """A choice for every layer with a counterpart in the relative.

        Raises:
            ModelError: the relative is no module, has no values, or cannot be traced.
            ConfigError: no layer of the model has a counterpart in the relative, or the mode is unknown.
        """
        assert request.graph is not None and request.relative is not None, "init sees to what is needed"
        found, graph = graph_of_relative(request.relative, request.example_inputs)
        layers = layers_of(model, request.inventory, request.graph)
        candidates = layers_of(request.relative, found, graph)
        pairs = match(layers, candidates)
        state, wanted = request.relative.state_dict(), model.state_dict()

        def pick(large: int, small: int) -> Tensor:
            return indices(large, small, self.mode, stream(request.seed, self.name, request.member, large, small))

        proposal, inherited = Proposal(), 0
        for path, layer in layers.items():
            reason = "no layer of this kind is left in the relative"
            if path in pairs:
                ours = pieces_of(layer, model, request.graph)
                theirs = pieces_of(candidates[pairs[path]], request.relative, graph)
                reason = next(filter(None, map(_misfit, ours, theirs)), "")
            if reason:
                for info in layer.parameters:
                    HE.fill(proposal, info, request, because=f"{self.name}: {reason}")
                continue
            inherited += 1
            for small, large in zip(ours, theirs, strict=True):
                chosen = select(state[large.name].reshape(large.shape), large.factors, small.factors, pick)
                proposal.values[small.name] = chosen.reshape(wanted[small.name].shape).clone()
                whose = "" if large.name == small.name else f" of {large.name}"
                proposal.sources[small.name] = f"{self.name}: {self.mode} choice{whose}"
        if not inherited:
            raise ConfigError(
                f"{self.name}: no layer of {type(model).__name__} has a counterpart in the relative "
                f"{type(request.relative).__name__}; pass a larger model of the same family"
            )
        by_name = sum(path == other for path, other in pairs.items())
        proposal.notes.append(
            f"{self.name}: {inherited} of {len(layers)} layers have a counterpart among the {len(candidates)} of the "
            f"relative; of {len(pairs)} pairs {by_name} have the same name"
        )
        return proposal


register(
    "weight-selection", kind=Kind.INHERITED, needs=("relative", "graph"),
    paper="Xu et al., ICLR 2024, arXiv 2311.18823",
    summary="the first layers of each stage of a larger trained relative, every n-th channel",
)(WeightSelection)  # fmt: skip
