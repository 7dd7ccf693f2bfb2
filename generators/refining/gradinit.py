"""GradInit (Zhu, Ni, Xu, Kong, Huang, Goldstein, NeurIPS 2021, arXiv 2102.08098, equation 1).

Scales with which the loss is low after one step of an optimiser, within a bound of the gradient norm:

    L(S~; theta - eta A[g]) / eta,    g = grad L(S; theta),    S~ half of S and a fresh half
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from generators.batches import map_tensors
from generators.errors import DataError, unknown_name
from generators.functional import size_of
from generators.gradients import norms_of
from generators.initialiser import Kind, register
from generators.refining.scales import Point, ScaleOptimiser


def _normalised(gradient: Tensor) -> Tensor:
    return gradient / norms_of(gradient[None]).clamp_min(torch.finfo(gradient.dtype).tiny)


STEPS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "sgd": (lambda gradient: gradient, 2.0),
    "normalised": (_normalised, 2.0),
    "adam": (torch.sign, 1.0),
}
"""The step A[g] of each optimiser, and the order of the gradient norm that is bounded with it."""


def half_fresh(batch: Any, following: Any) -> Any:
    """The first half of `batch` and the first examples of `following`, as many as `batch` if it has them.

    Raises:
        DataError: they do not fit together.
    """
    size = size_of(batch)
    others: list[Tensor] = []
    map_tensors(others.append, following)
    fresh = iter(others)

    def mixed(value: Tensor) -> Tensor:
        other = next(fresh)
        if not value.ndim or len(value) != size:
            return value
        return torch.cat((value[: size // 2], other[: size - size // 2].to(value.device)))

    try:
        return map_tensors(mixed, batch)
    except (RuntimeError, StopIteration) as error:
        raise DataError(
            f"gradinit mixes halves of two batches, which differ in shape or form ({error}); pad them to one shape"
        ) from error


@dataclass(frozen=True)
class GradInit(ScaleOptimiser):
    """Lowers the loss after one detached step: the scales move the weights it starts from, not the step.

    The defaults are the authors' for a VGG-19 without batch norm on CIFAR-10; with batch norm, `learning_rate=0.1`. For
    training with Adam they use `step="adam", eta=1e-3, gamma=1000`.

    Attributes:
        step: A, a key of `STEPS`; "adam" is its first step, and bounds the l1 norm.
        eta: size of the step.
    """

    learning_rate: float = 0.01
    iterations: int = 390
    gamma: float = 1.0
    step: str = "normalised"
    eta: float = 0.1

    name: ClassVar[str] = "gradinit"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step not in STEPS:
            raise unknown_name("step of gradinit", self.step, STEPS)

    def norm(self, gradients: Tensor) -> Tensor:
        return norms_of(gradients, STEPS[self.step][1]).mean()

    def value(self, point: Point, gradients: Tensor) -> Tensor:
        step = point.network.unflattened(self.eta * STEPS[self.step][0](gradients[0]).detach())
        moved = {name: value - step[name] for name, value in point.weights.items()}
        return point.network.loss(moved, half_fresh(point.batch, point.following)) / self.eta


register(
    "gradinit", kind=Kind.REFINING, needs=("data", "loss"), paper="Zhu et al., NeurIPS 2021, arXiv 2102.08098",
    summary="scales with which the loss is low after one step of the optimiser",
)(GradInit)  # fmt: skip
