"""GradInit: the detached step against torch's optimisers, the constraint, and how batches are mixed."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generators.errors import DataError, UnknownNameError
from generators.filling import init
from generators.functional import Functional
from generators.inventory import inventory
from generators.refining.gradinit import STEPS, GradInit, half_fresh
from generators.refining.scales import Point
from small_digits import deep_mlp, digit_batches, digits


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return deep_mlp(2)


@pytest.fixture
def batches() -> tuple:
    return tuple(digit_batches(256, 128))


def _value(method: GradInit, model: nn.Module, batches: tuple, *, factor: Tensor | None = None) -> Tensor:
    """The objective at all scales `factor`, with a graph to it."""
    network = Functional(model, F.cross_entropy, inventory(model), "test")
    factor = torch.ones((), requires_grad=True) if factor is None else factor
    with network.differentiable():
        point = Point(network, {key: factor * value for key, value in network.weights.items()}, *batches)
        return method.value(point, method.gradients(point))


@pytest.mark.parametrize(("step", "optimiser"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)])
def test_the_step_is_that_of_torch(model: nn.Module, batches: tuple, step: str, optimiser: type) -> None:
    """Objective times eta against the loss of a copy after one step of the optimiser, to 1e-6."""
    eta = {"sgd": 0.1, "adam": 1e-3}[step]
    found = eta * _value(GradInit(step=step, eta=eta), model, batches)
    reference = copy.deepcopy(model)
    built = optimiser(reference.parameters(), lr=eta, **({"eps": 1e-12} if step == "adam" else {}))
    F.cross_entropy(reference(batches[0][0]), batches[0][1]).backward()
    built.step()
    images, labels = half_fresh(*batches)
    expected = F.cross_entropy(reference(images), labels)
    torch.testing.assert_close(found, expected, rtol=1e-5 if step == "adam" else 1e-6, atol=1e-6)


def test_the_normalised_step(model: nn.Module, batches: tuple) -> None:
    reference = copy.deepcopy(model)
    F.cross_entropy(reference(batches[0][0]), batches[0][1]).backward()
    gradients = [value.grad for value in reference.parameters()]
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    with torch.no_grad():
        for value, gradient in zip(reference.parameters(), gradients, strict=True):
            value.sub_(0.1 * gradient / norm)
    images, labels = half_fresh(*batches)
    torch.testing.assert_close(
        0.1 * _value(GradInit(), model, batches), F.cross_entropy(reference(images), labels), rtol=1e-6, atol=1e-6
    )


def test_without_a_step_it_is_plain_minimisation(model: nn.Module, batches: tuple) -> None:
    """For eta to 0 the gradient of the objective times eta is that of the loss with respect to the scales."""
    method, factor = GradInit(step="sgd", eta=1e-6), torch.tensor(1.1, requires_grad=True)
    (slope,) = torch.autograd.grad(method.eta * _value(method, model, batches, factor=factor), factor)
    images, labels = half_fresh(*batches)
    weights = {name: factor * value.detach() for name, value in model.named_parameters()}
    loss = F.cross_entropy(torch.func.functional_call(model, weights, (images,)), labels)
    torch.testing.assert_close(slope, torch.autograd.grad(loss, factor)[0], rtol=1e-4, atol=1e-5)


def test_steps_and_norms() -> None:
    """Signs, so eta per entry, with the l1 norm for Adam; a unit vector and the l2 norm else."""
    gradient = torch.tensor([3.0, 0.0, -4.0])
    assert STEPS["adam"][0](gradient).tolist() == [1.0, 0.0, -1.0]
    assert STEPS["sgd"][0](gradient) is gradient
    torch.testing.assert_close(STEPS["normalised"][0](gradient), gradient / 5)
    norms = {step: GradInit(step=step).norm(gradient[None]).item() for step in STEPS}
    assert norms == {"adam": pytest.approx(7.0), "sgd": pytest.approx(5.0), "normalised": pytest.approx(5.0)}


def test_constraint_steps_come_first() -> None:
    """From a gradient far above gamma: constraint steps until it is below, then the others start."""

    def constraint_iterations(iterations: int) -> float:
        model = deep_mlp()
        init(model, "he", seed=0)
        with torch.no_grad():
            for value in model.parameters():
                value.mul_(1.5)
        method = GradInit(learning_rate=0.01, iterations=iterations)
        figures = init(model, method, data=digit_batches(128, 128), loss=F.cross_entropy).figures["gradinit"]
        assert figures["iterations"] == iterations
        assert (figures["gradient_norm_after"] > method.gamma) == (figures["constraint_iterations"] == iterations)
        return figures["constraint_iterations"]

    assert constraint_iterations(20) == 20
    assert 20 < constraint_iterations(100) < 100


def test_half_fresh() -> None:
    (first, labels), (second, _) = digit_batches(20, 10)
    mixed, _ = half_fresh((first, labels), (second, labels))
    assert torch.equal(mixed, torch.cat((first[:5], second[:5])))
    mask = torch.eye(3)
    mixed = half_fresh(({"image": first, "mask": mask}, labels), ({"image": second, "mask": mask}, labels))
    assert torch.equal(mixed[0]["image"][5:], second[:5]) and mixed[0]["mask"] is mask
    with pytest.raises(DataError, match="pad them to one shape"):
        half_fresh((first, labels), (second[:, :5], labels))
    with pytest.raises(DataError, match="differ in shape or form"):
        half_fresh((first, labels), second)


def test_settings() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'normalised'"):
        GradInit(step="normalized")
    report = init(
        deep_mlp(1), replace(GradInit(), step="adam", eta=1e-3, gamma=1000, iterations=2),
        data=[digits(32)], loss=F.cross_entropy,
    )  # fmt: skip
    assert report.figures["gradinit"]["constraint_iterations"] == 0
