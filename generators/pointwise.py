"""Pointwise initialisers: each weight is drawn on its own, given only its fan (over `torch.nn.init`).

They are also the named fallback of every learned initialiser for tensors that it does not generate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from generators.initialiser import Kind, Proposal, Request, register
from generators.inventory import BIAS_ROLES, MATRIX_ROLES, ParameterInfo, Role
from generators.seeds import plain_tensors, stream

CONSTANT_ROLES = BIAS_ROLES | {Role.NORM_SCALE}  # equal in all members
TABLE_STD = 0.02  # position tables, tokens and relative-bias tables: the habit of the transformer literature
_CUT_STD = 0.8796256610342398  # of a standard normal variable cut at -2 and 2

Draw = Callable[[Tensor, ParameterInfo, torch.Generator], object]


def normal(std: Callable[[ParameterInfo], float]) -> Draw:
    """Draws from a normal distribution whose standard deviation is a function of the parameter."""
    return lambda block, info, generator: nn.init.normal_(block, 0.0, std(info), generator=generator)


def _uniform(std: Callable[[ParameterInfo], float]) -> Draw:
    def draw(block: Tensor, info: ParameterInfo, generator: torch.Generator) -> None:
        bound = math.sqrt(3.0) * std(info)
        nn.init.uniform_(block, -bound, bound, generator=generator)

    return draw


def _cut_normal(std: Callable[[ParameterInfo], float]) -> Draw:
    """Normal draws cut at twice their standard deviation, which is as much greater as the cut takes away."""

    def draw(block: Tensor, info: ParameterInfo, generator: torch.Generator) -> None:
        whole = std(info) / _CUT_STD
        nn.init.trunc_normal_(block, 0.0, whole, -2.0 * whole, 2.0 * whole, generator=generator)

    return draw


def _he(info: ParameterInfo) -> float:
    return math.sqrt(2.0 / max(info.fan_in, 1))


def _he_out(info: ParameterInfo) -> float:
    return math.sqrt(2.0 / max(info.fan_out, 1))


def _xavier(info: ParameterInfo) -> float:
    return math.sqrt(2.0 / max(info.fan_in + info.fan_out, 1))


def _lecun(info: ParameterInfo) -> float:
    return math.sqrt(1.0 / max(info.fan_in, 1))


def _truncated(block: Tensor, info: ParameterInfo, generator: torch.Generator) -> None:
    nn.init.trunc_normal_(block, 0.0, TABLE_STD, generator=generator)


def _orthogonal(block: Tensor, info: ParameterInfo, generator: torch.Generator) -> None:
    nn.init.orthogonal_(block, math.sqrt(2.0), generator=generator)


def _nothing(info: ParameterInfo) -> str:
    return ""


@dataclass(frozen=True)
class Pointwise:
    """Draws every matrix with `draw`, sets biases to 0 and norm scales to 1.

    Attributes:
        name: the registered name.
        draw: fills one matrix `[fan_out, ...]` in place; stacked matrices (query-key-value, gates) one by one.
        lacks: why `draw` has no rule for a parameter, "" if it has one; `he` makes what it lacks.
    """

    name: str
    draw: Draw
    kind: Kind = Kind.POINTWISE
    lacks: Callable[[ParameterInfo], str] = _nothing

    @plain_tensors()
    def value(self, info: ParameterInfo, seed: int, member: int) -> tuple[Tensor | None, str]:
        """The value for one parameter and a word on how it was made; None where the constructor's value stays."""
        value = torch.empty(info.shape)
        generator = stream(seed, "pointwise", member, info.name)
        if info.role in MATRIX_ROLES:
            for block in value.chunk(info.blocks, info.block_axis):
                self.draw(block, info, generator)
            return value, self.name
        if info.role in BIAS_ROLES:
            return value.zero_(), f"{self.name}: {info.role.value} 0"
        if info.role is Role.NORM_SCALE:
            return value.fill_(1.0), f"{self.name}: norm_scale 1"
        if info.role is Role.EMBEDDING:
            return nn.init.normal_(value, generator=generator), f"{self.name}: embedding N(0, 1)"
        if info.role in (Role.POSITION_TABLE, Role.TOKEN, Role.RELATIVE_BIAS):
            nn.init.trunc_normal_(value, std=TABLE_STD, generator=generator)
            return value, f"{self.name}: {info.role.value} truncated normal, std {TABLE_STD}"
        return None, f"{info.role.value} keeps the value of its constructor"

    def propose(self, model: nn.Module, request: Request) -> Proposal:
        """Values for every parameter whose role a pointwise rule covers."""
        proposal = Proposal()
        for info in request.inventory:
            lack = self.lacks(info)
            (HE if lack else self).fill(proposal, info, request, because=f"{self.name}: {lack}" if lack else "")
        return proposal

    def fill(self, proposal: Proposal, info: ParameterInfo, request: Request, *, because: str = "") -> None:
        """Add the value of `info` to `proposal`; as a named fallback if `because` says why the proposer has none."""
        value, how = self.value(info, request.seed, request.member)
        if value is None:
            proposal.kept[info.name] = f"{how}; {because}" if because else how
            return
        proposal.values[info.name] = value
        (proposal.fallbacks if because else proposal.sources)[info.name] = f"{how} ({because})" if because else how

    def fill_stack(
        self, proposal: Proposal, info: ParameterInfo, request: Request, members: range, *, because: str = ""
    ) -> None:
        """`fill` for M members, with values `[M, *shape]`; those of the first for all if the request shares noise."""
        self.fill(proposal, info, replace(request, member=members.start), because=because)
        if info.name not in proposal.values:
            return
        stack = proposal.values[info.name].repeat(len(members), *(1 for _ in info.shape))
        if info.role not in CONSTANT_ROLES and not request.shared_noise:
            for row, member in zip(stack[1:], members[1:], strict=True):
                row.copy_(cast(Tensor, self.value(info, request.seed, member)[0]))
        proposal.values[info.name] = stack


HE = Pointwise("he", normal(_he))

_KAIMING = "He et al., ICCV 2015, arXiv 1502.01852"
_GLOROT = "Glorot and Bengio, AISTATS 2010"
_LECUN = "LeCun et al., Efficient BackProp, 1998"
_SAXE = "Saxe et al., 2013, arXiv 1312.6120"
_OUTPUTS = "outputs counted per group"

for _initialiser, _paper, _summary in (
    (HE, _KAIMING, "normal, variance 2 / fan-in"),
    (Pointwise("he-uniform", _uniform(_he)), _KAIMING, "uniform, variance 2 / fan-in"),
    (Pointwise("he-truncated", _cut_normal(_he)), _KAIMING, "normal cut at twice its std, variance 2 / fan-in still"),
    (Pointwise("he-out", normal(_he_out)), _KAIMING, f"normal, variance 2 / fan-out, {_OUTPUTS}"),
    (Pointwise("he-out-uniform", _uniform(_he_out)), _KAIMING, f"uniform, variance 2 / fan-out, {_OUTPUTS}"),
    (Pointwise("xavier", normal(_xavier)), _GLOROT, "normal, variance 2 / (fan-in + fan-out)"),
    (Pointwise("xavier-uniform", _uniform(_xavier)), _GLOROT, "uniform, variance 2 / (fan-in + fan-out)"),
    (Pointwise("lecun", normal(_lecun)), _LECUN, "normal, variance 1 / fan-in"),
    (Pointwise("lecun-uniform", _uniform(_lecun)), _LECUN, "uniform, variance 1 / fan-in"),
    (Pointwise("trunc-normal", _truncated), "", f"truncated normal, std {TABLE_STD} whatever the fan"),
    (Pointwise("orthogonal", _orthogonal), _SAXE, "orthogonal rows or columns, gain sqrt 2"),
):  # fmt: skip
    register(_initialiser.name, kind=Kind.POINTWISE, paper=_paper, summary=_summary)(lambda made=_initialiser: made)
