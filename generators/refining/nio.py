"""NIO, neural initialisation optimisation (Yang, Wang, Yuan, Lin, NeurIPS 2022, arXiv 2210.05956).

Scales that raise GradCosine, the agreement of the gradients of parts of a batch (`generators.gradients`), within a
bound of their mean norm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from generators.errors import unknown_name
from generators.gradients import cosine_and_norms, part_gradients
from generators.initialiser import Kind, register
from generators.refining.scales import Point, ScaleOptimiser

OBJECTIVES: dict[str, Callable[[Tensor], Tensor | float]] = {
    "gc": lambda norms: 0.0,
    "gc_gn": lambda norms: norms.square().sum(),
    "gc_gn_sqrt": lambda norms: norms.sum(),
}
"""What is raised besides GradCosine, of the gradient norms `[D]` of the parts."""


@dataclass(frozen=True)
class NIO(ScaleOptimiser):
    """Lowers `-C - norm_weight * r(N_1, ..., N_D)`, C the GradCosine of D parts and N_d the gradient norms.

    The defaults are those of the authors' code; its settings for a ResNet-50 on ImageNet are `learning_rate=0.003,
    gamma=10, parts=4, overlap=0.2, objective="gc_gn_sqrt"` with batches of 64. Their gradients leave out batch norm;
    here, as in the paper's formula, they have every trainable parameter.

    Attributes:
        objective: r, a key of `OBJECTIVES`.
        norm_weight: weight of r.
    """

    objective: str = "gc"
    norm_weight: float = 1.0

    name: ClassVar[str] = "nio"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective not in OBJECTIVES:
            raise unknown_name("objective of nio", self.objective, OBJECTIVES)

    def gradients(self, point: Point) -> Tensor:
        return part_gradients(point.network, point.weights, point.batch, self.parts, self.overlap, graph=True)

    def value(self, point: Point, gradients: Tensor) -> Tensor:
        cosine, norms = cosine_and_norms(gradients)
        return -cosine - self.norm_weight * OBJECTIVES[self.objective](norms)


register(
    "nio", kind=Kind.REFINING, needs=("data", "loss"), paper="Yang et al., NeurIPS 2022, arXiv 2210.05956",
    summary="scales that make the gradients of parts of a batch agree",
)(NIO)  # fmt: skip
