"""Residual branches that start as nothing, so that a deep network starts as a shallow one.

- `"fixup"` (Zhang, Dauphin and Ma, ICLR 2019, arXiv 1901.09321), for networks without normalisation: with L branches
  of m layers each, the last layer of a branch is 0 and the others are multiplied by L^(-1/(2m - 2)); the classifier and
  all biases are 0. Of the scalars that the paper adds, biases start at 0 and multipliers at 1 where a model has them.
- `"zero-gamma"` (Goyal et al., 2017, arXiv 1706.02677): the scale of the last normalisation of a branch is 0; where a
  branch ends without one, its layer scale.
- `"skipinit"` (De and Smith, NeurIPS 2020, arXiv 2002.10444; ReZero, arXiv 2003.04887): the one number that a branch is
  multiplied with at its end is 0.

All refine what is there: `"he+fixup"`. No parameter is added; what a model lacks is told in a note.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from generators.graph import MATRIX_KINDS, Graph
from generators.graph.branches import Branch, branches, last_nodes
from generators.initialiser import Kind, Proposal, Request, register
from generators.inventory import BIAS_ROLES, Inventory, Role
from generators.refining.stored import is_computed

_NORM = frozenset({"normalisation"})
_SCALE = frozenset({"parameter"})
_LAYERS = ("convolution", "linear")


@dataclass(frozen=True)
class Plan:
    """What a rule works on, and the proposal that it makes."""

    rule: str
    model: nn.Module
    graph: Graph
    found: Inventory
    branches: tuple[Branch, ...]
    proposal: Proposal = field(default_factory=Proposal)

    def multiply(self, name: str, factor: float, what: str) -> None:
        """Propose `factor` times the value of the parameter `name`, or of the one that it is tied to."""
        name = self.graph.tied.get(name, name)
        value = self.model.get_parameter(name).detach()
        self.proposal.values[name] = value * factor if factor else torch.zeros_like(value)
        self.proposal.sources[name] = f"{self.rule}: {what}"
        self.proposal.statistics[name] = {"scale": factor}

    def fill(self, name: str, number: float, what: str) -> None:
        """Propose `number` for every entry of the parameter `name`."""
        self.proposal.values[name] = torch.full_like(self.model.get_parameter(name).detach(), number)
        self.proposal.sources[name] = f"{self.rule}: {what}"

    def note(self, text: str) -> None:
        self.proposal.notes.append(f"{self.rule}: {text}")

    def ends(self, branch: Branch, *kinds: str) -> list[int]:
        """The nodes at the end of the branch, if all are of `kinds`; [] if another layer comes first on some way."""
        nodes = list(last_nodes(self.graph, branch, MATRIX_KINDS | _NORM | set(kinds)))
        return nodes if all(self.graph.nodes[index].kind in kinds for index in nodes) else []

    def size_of(self, index: int) -> list[str]:
        """The parameters of node `index` that set the size of its weight.

        The weight itself, or, where it is computed, the gains in it (the g of weight normalisation); [] if it is
        computed without one (spectral normalisation), so that no factor would come through.
        """
        node = self.graph.nodes[index]
        slots = list(zip(node.parameters, node.slots, strict=True))
        gains = [name for name, slot in slots if slot == "gain" and self.found[name].role is Role.GAIN]
        if gains or not slots:
            return gains
        return [] if is_computed(self.model, self.found[slots[0][0]]) else [slots[0][0]]


def zero_gamma(plan: Plan) -> None:
    """0 for the scale of the last normalisation of each branch, or for its layer scale."""
    bare = 0
    for branch in plan.branches:
        norms = plan.ends(branch, *_NORM)
        names = [
            name
            for index in norms or plan.ends(branch, *_SCALE)
            for name, slot in zip(plan.graph.nodes[index].parameters, plan.graph.nodes[index].slots, strict=True)
            if slot == "weight" and plan.found[name].role in (Role.NORM_SCALE, Role.LAYER_SCALE, Role.GAIN)
        ]
        bare += not names
        for name in names:
            plan.multiply(name, 0.0, "last scale of a branch 0")
    if bare:
        plan.note(f"{bare} of {len(plan.branches)} branches end without normalisation or scale and are as they were")


def skipinit(plan: Plan) -> None:
    """0 for the number that multiplies the end of each branch."""
    bare = 0
    for branch in plan.branches:
        scales = [plan.graph.nodes[index].parameters[0] for index in plan.ends(branch, *_SCALE)]
        numbers = [name for name in scales if plan.found[name].numel == 1]
        bare += not numbers
        for name in numbers:
            plan.multiply(name, 0.0, "number at the end of a branch 0")
    if bare:
        plan.note(f"{bare} of {len(plan.branches)} branches have no number at their end and are as they were")


def fixup(plan: Plan) -> None:
    """Scales within branches, 0 at their ends and for the classifier, biases 0."""
    count = len(plan.branches)
    factors: dict[int, float] = {}  # of a layer in a branch within a branch: that of the inner one, which comes first
    for branch in plan.branches:
        last = last_nodes(plan.graph, branch, MATRIX_KINDS)
        factor = count ** (-1.0 / (2 * branch.length - 2)) if branch.length > 1 else 1.0
        for index in branch.nodes:
            if plan.graph.nodes[index].kind in _LAYERS:
                factors[index] = 0.0 if index in last else factors.get(index, factor)
    behind = max(branch.merge for branch in plan.branches)
    factors |= {index: 0.0 for index in plan.graph.output_layers if index > behind}
    _scale(plan, factors)
    _simple(plan)


def _scale(plan: Plan, factors: dict[int, float]) -> None:
    """Multiply layers by node; of one that is applied at several places, the smallest factor counts."""
    shared = {info.tied_to for info in plan.found} | {info.name for info in plan.found if info.tied_to}
    stuck = []
    for index, factor in sorted(factors.items(), key=lambda pair: -pair[1]):
        names = plan.size_of(index)
        if not names or (factor == 0.0 and shared.intersection(names)):
            stuck.append(plan.graph.nodes[index].parameters[0])
        else:
            what = "last layer of a branch or of the network 0" if factor == 0.0 else "layer within a branch scaled"
            for name in names:
                plan.multiply(name, factor, what)
    if stuck:
        plan.note(f"left as they were, because they are tied or computed: {', '.join(dict.fromkeys(stuck))}")


def _simple(plan: Plan) -> None:
    """Biases and offsets 0, multipliers of branches 1; what the model has and should not, or has not and should."""
    inside = {name for branch in plan.branches for index in branch.nodes for name in plan.graph.nodes[index].parameters}
    multipliers, offsets = set[str](), set[str]()
    for info in plan.found:
        if info.role in BIAS_ROLES - {Role.NORM_SHIFT}:
            plan.fill(info.name, 0.0, "bias 0")
        elif info.role is Role.OFFSET:
            plan.fill(info.name, 0.0, "scalar bias 0")
            offsets.add(info.name)
        elif info.role is Role.GAIN and info.numel == 1 and info.consumer == "multiply" and info.name in inside:
            plan.fill(info.name, 1.0, "scalar multiplier 1")
            multipliers.add(info.name)
    for names, words in ((offsets, "scalar biases"), (multipliers, "scalar multipliers")):
        if not names:
            plan.note(f"the model has no {words} as in the paper; none were added")
    norms = sum(node.kind == "normalisation" for node in plan.graph.nodes)
    if norms:
        plan.note(f"made for networks without normalisation; the {norms} layers of it are as they were")


@dataclass(frozen=True)
class Residual:
    """Finds the residual branches on the graph and applies one of the rules of this file.

    Attributes:
        apply: the rule; it writes into the plan's proposal.
    """

    name: str
    apply: Callable[[Plan], None]
    kind: Kind = Kind.REFINING
    needs: tuple[str, ...] = ("graph",)

    def propose(self, model: nn.Module, request: Request) -> Proposal:
        """Scaled and zeroed tensors; `figures` has the number of `branches`."""
        assert request.graph is not None  # it is in `needs`
        plan = Plan(self.name, model, request.graph, request.inventory, branches(request.graph))
        plan.proposal.figures["branches"] = float(len(plan.branches))
        if plan.branches:
            self.apply(plan)
        else:
            plan.note("the model has no residual branches (sums of a stream with what is computed from it)")
        return plan.proposal


_GRAPH = ("graph",)
register(
    "fixup", kind=Kind.REFINING, needs=_GRAPH, paper="Zhang et al., ICLR 2019, arXiv 1901.09321",
    summary="without normalisation: residual branches scaled by their number, their last layers and the classifier 0",
)(lambda: Residual("fixup", fixup))  # fmt: skip
register(
    "zero-gamma", kind=Kind.REFINING, needs=_GRAPH, paper="Goyal et al., 2017, arXiv 1706.02677",
    summary="the last norm scale of every residual branch 0, or its layer scale",
)(lambda: Residual("zero-gamma", zero_gamma))  # fmt: skip
register(
    "skipinit", kind=Kind.REFINING, needs=_GRAPH, paper="De and Smith, NeurIPS 2020, arXiv 2002.10444",
    summary="the number at the end of every residual branch 0",
)(lambda: Residual("skipinit", skipinit))  # fmt: skip
