"""Strength stabilisation (Scabini, De Baets and Bruno, 2022, arXiv 2207.08148): of many draws, the most even one.

For every matrix K draws of a pointwise initialiser are made, and the one is kept whose neuron strengths (sums of
weights, `generators.refining.rewiring`) vary least. The paper rewires what it has stabilised: `"he-stabilised+rewire"`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from generators.errors import ConfigError
from generators.initialiser import Kind, Proposal, Request, register
from generators.inventory import MATRIX_ROLES, ParameterInfo
from generators.pointwise import HE, Pointwise
from generators.refining.rewiring import full_precision, strength_variances
from generators.refining.stored import matrices
from generators.seeds import derive


@dataclass(frozen=True)
class Stabilised:
    """`base`, with the best of `draws` draws for every matrix. The first draw is what `base` alone would give.

    Attributes:
        base: makes the draws, and everything that is no matrix.
        draws: K; they cost K times as much as `base`.

    Raises:
        ConfigError: `draws` is not positive.
    """

    base: Pointwise = HE
    draws: int = 100
    kind: Kind = Kind.POINTWISE

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ConfigError(f"draws={self.draws}: {self.name} needs one draw at least")

    @property
    def name(self) -> str:
        """Such as "he-stabilised"."""
        return f"{self.base.name}-stabilised"

    def propose(self, model: nn.Module, request: Request) -> Proposal:
        """What `base` proposes, with other matrices; `statistics` have the `strength_variance` that was least."""
        proposal = self.base.propose(model, request)
        for info in request.inventory:
            if info.role not in MATRIX_ROLES or info.name not in proposal.values or not info.numel:
                continue
            variance, best = self._least(info, request)
            proposal.values[info.name] = best
            proposal.sources[info.name] = f"{self.name}: the most even of {self.draws} draws"
            proposal.statistics[info.name] = {"strength_variance": variance}
        return proposal

    def _least(self, info: ParameterInfo, request: Request) -> tuple[float, Tensor]:
        """The draw of least strength variance, after that variance."""
        draws = (self.draw(info, request.seed, request.member, number) for number in range(self.draws))
        return min(((strength_variance(value, info), value) for value in draws), key=lambda pair: pair[0])

    def draw(self, info: ParameterInfo, seed: int, member: int, number: int) -> Tensor:
        """Draw `number` of the matrix `info`."""
        root = derive(seed, "stabilised", number) if number else seed
        value, _ = self.base.value(info, root, member)
        assert value is not None  # a matrix
        return value


def strength_variance(value: Tensor, info: ParameterInfo) -> float:
    """Mean of the variances of input and of output strengths."""
    return sum(strength_variances(full_precision(matrices(value, info)))) / 2


register(
    "he-stabilised", kind=Kind.POINTWISE, paper="Scabini et al., 2022, arXiv 2207.08148",
    summary="of 100 He draws per matrix, the one whose sums of rows and columns vary least",
)(Stabilised)  # fmt: skip
