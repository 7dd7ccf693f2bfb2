"""Sequential models as lists of layers, and a deep one cut into groups that can become the layers of a shallow one.

A group can become a layer if its layers follow each other with at most one elementwise activation between them, and if
its outer sizes, its stride and what follows it (activation, pooling) are those of the layer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd

from generators.errors import ConfigError
from generators.inherited.closed_form import Affine

ACTIVATIONS = (
    nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid,
    nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid,
)  # fmt: skip
POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
SILENT = (nn.Identity, _DropoutNd)  # they change nothing in evaluation mode
ACCEPTED = "nn.Sequential of Conv1d/2d/3d (one group, no dilation), Linear, activations, pooling, Flatten and Dropout"


@dataclass
class Unit:
    """A layer and what comes between it and the next one.

    Attributes:
        path: where the layer is.
        module: a convolution or a linear layer.
        after: activations and pooling.
        flat: a Flatten is among what comes after.
    """

    path: str
    module: Any
    after: list[nn.Module] = field(default_factory=list)
    flat: bool = False

    @property
    def dense(self) -> bool:
        return isinstance(self.module, nn.Linear)

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers of inputs and outputs, or of channels."""
        if self.dense:
            return self.module.in_features, self.module.out_features
        return self.module.in_channels, self.module.out_channels

    @property
    def activation(self) -> nn.Module | None:
        return next((module for module in self.after if isinstance(module, ACTIVATIONS)), None)

    @property
    def open(self) -> bool:
        """Whether no more than one activation lies between the layer and the next."""
        return not self.after or (len(self.after) == 1 and self.activation is not None)

    @property
    def follows(self) -> list[tuple]:
        """What comes after, to be compared: types and settings."""
        settings = [
            {key: value for key, value in vars(module).items() if key[0] != "_" and key not in ("training", "inplace")}
            for module in self.after
        ]
        return [(type(module), setting) for module, setting in zip(self.after, settings, strict=True)]

    @property
    def affine(self) -> Affine:
        """Its weight and bias in double precision, on the CPU."""
        weight, bias = self.module.weight.detach(), self.module.bias
        return Affine(weight.double().cpu(), None if bias is None else bias.detach().double().cpu())


def units_of(model: nn.Module, whose: str) -> list[Unit]:
    """The layers of a sequential model in order.

    Raises:
        ConfigError: it is not sequential, or holds a module that is not accepted.
    """
    units: list[Unit] = []
    for path, module in model.named_modules(remove_duplicate=False):
        conv = isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd)
        plain = isinstance(module, nn.Linear) or (
            conv and module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
        )  # fmt: skip
        if plain:
            units.append(Unit(path, module))
        elif isinstance(module, ACTIVATIONS + POOLS) and units:
            units[-1].after.append(module)
        elif isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            if units:
                units[-1].flat = True
        elif type(module) is not nn.Sequential and not isinstance(module, SILENT):
            what = type(module).__name__ if any(module.children()) else module
            raise ConfigError(
                f"layer-fusion cannot work with {path or 'the whole'} of {whose}, {what}; it takes {ACCEPTED}"
            )
    return units


def product_of(values: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Axis by axis, as strides multiply."""
    return tuple(math.prod(axis) for axis in zip(*values, strict=True))


def grid_of(group: Sequence[Unit], target: Unit) -> tuple[int, ...]:
    """Sizes of the input of a group that becomes a dense layer; its sides are equal, as nothing tells otherwise."""
    channels, axes = group[0].sizes[0], len(group[0].module.kernel_size)
    side = round((target.sizes[0] / channels) ** (1 / axes))
    return (side,) * axes if channels * side**axes == target.sizes[0] else ()


def _reaches(group: Sequence[Unit], target: Unit) -> bool:
    """Whether convolutions on that grid give the linear layers behind them as many numbers as these read."""
    convolutions = [unit for unit in group if not unit.dense]
    grid = grid_of(group, target)
    for layer in (unit.module for unit in convolutions):
        steps = zip(grid, layer.padding, layer.kernel_size, layer.stride, strict=False)
        grid = tuple((size + 2 * padding - kernel) // stride + 1 for size, padding, kernel, stride in steps)
    first = next(unit for unit in group if unit.dense)
    return bool(grid) and convolutions[-1].sizes[1] * math.prod(grid) == first.sizes[0]


def _fits(group: Sequence[Unit], target: Unit) -> bool:
    """Whether the layers of `group` can become the layer `target`."""
    joined = all(unit.open and (unit.flat or unit.dense == after.dense) for unit, after in itertools.pairwise(group))
    if not joined or group[-1].follows != target.follows or group[-1].sizes[1] != target.sizes[1]:
        return False
    if target.dense and not group[0].dense:
        return group[-1].dense and _reaches(group, target)
    if any(type(unit.module) is not type(target.module) for unit in group):
        return False
    strides = target.dense or product_of([unit.module.stride for unit in group]) == target.module.stride
    return group[0].sizes[0] == target.sizes[0] and strides


def groups_of(relative: list[Unit], model: list[Unit]) -> list[list[Unit]]:
    """The layers of the relative cut into one group per layer of the model, as evenly as possible.

    Raises:
        ConfigError: there is no way to cut them.
    """

    @cache
    def cut(start: int, number: int) -> tuple[int, tuple[int, ...]] | None:
        """Sum of squares and ends of the groups that make the layers from `number` on."""
        if number == len(model):
            return (0, ()) if start == len(relative) else None
        found = []
        for end in range(len(relative), start, -1):  # of equal ways the one with more layers in the first group wins
            rest = cut(end, number + 1) if _fits(relative[start:end], model[number]) else None
            if rest is not None:
                found.append(((end - start) ** 2 + rest[0], (end, *rest[1])))
        return min(found, key=lambda way: way[0], default=None)

    way = cut(0, 0)
    if way is None:
        theirs, ours = ([list(unit.sizes) for unit in units] for units in (relative, model))
        raise ConfigError(
            f"layer-fusion: the relative's layers {theirs} cannot be fused into those of the model, {ours}; the inputs "
            "and outputs of the model's layers must be among those of the relative, in order, with the same strides, "
            "activations and pooling after them, and square images"
        )
    starts = (0, *way[1][:-1])
    return [relative[start:end] for start, end in zip(starts, way[1], strict=True)]
