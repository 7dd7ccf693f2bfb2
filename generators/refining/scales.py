"""The scale optimiser: one factor per weight tensor, fitted on batches of data by an objective that looks at gradients.

    theta_p = alpha_p theta0_p,    minimise over alpha:  the norm of the gradient   where that exceeds gamma,
                                                         the objective              elsewhere

The directions theta0_p stay; tensors of zeros cannot be moved. NIO, GradInit and MetaInit differ in the objective alone
(`nio`, `gradinit` and `metainit`). The update is Adam on the alphas as in the code of NIO's and GradInit's authors:
gradients clipped, first moments and counters of their own for the two kinds of iteration, one second moment for both.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from generators.errors import ConfigError, ModelError
from generators.functional import Functional, Weights, cycled
from generators.gradients import cosine_and_norms, norms_of, part_gradients, ranges
from generators.initialiser import Kind, Proposal, Request
from generators.inventory import BIAS_ROLES
from generators.seeds import isolated


class SharedAdam:
    """Adam (Kingma and Ba 2015) for two kinds of gradients that share the second moment.

    Its bias correction counts the steps of both kinds.
    """

    def __init__(self, learning_rate: float, clip: float, betas: tuple[float, float], epsilon: float = 1e-8) -> None:
        self._rate, self._clip, self._betas, self._epsilon = learning_rate, clip, betas, epsilon
        self._first: dict[bool, Tensor] = {}
        self._second: Tensor | None = None
        self.counts: Counter[bool] = Counter()

    def step(self, gradient: Tensor, *, constraint: bool) -> Tensor:
        """What to subtract, given the `gradient` of the constraint, or else of the objective."""
        gradient = gradient.clamp(-self._clip, self._clip)
        zeros = torch.zeros_like(gradient)
        self.counts[constraint] += 1
        first = self._first.get(constraint, zeros).lerp(gradient, 1.0 - self._betas[0])
        second = (zeros if self._second is None else self._second).lerp(gradient.square(), 1.0 - self._betas[1])
        self._first[constraint], self._second = first, second
        mean = first / (1.0 - self._betas[0] ** self.counts[constraint])
        spread = (second / (1.0 - self._betas[1] ** self.counts.total())).sqrt()
        return self._rate * mean / (spread + self._epsilon)


@dataclass(frozen=True)
class Point:
    """Where an objective is evaluated.

    Attributes:
        network: the loss as a function of weights.
        weights: the scaled ones, with a graph to the scales.
        batch: the batch of this iteration.
        following: that of the next.
    """

    network: Functional
    weights: Weights
    batch: Any
    following: Any


@dataclass(frozen=True)
class ScaleOptimiser(ABC):
    """Base of the refining initialisers that fit one scale per tensor; a subclass is an objective.

    Dropout is off and batch norm uses the statistics of the batch at hand. Tied parameters have one scale, frozen ones
    and tensors of zeros none.

    Attributes:
        learning_rate: of the scales.
        iterations: updates of the scales.
        gamma: bound of the gradient norm; iterations above it lower that instead of the objective.
        clip: largest gradient of a scale.
        least: lower bound of the scales of weights; that of biases is 0.
        betas: decay of the moments of Adam.
        parts: how many parts a batch is cut into for GradCosine.
        overlap: share of its length by which a part reaches into its neighbours.
    """

    learning_rate: float = 0.05
    iterations: int = 100
    gamma: float = 5.0
    clip: float = 1.0
    least: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    parts: int = 2
    overlap: float = 0.0

    name: ClassVar[str]
    kind: ClassVar[Kind] = Kind.REFINING
    needs: ClassVar[tuple[str, ...]] = ("data", "loss")
    derivatives: ClassVar[int] = 2  # how many times the loss is differentiated

    def __post_init__(self) -> None:
        ranges(self.parts, self.parts, self.overlap)
        if self.iterations < 1 or self.learning_rate <= 0.0:
            raise ConfigError(
                f"{self.name}: iterations and learning_rate must be positive, got {self.iterations} and "
                f"{self.learning_rate}"
            )

    def gradients(self, point: Point) -> Tensor:
        """The gradients `[D, P]` that the constraint bounds, with their graph; P numbers in all weights together."""
        return point.network.gradient(point.weights, point.batch, graph=True)[None]

    def norm(self, gradients: Tensor) -> Tensor:
        """What the constraint bounds, a scalar."""
        return norms_of(gradients).mean()

    @abstractmethod
    def value(self, point: Point, gradients: Tensor) -> Tensor:
        """What an iteration within the constraint lowers, a scalar with a graph to `point.weights`."""

    def propose(self, model: nn.Module, request: Request) -> Proposal:
        """Scaled values of every trainable tensor that is not zero."""
        network = Functional(model, cast(Callable, request.loss), request.inventory, self.name)
        if not network.weights:
            raise ModelError(
                f"{self.name}: no parameter of the model is trainable, so there is nothing to scale; unfreeze some, or "
                "pass frozen=True"
            )
        movable = [name for name, value in network.weights.items() if value.any()]
        if not movable:
            raise ModelError(
                f"{self.name}: every trainable tensor of the model is zero, so scales change nothing; "
                f"fill it first, as in 'he+{self.name}'"
            )
        biases = {info.name for info in request.inventory if info.role in BIAS_ROLES}
        bounds = [0.0 if name in biases else self.least for name in movable]
        with network.differentiable(self.derivatives), isolated(request.seed, self.name, request.member):
            scales, figures = self._fit(network, movable, bounds, cast(Iterable, request.data))
        proposal = Proposal(figures=figures)
        for name, scale in scales.items():
            proposal.values[name] = network.weights[name].detach() * scale
            proposal.sources[name] = f"{self.name}: scaled"
            proposal.statistics[name] = {"scale": scale}
        for name in network.weights.keys() - scales.keys():
            proposal.kept[name] = f"zero, which {self.name} cannot scale"
        if figures["gradient_norm_before"] == 0.0:
            proposal.notes.append(f"{self.name}: the gradient is zero at the start, so nothing was done")
        return proposal

    def _fit(
        self, network: Functional, movable: list[str], bounds: list[float], data: Iterable
    ) -> tuple[dict[str, float], dict[str, float]]:
        """The scales of the `movable` weights, bounded below, and figures of the way there."""
        start = {name: value.requires_grad_(name not in movable) for name, value in network.weights.items()}
        scales = torch.ones(len(movable), device=start[movable[0]].device)
        least = torch.tensor(bounds, device=scales.device)
        adam = SharedAdam(self.learning_rate, self.clip, self.betas)

        def weights(scales: Tensor) -> Weights:
            return start | {name: scale * start[name] for name, scale in zip(movable, scales.unbind(), strict=True)}

        def figures(when: str) -> dict[str, float]:
            gradients = part_gradients(network, weights(scales.requires_grad_()), first, self.parts, self.overlap)
            cosine, norms = cosine_and_norms(gradients)
            return {f"grad_cosine_{when}": cosine.item(), f"gradient_norm_{when}": norms.mean().item()}

        batches = cycled(data, self.name)
        first = next(batches)
        before = figures("before")
        pairs = itertools.pairwise(itertools.chain([first], batches))
        alive = before["gradient_norm_before"] > 0.0
        for batch, following in itertools.islice(pairs, self.iterations if alive else 0):
            point = Point(network, weights(scales.requires_grad_()), batch, following)
            gradients = self.gradients(point)
            norm = self.norm(gradients)
            constraint = bool(norm > self.gamma)
            slope = network.derivative(norm if constraint else self.value(point, gradients), [scales])
            if not slope.isfinite().all():
                raise ModelError(
                    f"{self.name}: the gradient of the scales is not finite after {adam.counts.total()} iterations "
                    f"(gradient norm {norm.item():.3g}); start from a saner scale, as in 'he+lsuv+{self.name}', or use "
                    "a smaller learning_rate"
                )
            scales = torch.maximum(scales.detach() - adam.step(slope, constraint=constraint), least)
        counts = {"iterations": float(adam.counts.total()), "constraint_iterations": float(adam.counts[True])}
        return dict(zip(movable, scales.tolist(), strict=True)), {**counts, **before, **figures("after")}
