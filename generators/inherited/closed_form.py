"""Two layers with an activation between them as one layer, by closed forms that are optimal in mean square error.

After Ghods, Lan, Goldstein and Studer, "MSE-Optimal Neural Network Initialization via Layer Fusion", CISS 2020, arXiv
2001.10509. The forms below are derived here, for any elementwise activation f. Let

    h = A x + a,    y = B f(h) + b,    x Gaussian with mean m and covariance S.

The affine map W x + c with the least E |y - W x - c|^2 is W = Cov(y, x) S^-1, c = E y - W m. Since h_i and x are
jointly Gaussian, Cov(f(h_i), x) = g_i Cov(h_i, x) with g_i = Cov(f(h_i), h_i) / Var(h_i) (Bussgang's theorem; by
Stein's lemma g_i = E f'(h_i)). Cov(h, x) = A S, so S cancels:

    W = B diag(g) A,    c = b + B (E f(h) + g * (a - E h))

The activation is thus replaced by the line f(h_i) ~ g_i h_i + E f(h_i) - g_i E h_i, and linear maps are composed. With
u = E h_i, s^2 = Var(h_i), P and p the distribution function and density of the standard normal, for the ReLU

    g = P(u / s),    E f = u P(u / s) + s p(u / s),    E f^2 = (u^2 + s^2) P(u / s) + u s p(u / s)

so g = 1/2 and E f = s / sqrt(2 pi) without biases and means. Other activations go through Gauss-Hermite quadrature.
What is assumed of x beyond its mean enters by Var(h_i) alone. Convolutions are linear maps, so the same holds for them:
their inputs are taken to be white noise per channel, and where zero padding of the *first* layer shortens its sum, the
dense form takes the shorter sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generators.errors import ConfigError

Activation = Callable[[Tensor], Tensor]
Sizes = int | tuple[int, ...]
NODES = 128  # of the quadrature: exact for polynomials of degree 255, within 1 % for functions with a kink

_CONVOLVE = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}  # by axes of the weight
_SPREAD = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}


class Affine(NamedTuple):
    """A layer: weight `[O, I]` or `[O, I, *K]`, bias `[O]` or None."""

    weight: Tensor
    bias: Tensor | None = None

    @property
    def offset(self) -> Tensor:
        """The bias, zeros if there is none."""
        return self.weight.new_zeros(self.weight.shape[0]) if self.bias is None else self.bias


class Moments(NamedTuple):
    """Mean and standard deviation of numbers, one each or one for all."""

    mean: Tensor
    std: Tensor


class Response(NamedTuple):
    """What an activation makes of Gaussian numbers: mean and variance, and the gain of the best line through it."""

    mean: Tensor
    variance: Tensor
    gain: Tensor


def response(activation: Activation | None, hidden: Moments) -> Response:
    """Moments of f(h) for h Gaussian with the moments `hidden`, and g = Cov(f(h), h) / Var(h).

    Args:
        activation: f, elementwise; None for the identity.
        hidden: mean and standard deviation of h; a number that does not vary has gain 0.
    """
    mean, std = (value.double() for value in torch.broadcast_tensors(*hidden))
    if activation is None or isinstance(activation, nn.Identity):
        return Response(mean, std.square(), torch.ones_like(mean))
    alive = std > 0
    if isinstance(activation, nn.ReLU):
        ratio = mean / torch.where(alive, std, 1.0)
        below = torch.special.ndtr(ratio)
        density = (-ratio.square() / 2).exp() / math.sqrt(2 * math.pi)
        first = torch.where(alive, mean * below + std * density, mean.relu())
        second = torch.where(alive, (mean.square() + std.square()) * below + mean * std * density, first.square())
        return Response(first, (second - first.square()).clamp(min=0), torch.where(alive, below, 0.0))
    nodes, weights = (torch.from_numpy(value) for value in np.polynomial.hermite_e.hermegauss(NODES))
    weights = weights / weights.sum()
    values = activation(mean[..., None] + std[..., None] * nodes)
    first = values @ weights
    centred = values - first[..., None]
    gain = torch.where(alive, (centred * nodes) @ weights / torch.where(alive, std, 1.0), 0.0)
    return Response(first, centred.square() @ weights, gain)


def _line(activation: Activation | None, hidden: Moments) -> tuple[Tensor, Tensor]:
    """The gain g and the offset o of f(h) ~ g h + o."""
    found = response(activation, hidden)
    return found.gain, found.mean - found.gain * hidden.mean.double()


def _double(layer: Affine) -> tuple[Tensor, Tensor]:
    """Weight and bias in double precision."""
    return layer.weight.detach().double(), layer.offset.detach().double()


def _number(value: Tensor | float, size: int) -> Tensor:
    """`[size]` from one number or one per channel."""
    return torch.as_tensor(value, dtype=torch.float64).expand(size)


def fuse_dense_dense(
    first: Affine, second: Affine, *, activation: Activation | None = None, mean: Tensor | float = 0.0,
    covariance: Tensor | float = 1.0, hidden: Moments | None = None,
) -> Affine:  # fmt: skip
    """Dense layers A `[H, I]` and B `[O, H]` as one `[O, I]` with a bias.

    Args:
        first: A, a, with I inputs and H outputs.
        second: B, b, with O outputs.
        activation: between the two, elementwise.
        mean: of the inputs, a number or `[I]`.
        covariance: of the inputs, a number or `[I]` for uncorrelated ones, or `[I, I]`.
        hidden: moments `[H]` of what the first layer gives, if they are known, instead of those of the inputs.

    Raises:
        ConfigError: the shapes do not fit.
    """
    (weight, offset), (behind, end) = _double(first), _double(second)
    _check(behind.shape[1] == weight.shape[0], first, second)
    if hidden is None:
        spread = torch.as_tensor(covariance, dtype=torch.float64)
        spread = spread if spread.ndim == 2 else torch.diag(_number(spread, weight.shape[1]))
        centre = weight @ _number(mean, weight.shape[1]) + offset
        hidden = Moments(centre, ((weight @ spread) * weight).sum(1).clamp(min=0).sqrt())
    gain, constant = _line(activation, hidden)
    return Affine((behind * gain) @ weight, end + behind @ (gain * offset + constant))


def fuse_conv_dense(
    first: Affine, second: Affine, *, grid: tuple[int, ...], stride: Sizes = 1, padding: Sizes = 0,
    activation: Activation | None = None, mean: Tensor | float = 0.0, variance: Tensor | float = 1.0,
    hidden: Moments | None = None,
) -> Affine:  # fmt: skip
    """A convolution `[H, I, *K]` and a dense layer `[O, H * P]` on its flattened output as one `[O, I * G]`.

    Args:
        first: the convolution from I to H channels with kernel K; one group, no dilation.
        second: the dense layer, which reads H channels x P positions, channels first, and has O outputs.
        grid: sizes of the input, G numbers per channel; P follows.
        stride, padding: of the convolution.
        activation: between the two, elementwise.
        mean, variance: of the inputs per channel, a number or `[I]`; the inputs are uncorrelated.
        hidden: moments `[H]` of what the convolution gives, if they are known, instead of those.

    Raises:
        ConfigError: the shapes do not fit.
    """
    (weight, offset), (behind, end) = _double(first), _double(second)
    convolve, spread, axes = _CONVOLVE[weight.ndim], _SPREAD[weight.ndim], (slice(None), *(None,) * len(grid))
    channels = weight.shape[1]
    places: dict[str, Any] = dict(stride=stride, padding=padding)
    mask = torch.ones(1, channels, *grid, dtype=torch.float64)
    centre = convolve(mask * _number(mean, channels)[axes], weight, offset, **places)[0]
    squares = convolve(mask * _number(variance, channels)[axes], weight.square(), **places)[0]
    shape = centre.shape
    _check(behind.shape[1] == shape.numel(), first, second)
    if hidden is None:
        hidden = Moments(centre, squares.clamp(min=0).sqrt())
    else:
        hidden = Moments(*(value.double()[axes].expand(shape) for value in hidden))
    gain, constant = _line(activation, hidden)
    bias = end + behind @ (gain * offset[axes] + constant).flatten()
    scaled = behind.unflatten(1, shape) * gain
    reached = spread(scaled, weight, **places).shape[2:]
    lost = tuple(size - got for size, got in zip(grid, reached, strict=True))  # where the last stride finds no room
    fused = spread(scaled, weight, output_padding=lost, **places)
    return Affine(fused.flatten(1), bias)


def fuse_conv_conv(
    first: Affine, second: Affine, *, stride: Sizes = 1, activation: Activation | None = None,
    mean: Tensor | float = 0.0, variance: Tensor | float = 1.0, hidden: Moments | None = None,
) -> Affine:  # fmt: skip
    """Convolutions `[H, I, *K]` and `[O, H, *L]` as one `[O, I, *M]` with M = s (L - 1) + K, s the first one's stride.

    Its stride is the product of theirs, and its padding p + s q, with p that of the first and q that of the second. It
    is optimal where the second kernel does not touch its own zero padding: that padding replaces what the first layer
    would give there, and no one kernel can do so.

    Args:
        first: the convolution from I to H channels with kernel K; one group, no dilation.
        second: the convolution from H to O channels with kernel L; one group, no dilation.
        stride: s, of the first one.
        activation: between the two, elementwise.
        mean, variance: of the inputs per channel, a number or `[I]`; the inputs are uncorrelated.
        hidden: moments `[H]` of what the first layer gives, if they are known, instead of those.

    Raises:
        ConfigError: the shapes do not fit.
    """
    (weight, offset), (behind, end) = _double(first), _double(second)
    _check(behind.shape[1] == weight.shape[0] and behind.ndim == weight.ndim, first, second)
    if hidden is None:
        taps, channels = weight.flatten(2), weight.shape[1]
        centre = taps.sum(2) @ _number(mean, channels) + offset
        hidden = Moments(centre, (taps.square().sum(2) @ _number(variance, channels)).clamp(min=0).sqrt())
    gain, constant = _line(activation, hidden)
    scaled = behind * gain.reshape(1, -1, *(1 for _ in behind.shape[2:]))
    bias = end + behind.flatten(2).sum(2) @ (gain * offset + constant)
    return Affine(_SPREAD[weight.ndim](scaled, weight, stride=stride), bias)


def _check(fits: bool, first: Affine, second: Affine) -> None:
    if not fits:
        raise ConfigError(
            f"layers of shapes {tuple(first.weight.shape)} and {tuple(second.weight.shape)} do not follow each other; "
            "pass the weight whose outputs are the inputs of the second"
        )
