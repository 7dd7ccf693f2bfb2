"""Hyperfan initialisation of hypernetworks (Chang, Flokas and Lipson, ICLR 2020, arXiv 2312.08399).

A main layer `y = W x + b` gets its weight and bias from linear heads fed by a hidden vector `e` of the hypernetwork:
`W = reshape(H e)`, `b = G e`. Ordinary fan-in rules applied to H ignore that its outputs are weights of another
network; hyperfan chooses Var(H) so that the *main* network keeps its variance:

    fan-in    Var(H) = R / (B * fan_in * d * Var(e))      Var(G) = R / (2 * d * Var(e))
    fan-out   Var(H) = R / (fan_out * d * Var(e))         Var(G) = max(0, R * (1 - fan_in / fan_out) / (d * Var(e)))
    harmonic  the harmonic mean of the two rows

with d the entries of e, Var(e) its second moment, R = 2 if a ReLU follows the main layer (else 1) and B = 2 if its bias
is generated too (else 1).

The initialisers "hyperfan", "hyperfan-out" and "hyperfan-harmonic" fill a hypernetwork that says which of its heads
makes what, by a method `main_layers`:

    class Hypernetwork(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.hidden = nn.Embedding(5, 16), nn.Linear(16, 32)
            self.weight, self.bias = nn.Linear(32, 64 * 10), nn.Linear(32, 10)

        def main_layers(self):  # a layer from 64 numbers to 10 classes
            return {"weight": MainLayer(fan_in=64, fan_out=10, relu=False, bias="bias")}

All that is no head gets He weights by fan-in, zero biases and embeddings N(0, 1). Behind ReLU layers this keeps
E[e^2] = 1, which is the default of `MainLayer.second_moment`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from generators.errors import ConfigError, unknown_name
from generators.initialiser import Kind, Proposal, Request, register
from generators.pointwise import HE
from generators.seeds import plain_tensors, stream

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


@dataclass(frozen=True)
class MainLayer:
    """A layer that a head of a hypernetwork makes.

    Attributes:
        fan_in, fan_out: its fans; of a convolution with weight `[O, I, *k]` I k and O k, k kernel positions.
        relu: whether a ReLU follows it.
        bias: path of the head that makes its bias, None if none does.
        second_moment: Var(e), the mean square of the hidden vector that feeds its heads.
    """

    fan_in: int
    fan_out: int
    relu: bool = True
    bias: str | None = None
    second_moment: float = 1.0


def main_layers_of(model: nn.Module) -> dict[str, MainLayer]:
    """Path of each weight head of a hypernetwork -> what it makes; checked.

    Raises:
        ConfigError: the model has no method `main_layers`, it gives something else, or a head is no linear layer.
        UnknownNameError: a head does not exist.
    """
    tell = getattr(model, "main_layers", None)
    found = tell() if callable(tell) else None
    if not isinstance(found, Mapping) or not all(isinstance(layer, MainLayer) for layer in found.values()):
        raise ConfigError(
            f"hyperfan is for hypernetworks, and {type(model).__name__} does not say what it makes; give it a method "
            "main_layers() -> {path of a head: generators.hyperfan.MainLayer(fan_in=..., fan_out=...)}"
        )
    modules = dict(model.named_modules())
    heads = [path for head, layer in found.items() for path in (head, layer.bias) if path is not None]
    for path in heads:
        if path not in modules:
            raise unknown_name("head in main_layers()", path, [name for name in modules if name])
        head = modules[path]
        own = dict(head.named_parameters(recurse=False))
        if not isinstance(head, nn.Linear) or "weight" not in own or heads.count(path) > 1:
            raise ConfigError(
                f"head {path!r} in main_layers() must be a linear layer with a weight of its own that makes one "
                f"tensor, it is {head}"
            )
    return dict(found)


@dataclass(frozen=True)
class Hyperfan:
    """Fills the heads of a hypernetwork by hyperfan, normal entries and zero biases, and the rest by He.

    Attributes:
        mode: which direction of the main network keeps its variance.
    """

    mode: Mode = "in"
    name: str = "hyperfan"
    kind: Kind = Kind.POINTWISE

    def propose(self, model: nn.Module, request: Request) -> Proposal:
        """Values for every head, and named fallbacks.

        Raises:
            ConfigError: the model does not say what it makes, see `main_layers_of`.
        """
        proposal = Proposal()
        heads: dict[str, float] = {}
        for path, layer in main_layers_of(model).items():
            weight, bias = hyperfan_variances(
                fan_in=layer.fan_in, fan_out=layer.fan_out, width=_width(model, path), mode=self.mode,
                second_moment=layer.second_moment, relu=layer.relu, generates_bias=layer.bias is not None,
            )  # fmt: skip
            heads[path] = weight
            if layer.bias is not None:
                heads[layer.bias] = bias * _width(model, path) / _width(model, layer.bias)
        for info in request.inventory:
            if info.module not in heads:
                HE.fill(proposal, info, request, because=f"{self.name}: not a head")
                continue
            matrix = len(info.shape) == 2
            std = math.sqrt(heads[info.module]) if matrix else 0.0
            proposal.values[info.name] = self._draw(info.name, info.shape, std, request)
            proposal.sources[info.name] = f"{self.name}: head, std {std:.3g}" if matrix else f"{self.name}: head bias 0"
        return proposal

    @plain_tensors()
    def _draw(self, name: str, shape: tuple[int, ...], std: float, request: Request) -> Tensor:
        return torch.empty(shape).normal_(0.0, std, generator=stream(request.seed, "hyperfan", request.member, name))


def _width(model: nn.Module, path: str) -> int:
    """Entries of the hidden vector that feeds a head."""
    head: Any = model.get_submodule(path)
    return head.in_features


_CHANG = "Chang et al., ICLR 2020, arXiv 2312.08399"

for _name, _mode, _what in (
    ("hyperfan", "in", "main fan-in"), ("hyperfan-out", "out", "main fan-out"),
    ("hyperfan-harmonic", "harmonic", "harmonic mean of the two"),
):  # fmt: skip
    register(_name, kind=Kind.POINTWISE, paper=_CHANG, summary=f"heads of a hypernetwork by the {_what}, the rest He")(
        lambda name=_name, mode=_mode: Hyperfan(mode, name)
    )
