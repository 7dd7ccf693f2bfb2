"""MetaInit (Dauphin and Schoenholz, "MetaInit: Initializing learning by learning to initialize", NeurIPS 2019).

Scales that lower the gradient quotient, how much a gradient step changes the gradient itself (equation 1):

    GQ = mean over the P entries of |(g - H g) / (g + epsilon sign(g)) - 1|,    sign(0) = 1

g the gradient of the loss and H its Hessian; up to epsilon that is |H g / g|. It is small where curvature
does not matter yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from generators.initialiser import Kind, register
from generators.refining.scales import Point, ScaleOptimiser


def gradient_quotient(gradient: Tensor, product: Tensor, epsilon: float) -> Tensor:
    """GQ of a gradient `[P]` and its product `[P]` with the Hessian."""
    guard = epsilon * ((gradient >= 0).to(gradient.dtype) * 2 - 1)
    return ((gradient - product) / (gradient + guard) - 1).abs().mean()


@dataclass(frozen=True)
class MetaInit(ScaleOptimiser):
    """Lowers the gradient quotient, unconstrained. An iteration takes three derivatives: at least nine training steps.

    Of the paper: number of iterations and epsilon. Unlike there, the scales of all tensors are fitted instead of the
    norms of those with two or more axes, Adam stands in for momentum of signs of gradients, and the batches are those
    of the task instead of Gaussian noise with random labels (which may be passed as data).

    Attributes:
        epsilon: keeps the quotient finite where the gradient is zero.
    """

    learning_rate: float = 0.01
    iterations: int = 500
    gamma: float = math.inf
    epsilon: float = 1e-5

    name: ClassVar[str] = "metainit"
    derivatives: ClassVar[int] = 3

    def value(self, point: Point, gradients: Tensor) -> Tensor:
        weights = list(point.weights.values())
        product = point.network.derivative(gradients.square().sum() / 2, weights, graph=True)
        return gradient_quotient(gradients[0], product, self.epsilon)


register(
    "metainit", kind=Kind.REFINING, needs=("data", "loss"), paper="Dauphin and Schoenholz, NeurIPS 2019",
    summary="scales that lower the change of the gradient by a gradient step",
)(MetaInit)  # fmt: skip
