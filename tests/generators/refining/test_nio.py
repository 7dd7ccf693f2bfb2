"""NIO: its objectives against slow references, the constraint, and what it makes of a deep network on digits."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import generators
from generators.errors import UnknownNameError
from generators.filling import init
from generators.functional import Functional
from generators.inventory import inventory
from generators.refining.nio import NIO, OBJECTIVES
from generators.refining.scales import Point
from small_digits import deep_mlp, digit_batches


@dataclass(frozen=True)
class Watched(NIO):
    """Keeps the mean gradient norm of every iteration."""

    norms: list[float] = field(default_factory=list)

    def norm(self, gradients: Tensor) -> Tensor:
        norm = super().norm(gradients)
        self.norms.append(norm.item())
        return norm


def _exploding() -> nn.Sequential:
    model = deep_mlp()
    init(model, "he", seed=0)
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(1.5)
    return model


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_against_a_slow_reference(objective: str) -> None:
    torch.manual_seed(0)
    model, (batch,) = deep_mlp(2), digit_batches(128, 128)
    gradients = []
    for part in (slice(0, 76), slice(51, 128)):
        model.zero_grad()
        F.cross_entropy(model(batch[0][part]), batch[1][part]).backward()
        gradients.append(torch.cat([value.grad.flatten() for value in model.parameters()]))
    first, second = (gradient.norm() for gradient in gradients)
    bonus = {"gc": 0.0, "gc_gn": first**2 + second**2, "gc_gn_sqrt": first + second}[objective]
    expected = -F.cosine_similarity(*gradients, dim=0) - 0.5 * bonus
    method = NIO(objective=objective, norm_weight=0.5, overlap=0.2)
    network = Functional(model, F.cross_entropy, inventory(model), "test")
    with network.differentiable():
        point = Point(network, {key: value.requires_grad_() for key, value in network.weights.items()}, batch, batch)
        found = method.value(point, method.gradients(point))
    torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-5)


def test_a_tiny_bound_leaves_constraint_steps_only() -> None:
    """The mean gradient norm, averaged over five iterations, falls all the way."""
    method = Watched(gamma=1e-6, learning_rate=0.02, iterations=30)
    figures = init(_exploding(), method, data=digit_batches(128, 128), loss=F.cross_entropy).figures["nio"]
    assert figures["constraint_iterations"] == figures["iterations"] == len(method.norms) == 30
    moving = torch.tensor(method.norms).unfold(0, 5, 1).mean(1)
    assert (moving.diff() < 0).all()
    assert figures["gradient_norm_after"] < 0.01 * figures["gradient_norm_before"]


def test_without_a_bound_the_cosine_does_not_fall() -> None:
    torch.manual_seed(0)
    method = NIO(gamma=float("inf"), learning_rate=0.01, iterations=40)
    figures = init(deep_mlp(), method, data=digit_batches(128, 128), loss=F.cross_entropy).figures["nio"]
    assert figures["constraint_iterations"] == 0
    assert figures["grad_cosine_after"] >= figures["grad_cosine_before"] - 1e-4


def test_invariance_trap() -> None:
    """Without biases, scale that moves from one layer to another leaves the function, but not the gradients."""
    torch.manual_seed(0)
    model, data = deep_mlp(3, bias=False), digit_batches(128, 128)
    outputs, before = model(data[0][0]), generators.grad_cosine(model, data, F.cross_entropy)
    with torch.no_grad():
        model[0].weight.mul_(4.0)
        model[4].weight.div_(4.0)
    after = generators.grad_cosine(model, data, F.cross_entropy)
    torch.testing.assert_close(model(data[0][0]), outputs, rtol=1e-4, atol=1e-5)
    assert after.gradient_norm > 1.5 * before.gradient_norm
    assert abs(after.cosine - before.cosine) > 0.01


def test_figures_are_those_of_grad_cosine() -> None:
    model, data = _exploding(), digit_batches(128, 128)
    before = generators.grad_cosine(model, data, F.cross_entropy, parts=4, overlap=0.2)
    method = NIO(parts=4, overlap=0.2, iterations=10, objective="gc_gn_sqrt")
    figures = init(model, method, data=data, loss=F.cross_entropy).figures["nio"]
    after = generators.grad_cosine(model, data, F.cross_entropy, parts=4, overlap=0.2)
    assert figures["grad_cosine_before"] == pytest.approx(before.cosine, abs=1e-5)
    assert figures["gradient_norm_before"] == pytest.approx(before.gradient_norm, rel=1e-4)
    assert figures["grad_cosine_after"] == pytest.approx(after.cosine, abs=1e-3)
    assert figures["gradient_norm_after"] == pytest.approx(after.gradient_norm, rel=1e-3)


def test_an_exploding_network_learns_afterwards() -> None:
    """He times 1.5 on ten layers, 40 steps: chance without NIO (10 %), at least 50 % of the training digits with it."""

    def trained(model: nn.Module) -> float:
        data, optimiser = digit_batches(1280, 128), torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for images, labels in (data * 4)[:40]:
            optimiser.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimiser.step()
        return sum((model(images).argmax(1) == labels).float().mean().item() for images, labels in data) / len(data)

    with_nio = _exploding()
    method = NIO(learning_rate=0.01, gamma=3.0, overlap=0.2, objective="gc_gn_sqrt")
    init(with_nio, method, data=digit_batches(1280, 128), loss=F.cross_entropy)
    assert trained(with_nio) > 0.5 > 0.3 > trained(_exploding())


def test_unknown_objective() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'gc_gn'"):
        NIO(objective="gc_gm")
