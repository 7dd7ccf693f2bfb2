"""Pointwise initialisers that place zeros: sparse, Dirac and delta-orthogonal matrices.

A weight is seen as one matrix per group and kernel position, outputs x inputs, however it is stored; everything else
(biases, norm scales, tables) is as in `generators.pointwise`. A weight that a rule does not cover is made by `he`, and
the report says why.

- `sparse` (Martens, ICML 2010): each output has 15 incoming connections, drawn among its inputs (channels x kernel
  positions), and the rest are 0. Zeros per output are the paper's; `torch.nn.init.sparse_` places them per input, and
  by the global random state. The paper draws from N(0, 1), for sigmoids; the variance 2 / 15 here, that of He for the
  inputs that are left, is ours.
- `dirac` (`torch.nn.init.dirac_`): in every group, output i is input i, at the centre of the kernel (at k // 2, as
  torch has it, where k is even); the rest are 0. Linear layers, and each of stacked matrices, are the identity. There
  are no draws: all seeds and members are equal.
- `delta-orthogonal` (Xiao et al., ICML 2018, arXiv 1806.05393, section 4): an orthogonal matrix at the centre of the
  kernel and 0 elsewhere, for each group; linear layers are orthogonal. Its columns are orthonormal up to the gain, so
  that the norm of the input is kept. The paper asks for at least as many outputs as inputs; with fewer, its rows are
  orthonormal. The gain is sqrt 2, that of `orthogonal`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from generators.initialiser import Kind, register
from generators.inventory import ParameterInfo
from generators.pointwise import Pointwise

CONNECTIONS = 15  # incoming ones of a unit, as in the paper


def by_unit(block: Tensor, info: ParameterInfo) -> Tensor:
    """A view of one matrix as `[G, O, I, K]`: G groups, each with O outputs, I inputs and K kernel positions.

    Args:
        block: the matrix as torch stores it, or one of `info.blocks` stacked ones.
        info: the parameter.
    """
    if info.kernel:
        groups = block.reshape(info.groups, len(block) // info.groups, *block.shape[1:]).flatten(3)
        return groups.transpose(1, 2) if info.transposed else groups
    if block.ndim == 3 and block[:1].numel() != info.fan_in:  # one matrix per head or expert
        block = block[0]
        turned = block.shape == (info.fan_in, info.fan_out) != (info.fan_out, info.fan_in)
    else:
        block, turned = block.flatten(1), info.transposed
    return (block.T if turned else block)[None, :, :, None]


def _centre(info: ParameterInfo) -> int:
    """Index of the middle of the flattened kernel."""
    index = 0
    for size in info.kernel:
        index = index * size + size // 2
    return index


def _other_layout(info: ParameterInfo) -> str:
    """What a convolution that stores its kernel in a way of its own lacks."""
    area = max(math.prod(info.kernel), 1)
    outputs, inputs = info.fan_out // area, info.fan_in // area
    sides = (inputs * info.groups, outputs) if info.transposed else (outputs * info.groups, inputs)
    return "its kernel is stored in a layout of its own" if info.kernel and info.shape != (*sides, *info.kernel) else ""


def _no_centre(info: ParameterInfo) -> str:
    """What keeps a convolution from having an orthogonal matrix at its centre."""
    if any(size % 2 == 0 for size in info.kernel):
        return "a kernel of even size has no centre"
    if info.groups > 1 and info.fan_in == math.prod(info.kernel):
        return "a depthwise convolution has no matrix to make orthogonal"
    return _other_layout(info)


def _sparse(block: Tensor, info: ParameterInfo, generator: torch.Generator) -> None:
    view = by_unit(block, info)
    groups, outputs, inputs, positions = view.shape
    units, fan_in = groups * outputs, inputs * positions
    count = min(CONNECTIONS, fan_in)
    chosen = torch.rand(units, fan_in, generator=generator).topk(count, dim=1).indices
    weights = torch.randn(units, count, generator=generator) * math.sqrt(2.0 / max(count, 1))
    view.copy_(torch.zeros(units, fan_in).scatter_(1, chosen, weights).reshape(view.shape))


def _dirac(block: Tensor, info: ParameterInfo, generator: torch.Generator) -> None:
    by_unit(block.zero_(), info)[..., _centre(info)].diagonal(dim1=1, dim2=2).fill_(1.0)


def _delta_orthogonal(block: Tensor, info: ParameterInfo, generator: torch.Generator) -> None:
    for matrix in by_unit(block.zero_(), info)[..., _centre(info)]:
        matrix.copy_(nn.init.orthogonal_(torch.empty(matrix.shape), math.sqrt(2.0), generator=generator))


for _initialiser, _paper, _summary in (
    (
        Pointwise("sparse", _sparse, lacks=_other_layout), "Martens, ICML 2010",
        f"{CONNECTIONS} normal weights per output, variance 2 / {CONNECTIONS}, rest 0; he for kernels of other layouts",
    ),
    (
        Pointwise("dirac", _dirac, lacks=_other_layout), "",
        "identity: output i of a group is input i, no draws; he for kernels of other layouts",
    ),
    (
        Pointwise("delta-orthogonal", _delta_orthogonal, lacks=_no_centre), "Xiao et al., ICML 2018, arXiv 1806.05393",
        "orthogonal at the kernel's centre, gain sqrt 2, linear layers orthogonal; he for even and depthwise kernels",
    ),
):  # fmt: skip
    register(_initialiser.name, kind=Kind.POINTWISE, paper=_paper, summary=_summary)(lambda made=_initialiser: made)
