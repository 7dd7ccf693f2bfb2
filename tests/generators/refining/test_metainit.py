"""MetaInit: the gradient quotient against an explicit Hessian, and that it falls."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian

from generators.filling import init
from generators.functional import Functional
from generators.inventory import inventory
from generators.refining.metainit import MetaInit, gradient_quotient
from generators.refining.scales import Point
from small_digits import deep_mlp, digit_batches, digits


def _quotient(model: nn.Module, batch: tuple, epsilon: float = 1e-5) -> float:
    network = Functional(model, F.cross_entropy, inventory(model), "test")
    method = MetaInit(epsilon=epsilon)
    with network.differentiable(method.derivatives):
        point = Point(network, {key: value.requires_grad_() for key, value in network.weights.items()}, batch, batch)
        return method.value(point, method.gradients(point)).item()


def test_against_an_explicit_hessian() -> None:
    """A network of 83 weights in float64: GQ with the product of the whole Hessian and the gradient, to 1e-10."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    images, labels = digits(32)
    batch = (images[:, 18:22].double(), labels % 3)
    shapes = {name: value.shape for name, value in model.named_parameters()}

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes.values()])
        weights = {name: part.view(shape) for part, (name, shape) in zip(parts, shapes.items(), strict=True)}
        return F.cross_entropy(functional_call(model, weights, (batch[0],)), batch[1])

    vector = torch.cat([value.detach().flatten() for value in model.parameters()])
    gradient, matrix = torch.func.grad(loss)(vector), hessian(loss)(vector)
    signs = torch.where(gradient >= 0, 1.0, -1.0)
    expected = ((gradient - matrix @ gradient) / (gradient + 1e-5 * signs) - 1).abs().mean().item()
    assert len(vector) == 83
    assert _quotient(model, batch) == pytest.approx(expected, rel=1e-10)


def test_quotient_of_zeros_is_finite() -> None:
    zeros = torch.zeros(3)
    assert gradient_quotient(zeros, zeros, 1e-5) == 1.0


@pytest.mark.parametrize("build", [deep_mlp, lambda: nn.Sequential(nn.BatchNorm1d(64), deep_mlp(3))])
def test_the_quotient_falls(build) -> None:
    """From He weights times 1.5, batch norm included, in 30 iterations on one batch: to less than half."""
    model, data = build(), digit_batches(128, 128)
    init(model, "he", seed=0)
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(1.5)
    before = _quotient(model, data[0])
    report = init(model, MetaInit(iterations=30, learning_rate=0.05), data=data, loss=F.cross_entropy)
    assert report.figures["metainit"]["constraint_iterations"] == 0
    assert _quotient(model, data[0]) < 0.5 * before
