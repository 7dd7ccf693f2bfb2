"""Hyperfan initialisation of hypernetworks (Chang, Flokas and Lipson, ICLR 2020, arXiv 2312.08399).

A main layer `y = W x + b` gets its weight and bias from linear heads fed by a hidden vector `e` of the hypernetwork:
`W = reshape(H e)`, `b = G e`. Ordinary fan-in rules applied to H ignore that its outputs are weights of another
network; hyperfan chooses Var(H) so that the *main* network keeps its variance:

    fan-in    Var(H) = R / (B * fan_in * d * Var(e))      Var(G) = R / (2 * d * Var(e))
    fan-out   Var(H) = R / (fan_out * d * Var(e))         Var(G) = max(0, R * (1 - fan_in / fan_out) / (d * Var(e)))
    harmonic  the harmonic mean of the two rows

with d the entries of e, Var(e) its second moment, R = 2 if a ReLU follows the main layer (else 1) and B = 2 if its bias
is generated too (else 1).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

from generators.errors import ConfigError

Mode = Literal["in", "out", "harmonic"]


def _harmonic(a: float, b: float) -> float:
    return 2.0 / (1.0 / a + 1.0 / b) if a > 0 and b > 0 else 0.0


def hyperfan_variances(
    *, fan_in: int, fan_out: int, width: int, second_moment: float = 1.0, mode: Mode = "in", relu: bool = True,
    generates_bias: bool = False,
) -> tuple[float, float]:  # fmt: skip
    """Var(H) of the weight head and Var(G) of the bias head.

    Args:
        fan_in, fan_out: fans of the *main* layer (kernel positions included; channels per group).
        width: d, entries of the hidden vector that feeds the heads.
        second_moment: Var(e), read as E[e^2].
        mode: which direction keeps its variance.
        relu: whether a ReLU follows the main layer.
        generates_bias: whether the hypernetwork makes the main layer's bias too; the two then share the variance.

    Raises:
        ConfigError: a fan, the width or the second moment is not positive, or the mode is unknown.
    """
    if min(fan_in, fan_out, width) < 1 or second_moment <= 0:
        raise ConfigError(
            f"hyperfan needs positive fans, width and second moment, got fan_in={fan_in}, fan_out={fan_out}, "
            f"width={width}, second_moment={second_moment}"
        )
    gain, share, scale = (2.0 if relu else 1.0), (2.0 if generates_bias else 1.0), width * second_moment
    weight = {"in": gain / (share * fan_in * scale), "out": gain / (fan_out * scale)}
    bias = {"in": gain / (2.0 * scale), "out": max(0.0, gain * (1.0 - fan_in / fan_out) / scale)}
    if mode == "harmonic":
        return _harmonic(weight["in"], weight["out"]), _harmonic(bias["in"], bias["out"])
    if mode not in weight:
        raise ConfigError(f"hyperfan mode {mode!r}: choose 'in', 'out' or 'harmonic'")
    return weight[mode], bias[mode]


@torch.no_grad()
def hyperfan_(
    head: nn.Linear, *, fan_in: int, fan_out: int, generator: torch.Generator, bias_head: nn.Linear | None = None,
    second_moment: float = 1.0, hidden: torch.Tensor | None = None, mode: Mode = "in", relu: bool = True,
) -> None:  # fmt: skip
    """Initialise the linear head(s) of a hypernetwork in place, normal entries, head biases zero.

    Args:
        head: makes the main layer's weight, `head.in_features` = d.
        fan_in, fan_out: fans of the main layer.
        generator: source of randomness.
        bias_head: makes the main layer's bias, if the hypernetwork does.
        second_moment: E[e^2], used unless `hidden` is given.
        hidden: `[n, d]`, hidden vectors in use. The realised mean ||e||^2 / d then replaces the expectation
            ("calibrated"): the formulas hold on average over embeddings, and for one embedding all layers are off by
            the same factor, which compounds with depth.
        mode, relu: see `hyperfan_variances`.
    """
    if hidden is not None:
        second_moment = hidden.float().pow(2).mean().item()
    weight, bias = hyperfan_variances(
        fan_in=fan_in, fan_out=fan_out, width=head.in_features, second_moment=second_moment, mode=mode, relu=relu,
        generates_bias=bias_head is not None,
    )  # fmt: skip
    for layer, variance in ((head, weight), (bias_head, bias)):
        if layer is not None:
            layer.weight.normal_(0.0, math.sqrt(variance), generator=generator)
            if layer.bias is not None:
                layer.bias.zero_()
