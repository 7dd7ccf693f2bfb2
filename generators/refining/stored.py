"""Weights as they are stored, and as the matrices that they stand for."""

from __future__ import annotations

from inspect import getattr_static

from torch import Tensor, nn

from generators.inventory import ParameterInfo, Role


def is_computed(model: nn.Module, info: ParameterInfo) -> bool:
    """Whether the owner of `info` has a weight that it computes from parameters (weight norm, spectral norm, pruning).

    What such a parameter is multiplied with need not come through to the weight. The weight is not computed to find
    out: that of spectral norm would take a step of its power iteration.
    """
    return getattr_static(model.get_submodule(info.module), "weight", None) is not None


def outputs_first(value: Tensor, info: ParameterInfo) -> Tensor:
    """`value` with the axes of outputs and inputs swapped if it is stored input-first; its own inverse.

    A transposed convolution `[I, O / g, *kernel]` of g groups turns into `[O, I / g, *kernel]`.
    """
    if not info.transposed:
        return value
    return value.unflatten(0, (info.groups, -1)).transpose(1, 2).flatten(0, 1)


def matrices(value: Tensor, info: ParameterInfo) -> Tensor:
    """The weight as `[B, n, m]`: B stacked matrices (`blocks`) of n outputs with m inputs each.

    Every kernel position is an input of its own. The groups of a convolution are not told apart: column j holds the
    j-th inputs of all groups. Of one matrix per head or expert, the last two axes are n and m, whichever is which.
    """
    rows = outputs_first(value, info)
    by_head = info.role is Role.LINEAR_WEIGHT and value.ndim == 3 and info.blocks == value.shape[0]
    inputs = value.shape[2] if by_head else rows[0].numel()
    return rows.reshape(info.blocks, value.numel() // (info.blocks * inputs), inputs)
