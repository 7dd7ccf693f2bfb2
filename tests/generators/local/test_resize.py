"""Resized kernels: against torch's interpolation, and against trained kernels of the wanted size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from collect import data
from generators.local.fidelity import covariance, match
from generators.local.resize import resized, weights
from generators.seeds import isolated, stream


@pytest.mark.parametrize(("old", "new"), [(3, 5), (3, 7), (5, 3), (7, 3), (4, 3), (3, 4), (2, 2)])
def test_the_weights_are_those_of_torch_with_antialiasing(old, new):
    kernel = torch.randn(1, 1, old, old, generator=stream(0, "kernel"))
    expected = functional.interpolate(kernel, size=(new, new), mode="bilinear", antialias=True)[0, 0]
    assert torch.allclose(weights(old, new) @ kernel[0, 0] @ weights(old, new).T, expected, atol=1e-6)


@pytest.mark.parametrize(("old", "new"), [((3,), (7,)), ((3, 3), (7, 5)), ((1, 5), (1, 3)), ((3, 3, 3), (5, 2, 3))])
def test_half_is_interpolated_along_each_axis_and_half_is_noise(old, new):
    slices = torch.randn(4000, *old, generator=stream(0, "slices"))
    smooth = slices
    for axis, size in enumerate(new, start=1):  # slow and obvious
        smooth = torch.tensordot(smooth, weights(old[axis - 1], size), ([axis], [1])).movedim(-1, axis)
    made = resized(slices, new, stream(0, "draws"))
    assert made.shape == (4000, *new)
    assert made.square().mean().item() == pytest.approx(slices.square().mean().item(), rel=1e-5)
    wanted = covariance(smooth / smooth.square().mean().sqrt()) + torch.eye(smooth[0].numel())
    assert torch.linalg.norm(covariance(made) - wanted / 2) < 0.12 * torch.linalg.norm(wanted / 2)
    assert torch.linalg.matrix_rank(made.flatten(1)) == made[0].numel()


def kernels(size: int) -> Tensor:
    """Trained kernels `[512, size, size]` of unit second moment: the second layer of a small network for digits."""
    images = data.load("digits").train
    with isolated(size):
        network = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, size, padding=size // 2), nn.BatchNorm2d(32), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
        )  # fmt: skip
        optimiser = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
        for _ in range(150):
            rows = torch.randint(len(images.images), (64,))
            loss = functional.cross_entropy(network(images.images[rows]), images.labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    found = network[3].weight.detach().flatten(0, 1)
    return found / found.square().mean().sqrt()


def test_trained_kernels_are_nearer_to_resized_ones_than_to_noise():
    trained = {size: kernels(size) for size in (3, 5)}
    for old, new in ((3, 5), (5, 3)):
        figures = match(resized(trained[old], (new, new), stream(0, "draws")), trained[new])
        assert figures["covariance_error"] < 0.6 * figures["covariance_error_white"], (old, new)


def test_nothing_but_zeros_stays_finite():
    assert resized(torch.zeros(3, 3, 3), (5, 5), stream(0, "draws")).isfinite().all()
