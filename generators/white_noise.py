"""White noise in the place of data, for what only has to know how large activations become."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from generators.batches import map_tensors
from generators.graph.inputs import Inputs
from generators.seeds import stream

FEWEST, MOST, NUMBERS = 2, 64, 2**19  # inputs, and numbers in them all


def white_noise(example: Inputs) -> Iterator[Inputs]:
    """Inputs like the example with real numbers N(0, 1), always the same, and all others as they are.

    Of one tensor first more, or fewer, along its first axis; then, should a model not take that, as the example has.
    Nothing if there are no real numbers, or others whose values are not known.
    """
    tensors: list[Tensor] = []
    map_tensors(tensors.append, [example.args, dict(example.kwargs)])
    if not any(value.is_floating_point() for value in tensors):
        return
    if any(value.is_meta and not value.is_floating_point() for value in tensors):
        return

    def noise(count: int | None) -> Inputs:
        draws = stream(0, "white-noise")

        def drawn(value: Tensor) -> Any:
            if not value.is_floating_point():
                return value
            shape = value.shape if count is None else (count, *value.shape[1:])
            return torch.randn(shape, generator=draws).to(value.dtype)

        return Inputs(map_tensors(drawn, example.args), map_tensors(drawn, dict(example.kwargs)))

    if len(tensors) == 1 and tensors[0].ndim > 1:
        each = max(1, math.prod(tensors[0].shape[1:]))
        yield noise(min(MOST, max(FEWEST, NUMBERS // each)))
    yield noise(None)
