"""What has to be decoded for one architecture: targets grouped by shape, fixed per architecture and cached.

A target is one matrix: a convolution or linear weight, or one of the stacked blocks of an attention weight, so that
query, key and value are different matrices.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from generators.ghn.familiar import strange
from generators.ghn.features import NodeTable, node_table
from generators.graph import Graph
from generators.inventory import Inventory, ParameterInfo, Role

DECODED_ROLES = frozenset({Role.CONV_WEIGHT, Role.LINEAR_WEIGHT, Role.ATTENTION_WEIGHT})
MAX_BLOCKS = 4
SPATIAL = 2  # the decoder knows kernels of up to two axes


@dataclass(frozen=True)
class Group:
    """G targets of one shape `[O, I, *kernel]`, decoded together.

    Attributes:
        names: the G parameter names.
        blocks: which of the stacked matrices of its parameter each target is (0 for all but attention weights).
        nodes: int64 `[G]`, node of each target.
        outputs, inputs, kernel: O output rows, I inputs per row, S = prod(kernel) positions.
        fan_in: I * S, for transposed convolutions the fan of the stored transpose.
        output: True for classifiers, whose rows are classes.
        stacked: how many such matrices the parameter of each target holds (3 for stacked attention weights).
        axis: the axis along which the parameter has them one after the other.
    """

    names: tuple[str, ...]
    blocks: tuple[int, ...]
    nodes: Tensor
    outputs: int
    inputs: int
    kernel: tuple[int, ...]
    fan_in: int
    output: bool
    stacked: int = 1
    axis: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.outputs, self.inputs, *self.kernel)

    @cached_property
    def block_rows(self) -> Tensor:
        """`blocks` as int64 `[G]` beside `nodes`."""
        return torch.tensor(self.blocks, device="cpu").to(self.nodes.device)

    @property
    def target_std(self) -> float:
        """He's spread; a classifier has no ReLU behind it and gets gain 1."""
        return math.sqrt((1.0 if self.output else 2.0) / max(self.fan_in, 1))


@dataclass(frozen=True)
class DecodePlan:
    """The node table and the groups of one architecture, and why every other parameter is left to a fallback.

    `found` is the inventory with the roles that the graph revealed.
    """

    found: Inventory
    table: NodeTable
    groups: tuple[Group, ...]
    left_out: dict[str, str]

    @property
    def numel(self) -> int:
        """How many weights one member has decoded."""
        return sum(len(group.nodes) * math.prod(group.shape) for group in self.groups)

    @property
    def widest(self) -> int:
        """The most channels on either side of a matrix; 0 if none is decoded."""
        return max((max(group.outputs, group.inputs) for group in self.groups), default=0)

    @property
    def nodes(self) -> frozenset[int]:
        """The nodes of all targets."""
        return frozenset(node for group in self.groups for node in group.nodes.tolist())

    def to(self, device: torch.device) -> DecodePlan:
        """The plan with all of its indices and features on `device`."""

        def moved(record: Any) -> Any:
            own = {field.name: getattr(record, field.name) for field in fields(record)}
            tensors = {name: value.to(device) for name, value in own.items() if isinstance(value, Tensor)}
            return replace(record, **tensors)

        return replace(self, table=moved(self.table), groups=tuple(moved(group) for group in self.groups))


def _reason_to_leave(info: ParameterInfo, classes: int) -> str | None:
    if info.tied_to:
        return f"tied to {info.tied_to}"
    if not info.numel:
        return "it has no entries"
    if info.role not in DECODED_ROLES:
        return f"the GHN does not predict {info.role.value}"
    if len(info.kernel) > SPATIAL:
        return f"kernels of {len(info.kernel)} axes are not predicted"
    if len(info.shape) != 2 + len(info.kernel):  # experts, bilinear layers
        return f"a {info.role.value} of shape {info.shape} is a stack of matrices, which is not predicted"
    if info.output and info.transposed:
        return "output layers that are stored input-first are not predicted"
    if info.output and info.shape[0] != classes:
        return f"the GHN was trained for {classes} classes, this layer has {info.shape[0]}"
    return None


def decode_plan(
    graph: Graph, found: Inventory, *, classes: int, distance_limit: int, met: Collection[str] = ()
) -> DecodePlan:
    """The plan for a model with this graph and inventory.

    Args:
        graph: the traced graph.
        found: the inventory of the same model, refined by the graph.
        classes: number of classes that the class codes of the GHN stand for.
        distance_limit: how far apart two nodes may be to exchange messages.
        met: sorts of layers that the GHN knows, see `familiar`; none if that is not known.
    """
    members: dict[tuple, list[tuple[str, int, int]]] = defaultdict(list)
    left_out = {}
    for info in found:
        node, reason = graph.by_parameter.get(info.name), _reason_to_leave(info, classes) or strange(info, met)
        if reason or node is None:
            left_out[info.name] = reason or "no operation of the traced graph consumes it"
            continue
        sides = list(info.shape[:2])
        sides[info.block_axis] //= info.blocks
        key = (*sides, info.shape[2:], info.fan_in, info.output, info.blocks, info.block_axis)
        members[key] += [(info.name, block, node) for block in range(info.blocks)]
    groups = tuple(
        Group(
            names=tuple(name for name, _, _ in found_members),
            blocks=tuple(block for _, block, _ in found_members),
            nodes=torch.tensor([node for _, _, node in found_members]),
            outputs=key[0], inputs=key[1], kernel=key[2], fan_in=key[3], output=key[4], stacked=key[5],
            axis=key[6],
        )
        for key, found_members in members.items()
    )  # fmt: skip
    return DecodePlan(found, node_table(graph, distance_limit=distance_limit), groups, left_out)


def together(plans: Sequence[DecodePlan]) -> tuple[Group, ...]:
    """The groups of several architectures as if they were one whose nodes follow one another.

    Targets of one shape meet in one group, so that many small networks are decoded in about as many operations as one.
    The place of an architecture stands before its names, `0/conv1.weight`.
    """
    alike: dict[tuple, list[Group]] = defaultdict(list)
    first = 0
    for place, plan in enumerate(plans):
        for group in plan.groups:
            key = (group.shape, group.fan_in, group.output, group.stacked, group.axis)
            names = tuple(f"{place}/{name}" for name in group.names)
            alike[key].append(replace(group, names=names, nodes=group.nodes + first))
        first += len(plan.table.features)
    return tuple(
        replace(
            groups[0], names=tuple(name for group in groups for name in group.names),
            blocks=tuple(block for group in groups for block in group.blocks),
            nodes=torch.cat([group.nodes for group in groups]),
        )
        for groups in alike.values()
    )  # fmt: skip
