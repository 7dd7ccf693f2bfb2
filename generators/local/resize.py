"""Kernels of one size from kernels of another.

Covariances of trained kernels carry over to other kernel sizes when they are interpolated (Trockman et al., arXiv
2210.03651). Interpolation alone makes kernels too smooth, and larger ones have no more directions than the small ones
had: 9 of 49 for 7x7 from 3x3. So half of the second moment is white noise.
"""

from __future__ import annotations

import torch
from torch import Tensor


def weights(old: int, new: int) -> Tensor:
    """Linear interpolation from `old` points to `new` ones over the same length, `[new, old]`; rows add up to 1.

    The tent that weighs the old points is as wide as their distance, or that of the new ones if it is larger.
    """
    places = (torch.arange(new) + 0.5) * (old / new) - 0.5
    tent = 1.0 - (places[:, None] - torch.arange(old)).abs() / max(old / new, 1.0)
    return tent.clamp_min(0) / tent.clamp_min(0).sum(1, keepdim=True)


def _root_mean_square(values: Tensor) -> Tensor:
    return values.square().mean().sqrt().clamp_min(torch.finfo(values.dtype).tiny)


def resized(slices: Tensor, shape: tuple[int, ...], draws: torch.Generator) -> Tensor:
    """Slices `[N, *shape]` from slices `[N, ...]` with as many axes, interpolated along each, with white noise.

    Both have the same second moment, taken over all slices.

    Args:
        slices: N slices of another shape.
        shape: the wanted shape.
        draws: of the noise.
    """
    smooth = slices
    for axis, size in enumerate(shape, start=1):
        # Products and sums by element are the same bits with any number of threads; a matrix product may not be.
        columns = zip(smooth.movedim(axis, -1).unbind(-1), weights(smooth.shape[axis], size).unbind(1), strict=True)
        smooth = torch.stack([column[..., None] * weight for column, weight in columns]).sum(0).movedim(-1, axis)
    noise = torch.randn(smooth.shape, generator=draws).to(smooth.device)
    mixed = smooth / _root_mean_square(smooth) + noise
    return mixed * (_root_mean_square(slices) / _root_mean_square(mixed))
