"""Decoded matrices written where they are to be: product, scale and noise in blocks that stay in the cache.

For a target of O rows and K columns, with factors `left` `[O, R]` and `right` `[R, K]`, what is written is

    W = scale * left @ right + noise_scale * eps,      eps ~ N(0, 1)

A product of so few inner columns is bound by memory, so a block is scaled and mixed before it leaves the cache.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

NUMBERS_IN_CACHE = 2**17  # of a block
DRAWN_TOGETHER = 16  # torch draws normal numbers in sixteens


def storage(shapes: dict[str, tuple[int, ...]], members: int, *, like: Tensor) -> dict[str, Tensor]:
    """Memory for weights, name to `[members, *shape]`, in one array of the device and data type of `like`.

    Large arrays of numpy lie on huge pages, which the operating system has ready sooner.
    """
    sizes = [members * math.prod(shape) for shape in shapes.values()]
    if like.device.type == "cpu" and like.dtype == torch.float32:
        array = torch.from_numpy(np.empty(sum(sizes), dtype=np.float32))
    else:
        array = torch.empty(sum(sizes), dtype=like.dtype, device=like.device)
    parts = zip(shapes.items(), array.split(sizes), strict=True)
    return {name: part.view(members, *shape) for (name, shape), part in parts}


@functools.lru_cache(maxsize=1024)
def row_blocks(rows: int, columns: int, numbers: int) -> tuple[slice, ...]:
    """The rows of a matrix in blocks of about so many numbers.

    All blocks but the last hold a multiple of sixteen numbers, and the last no fewer than sixteen, so that normal
    numbers drawn block by block are those that are drawn for the whole.
    """
    step = DRAWN_TOGETHER // math.gcd(DRAWN_TOGETHER, columns)
    step *= max(1, numbers // (step * columns))
    starts = list(range(0, rows, step))
    if len(starts) > 1 and (rows - starts[-1]) * columns < DRAWN_TOGETHER:
        starts.pop()
    return tuple(slice(start, end) for start, end in zip(starts, [*starts[1:], rows], strict=True))


def write(
    matrix: Tensor, left: Tensor | None, right: Tensor, *, scale: float, noise_scale: float = 0.0,
    draws: torch.Generator | None = None,
) -> None:  # fmt: skip
    """Fill `matrix` as the module docstring says.

    Args:
        matrix: `[O, K]`.
        left: `[O, R]`, or None for a target that is no product.
        right: `[R, K]`, or the whole `[O, K]`.
        scale: of the decoded part.
        noise_scale: of the noise.
        draws: where the noise comes from, on the CPU; None for no noise.
    """
    on_host = matrix.device.type == "cpu" and matrix.dtype == torch.float32
    in_place = on_host and matrix.is_contiguous()  # where noise can be drawn as it is
    for block in row_blocks(*matrix.shape, NUMBERS_IN_CACHE):
        part = matrix[block]
        if draws is not None:
            eps = part if in_place else torch.empty(part.shape, device="cpu")
            part.copy_(eps.normal_(std=noise_scale, generator=draws))  # onto itself costs nothing
        elif left is None:
            part.zero_()
        if left is None:
            part.add_(right[block], alpha=scale)
        else:
            part.addmm_(left[block], right, beta=float(draws is not None), alpha=scale)
