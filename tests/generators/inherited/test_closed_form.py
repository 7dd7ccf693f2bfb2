"""The closed forms of fused layers against least squares on many samples, and against what is known exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from generators.errors import ConfigError
from generators.inherited.closed_form import (
    Affine,
    Moments,
    fuse_conv_conv,
    fuse_conv_dense,
    fuse_dense_dense,
    response,
)

ACTIVATIONS = [nn.ReLU(), nn.Tanh(), nn.GELU(), nn.LeakyReLU(0.2), None]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer(*shape: int, seed: int) -> Affine:
    weight = torch.randn(*shape, dtype=torch.float64, generator=rng(seed)) / (shape[1] ** 0.5)
    return Affine(weight, torch.randn(shape[0], dtype=torch.float64, generator=rng(seed + 100)))


def fitted(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares: weight `[O, I]` and bias `[O]` from samples `[N, I]` and `[N, O]`."""
    columns = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=inputs.dtype)], dim=1)
    solution = torch.linalg.solve(columns.T @ columns, columns.T @ targets)
    return solution[:-1].T, solution[-1]


def error(inputs: Tensor, targets: Tensor, weight: Tensor, bias: Tensor) -> float:
    return (inputs @ weight.T + bias - targets).square().mean().item()


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("u, s", [(0.0, 1.0), (-0.7, 0.3), (2.0, 1.5)])
def test_response_against_samples(activation: Any, u: float, s: float) -> None:
    """Mean, variance and gain of an activation of 2 million Gaussian numbers, within 0.005."""
    h = u + s * torch.randn(2_000_000, generator=rng(1))
    value = h if activation is None else activation(h)
    gain = ((value - value.mean()) * (h - h.mean())).mean() / h.var()
    found = response(activation, Moments(torch.tensor(u), torch.tensor(s)))
    wanted = torch.stack([value.mean(), value.var(), gain]).double()
    torch.testing.assert_close(torch.stack(found), wanted, atol=0.005, rtol=0.005)


def test_relu_without_bias_and_what_does_not_vary() -> None:
    """Gain 1/2 and mean 1 / sqrt(2 pi); a constant passes through the activation. The quadrature nearly agrees."""
    found = response(nn.ReLU(), Moments(torch.tensor([0.0, 3.0, -3.0]), torch.tensor([1.0, 0.0, 0.0])))
    torch.testing.assert_close(found.mean, torch.tensor([0.3989423, 3, 0]).double())
    torch.testing.assert_close(found.gain, torch.tensor([0.5, 0, 0]).double())
    torch.testing.assert_close(found.variance, torch.tensor([0.5 - 0.1591549, 0, 0]).double())
    moments = Moments(torch.linspace(-2, 2, 9), torch.ones(9))
    exact, near = response(nn.ReLU(), moments), response(torch.relu, moments)
    assert max((one - other).abs().max() for one, other in zip(exact, near, strict=True)) < 0.01


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("correlated", [False, True])
def test_dense_dense_is_the_least_squares_fit(activation: Any, correlated: bool) -> None:
    """On 400,000 Gaussian samples with a mean: coefficients within 0.03, and an error within 0.1 % of the least one."""
    first, second = layer(8, 6, seed=1), layer(4, 8, seed=2)
    mean = torch.randn(6, dtype=torch.float64, generator=rng(3))
    root = torch.randn(6, 6, dtype=torch.float64, generator=rng(4)) / 2 if correlated else 0.8 * torch.eye(6).double()
    x = mean + torch.randn(400_000, 6, dtype=torch.float64, generator=rng(5)) @ root.T
    hidden = x @ first.weight.T + first.offset
    y = (hidden if activation is None else activation(hidden)) @ second.weight.T + second.offset
    covariance = root @ root.T if correlated else 0.64
    weight, bias = fuse_dense_dense(first, second, activation=activation, mean=mean, covariance=covariance)
    best = fitted(x, y)
    torch.testing.assert_close(weight, best[0], atol=0.03, rtol=0.0)
    torch.testing.assert_close(bias, best[1], atol=0.03, rtol=0.0)
    assert error(x, y, weight, bias) <= error(x, y, *best) * 1.001 + 1e-20
    measured = Moments(hidden.mean(0), hidden.std(0))
    again = fuse_dense_dense(first, second, activation=activation, hidden=measured)
    torch.testing.assert_close(again.weight, weight, atol=0.02, rtol=0.0)
    if activation is not None:
        plain = fuse_dense_dense(first, second)
        assert error(x, y, *plain) > 1.05 * error(x, y, weight, bias), "leaving the activation out is worse"


@pytest.mark.parametrize(
    ("options", "grid", "kernel"),
    [
        (dict(), (5, 5), (3, 3)),
        (dict(padding=1), (4, 4), (3, 3)),
        (dict(stride=2, padding=1), (6, 4), (3, 3)),  # the last row and column of the input are used by fewer taps
        (dict(stride=2), (6,), (3,)),  # the last number is used by none
        (dict(padding=(1, 0, 1)), (2, 3, 2), (2, 2, 3)),
    ],
)
def test_conv_dense_is_the_least_squares_fit(options: dict, grid: tuple, kernel: tuple) -> None:
    """Also with zero padding, where the sum of the convolution is shorter; channels of different means and spreads."""
    convolve = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}[len(grid)]
    first, mean, variance = layer(3, 2, *kernel, seed=1), torch.tensor([0.5, -1.0]).double(), torch.tensor([1.0, 0.3])
    axes = (slice(None), *(None,) * len(grid))
    noise = torch.randn(200_000, 2, *grid, dtype=torch.float64, generator=rng(2))
    x = mean[axes] + noise * variance.double().sqrt()[axes]
    hidden = convolve(x, first.weight, first.offset, **options).relu().flatten(1)
    second = layer(2, hidden.shape[1], seed=3)
    y = hidden @ second.weight.T + second.offset
    weight, bias = fuse_conv_dense(
        first, second, grid=grid, activation=nn.ReLU(), mean=mean, variance=variance, **options
    )
    best = fitted(x.flatten(1), y)
    torch.testing.assert_close(weight, best[0], atol=0.02, rtol=0.0)
    torch.testing.assert_close(bias, best[1], atol=0.05, rtol=0.0)
    assert error(x.flatten(1), y, weight, bias) <= 1.001 * error(x.flatten(1), y, *best)


@pytest.mark.parametrize("stride", [1, 2])
def test_conv_conv_is_the_least_squares_fit(stride: int) -> None:
    """On the patches that one output sees: 5 x 5 for two 3 x 3 kernels, 7 x 7 behind a stride of 2."""
    first, second, mean = layer(3, 2, 3, 3, seed=1), layer(2, 3, 3, 3, seed=2), torch.tensor([0.5, -0.5]).double()
    size = 2 * stride + 3
    noise = torch.randn(200_000, 2, size, size, dtype=torch.float64, generator=rng(3))
    x = mean[:, None, None] + 0.7 * noise
    hidden = nn.functional.conv2d(x, first.weight, first.offset, stride=stride)
    y = nn.functional.conv2d(hidden.relu(), second.weight, second.offset).flatten(1)
    weight, bias = fuse_conv_conv(first, second, stride=stride, activation=nn.ReLU(), mean=mean, variance=0.49)
    assert weight.shape == (2, 2, size, size)
    best = fitted(x.flatten(1), y)
    torch.testing.assert_close(weight.flatten(1), best[0], atol=0.02, rtol=0.0)
    torch.testing.assert_close(bias, best[1], atol=0.05, rtol=0.0)


@pytest.mark.parametrize("strides", [(1, 1), (2, 1), (1, 2), (2, 3)])
def test_convolutions_without_activation_are_composed_exactly(strides: tuple[int, int]) -> None:
    """Stride s1 s2 and padding p1 + s1 p2; equal everywhere but where the second layer's padding is seen."""
    first, second = layer(3, 2, 3, 3, seed=1), layer(4, 3, 3, 3, seed=2)
    x = torch.randn(2, 2, 30, 30, dtype=torch.float64, generator=rng(3))
    hidden = nn.functional.conv2d(x, first.weight, first.offset, stride=strides[0], padding=1)
    y = nn.functional.conv2d(hidden, second.weight, second.offset, stride=strides[1], padding=1)
    fused = fuse_conv_conv(first, second, stride=strides[0])
    one = nn.functional.conv2d(x, *fused, stride=strides[0] * strides[1], padding=1 + strides[0])
    size = min(y.shape[-1], one.shape[-1]) - 1
    torch.testing.assert_close(one[..., 1:size, 1:size], y[..., 1:size, 1:size])
    dense = Affine(torch.randn(3, hidden[0].numel(), dtype=torch.float64, generator=rng(4)))
    fused = fuse_conv_dense(first, dense, grid=(30, 30), stride=strides[0], padding=1)
    torch.testing.assert_close(x.flatten(1) @ fused.weight.T + fused.offset, hidden.flatten(1) @ dense.weight.T)


def test_shapes_that_do_not_follow_each_other() -> None:
    for fuse in (fuse_dense_dense, fuse_conv_conv):
        axes = (3, 3) if fuse is fuse_conv_conv else ()
        with pytest.raises(ConfigError, match="do not follow each other"):
            fuse(layer(4, 3, *axes, seed=0), layer(2, 5, *axes, seed=0))
    with pytest.raises(ConfigError, match="do not follow each other"):
        fuse_conv_dense(layer(4, 3, 3, 3, seed=0), layer(2, 5, seed=0), grid=(5, 5))
