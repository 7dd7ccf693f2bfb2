"""EmergenceInit: weights grow towards one end of the network (Li, George and Silva, 2024, arXiv 2407.19044).

The layers are counted from the middle: -n, ..., -1, (0,) 1, ..., n in the order of the forward pass, with a layer 0
only if their number is odd. The weight of layer +n is multiplied by alpha^n and that of its mirror -n divided by
alpha^n, so the product of all factors is 1. A chain of layers with ReLUs between them and biases of 0 computes the
same function as before, for it is homogeneous in every weight; what changes are the gradients: that of a weight is
divided by the weight's factor, so a step of SGD is, relative to the weight, alpha^(-2n) as long. With shortcuts, other
activations or biases, which are left as they are, the function changes too.

What the method's description leaves open, and is ours:

- Which end grows. Layer +n is taken to lie after the middle, so the weights near the output grow and the layers near
  the input learn faster. alpha < 1 is the other way round.
- alpha = 1.1, which moves the ends of 20 layers by a factor of 2.6 each, and those of 100 by 117: the deeper the
  network, the nearer to 1 it should be.
- What a layer is: a convolution or linear layer whose weight is trainable, read at one place, and not computed from
  other parameters. Layers side by side (shortcuts, query beside key) are counted in the order in which they run.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from generators.errors import ConfigError
from generators.graph import Graph
from generators.initialiser import Kind, Proposal, Request, register
from generators.inventory import MATRIX_ROLES
from generators.refining.stored import is_computed


def exponents(count: int) -> list[int]:
    """Distances of `count` layers from the middle, signed: [-1, 1], [-1, 0, 1], [-2, -1, 1, 2], ..."""
    half = count // 2
    return [*range(-half, 0), *[0] * (count % 2), *range(1, half + 1)]


@dataclass(frozen=True)
class EmergenceInit:
    """Scales weights by powers of `alpha` that rise from one end of the network to the other.

    Attributes:
        alpha: factor between neighbours; above 1 the output end grows, below 1 the input end.

    Raises:
        ConfigError: `alpha` is not a positive number.
    """

    alpha: float = 1.1
    name: str = "emergence"
    kind: Kind = Kind.REFINING
    needs: tuple[str, ...] = ("graph",)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha > 0.0):
            raise ConfigError(f"alpha is {self.alpha}; choose a positive number, such as 1.1")

    def propose(self, model: nn.Module, request: Request) -> Proposal:
        """Rescaled weights of the convolutions and linear layers of the forward pass."""
        proposal = Proposal()
        layers = self._layers(model, request, proposal)
        if len(layers) < 2:
            proposal.notes.append(f"{self.name}: {len(layers)} layers can be scaled, and it takes two; nothing changed")
            return proposal
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, exponent in zip(layers, exponents(len(layers)), strict=True):
            scale = self.alpha**exponent
            weight = parameters[name].detach()
            proposal.values[name] = weight.to(torch.promote_types(weight.dtype, torch.float32)) * scale
            proposal.sources[name] = f"{self.name}: scaled"
            proposal.statistics[name] = {"scale": scale}
        scales = [row["scale"] for row in proposal.statistics.values()]
        proposal.figures = {"layers": len(layers), "largest_scale": max(scales)}
        return proposal

    def _layers(self, model: nn.Module, request: Request, proposal: Proposal) -> list[str]:
        """Names of the weights to be scaled, in the order of the forward pass; why others are not, in `proposal`."""
        graph = cast(Graph, request.graph)
        reads = Counter(graph.tied.get(name, name) for node in graph.nodes for name in node.parameters)
        layers = []
        for node in graph.nodes:
            if node.kind not in ("convolution", "linear"):
                continue
            name = graph.tied.get(node.parameters[0], node.parameters[0])
            if request.inventory[name].role not in MATRIX_ROLES:
                proposal.kept[name] = f"{self.name}: no matrix"
            elif reads[name] > 1:
                proposal.kept[name] = f"{self.name}: read at several places"
            elif not request.inventory[name].trainable:
                proposal.kept[name] = f"{self.name}: frozen"
            elif is_computed(model, request.inventory[node.parameters[0]]) or "gain" in node.slots:
                proposal.kept[name] = f"{self.name}: the layer makes its weight of it and other numbers"
            else:
                layers.append(name)
                biases = [bias for bias, slot in zip(node.parameters, node.slots, strict=True) if slot == "bias"]
                proposal.kept |= dict.fromkeys(biases, f"{self.name}: only weights are scaled")
        return layers


register(
    "emergence", kind=Kind.REFINING, needs=("graph",), paper="Li, George and Silva, 2024, arXiv 2407.19044",
    summary="the n-th layer after the middle times 1.1^n, its mirror before the middle divided by that",
)(EmergenceInit)  # fmt: skip
