"""Layer fusion: a shallower network starts from neighbouring layers of a deeper trained one, fused.

Ghods, Lan, Goldstein and Studer, "MSE-Optimal Neural Network Initialization via Layer Fusion" (FuseInit), CISS 2020,
arXiv 2001.10509; `generators.inherited.closed_form` has the formulas. The layers of the relative are cut into groups,
one per layer of the model, and each group becomes one layer. A group is possible if its layers follow each other with
at most one elementwise activation between them, if its outer sizes, its stride and what follows it (activation,
pooling) are those of the model's layer; of all ways to cut, the most even one is taken, and of equals the one that
fuses the earliest layers. A group of one layer is copied.

What the formulas need of the hidden layers, a mean and a standard deviation per unit or channel, is measured on the
first batch if data are given; else it follows from inputs of mean 0 and variance 1, layer by layer as if units were
uncorrelated and pooling did nothing.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd

from generators.batches import call, first_batch, inputs_of
from generators.checking import check_model
from generators.errors import ConfigError, ModelError
from generators.inherited.closed_form import (
    Affine,
    Moments,
    fuse_conv_conv,
    fuse_conv_dense,
    fuse_dense_dense,
    response,
)
from generators.initialiser import Kind, Proposal, Request, register
from generators.seeds import isolated

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
            raise ConfigError(
                f"layer-fusion cannot work with {path or 'the whole'} of {whose}, {module}; it takes {ACCEPTED}"
            )
    return units


def _product(values: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(math.prod(axis) for axis in zip(*values, strict=True))


def _grid(group: Sequence[Unit], target: Unit) -> tuple[int, ...]:
    """Sizes of the input of a group that becomes a dense layer; its sides are equal, as nothing tells otherwise."""
    channels, axes = group[0].sizes[0], len(group[0].module.kernel_size)
    side = round((target.sizes[0] / channels) ** (1 / axes))
    return (side,) * axes if channels * side**axes == target.sizes[0] else ()


def _reaches(group: Sequence[Unit], target: Unit) -> bool:
    """Whether convolutions on that grid give the linear layers behind them as many numbers as these read."""
    convolutions = [unit for unit in group if not unit.dense]
    grid = _grid(group, target)
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
    strides = target.dense or _product([unit.module.stride for unit in group]) == target.module.stride
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


# ---- moments of the hidden layers --------------------------------------------------------------------------------


def assumed_moments(units: list[Unit]) -> dict[str, tuple[Tensor, Moments]]:
    """Per layer the mean of its inputs and the moments of its outputs, per channel; see the top of this file."""
    found = {}
    mean = torch.zeros(units[0].sizes[0], dtype=torch.float64)
    variance = torch.ones_like(mean)
    for unit in units:
        weight, bias = unit.affine.weight, unit.affine.offset
        times = unit.sizes[0] // len(mean)  # positions per channel behind a Flatten
        mean, variance = mean.repeat_interleave(times), variance.repeat_interleave(times)
        taps = weight.reshape(*weight.shape[:2], -1)
        hidden = Moments(taps.sum(2) @ mean + bias, (taps.square().sum(2) @ variance).sqrt())
        found[unit.path] = (mean, hidden)
        out = response(unit.activation, hidden)
        mean, variance = out.mean, out.variance
    return found


def measured_moments(relative: nn.Module, units: list[Unit], inputs: Any) -> dict[str, tuple[Tensor, Moments]]:
    """The same, from the relative's answer to one batch."""
    work, found = copy.deepcopy(relative).eval(), {}

    def channels(value: Tensor) -> Tensor:
        return value.detach().double().movedim(1, 0).flatten(1).cpu()

    def hook(path: str) -> Any:
        def keep(module: nn.Module, arguments: tuple, output: Tensor) -> None:
            rows = channels(output)
            found[path] = (channels(arguments[0]).mean(1), Moments(rows.mean(1), rows.std(1, correction=0)))

        return keep

    for unit in units:
        work.get_submodule(unit.path).register_forward_hook(hook(unit.path))
    with torch.no_grad():
        call(work, inputs)
    return found


# ---- one group, one layer ----------------------------------------------------------------------------------------


def fused(group: list[Unit], target: Unit, moments: dict[str, tuple[Tensor, Moments]]) -> Affine:
    """The layers of `group` as one with the shape of `target`."""
    made, stride, padding = group[0].affine, *_places(group[0])
    grid = _grid(group, target) if target.dense and not group[0].dense else ()
    for before, unit in itertools.pairwise(group):
        options: dict[str, Any] = dict(activation=before.activation, hidden=moments[before.path][1])
        if made.weight.ndim == 2:
            made = fuse_dense_dense(made, unit.affine, **options)
        elif unit.dense:
            made = fuse_conv_dense(made, unit.affine, grid=grid, stride=stride, padding=padding, **options)
        else:
            made = fuse_conv_conv(made, unit.affine, stride=stride, **options)
            steps, more = _places(unit)
            padding = tuple(p + s * q for p, s, q in zip(padding, stride, more, strict=True))
            stride = _product([stride, steps])
    return made if target.dense else _fitted(made, padding, target.module, moments[group[0].path][0])


def _places(unit: Unit) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Stride and padding, () for a linear layer."""
    return ((), ()) if unit.dense else (unit.module.stride, unit.module.padding)


def _fitted(layer: Affine, padding: tuple[int, ...], target: Any, mean: Tensor) -> Affine:
    """A convolution in another kernel: entries for the same places of the input, the mean of those that are cut off.

    With uncorrelated inputs the best smaller kernel is the larger one, cut.
    """
    weight, out = layer.weight, layer.weight.new_zeros(*layer.weight.shape[:2], *target.kernel_size)
    ours, theirs = [slice(None)] * 2, [slice(None)] * 2
    for size, wanted, before, after in zip(weight.shape[2:], target.kernel_size, padding, target.padding, strict=True):
        shift = before - after
        start, end = max(shift, 0), min(size, shift + wanted)
        theirs.append(slice(start, max(end, start)))
        ours.append(slice(start - shift, max(end, start) - shift))
    out[tuple(ours)] = weight[tuple(theirs)]
    lost = (weight.flatten(2).sum(2) - out.flatten(2).sum(2)) @ mean
    return Affine(out, layer.offset + lost)


@dataclass(frozen=True)
class LayerFusion:
    """Makes each layer of a sequential model of neighbouring layers of a deeper sequential relative.

    Both are nested `nn.Sequential` of convolutions (one group, no dilation, zero padding), linear layers, elementwise
    activations, pooling, `Flatten` and dropout. Layers are not fused across pooling. A model's layer without a bias
    loses that of the fused one, which a note tells.
    """

    name: str = "layer-fusion"
    kind: Kind = Kind.INHERITED
    needs: tuple[str, ...] = ("relative",)

    def propose(self, model: nn.Module, request: Request) -> Proposal:
        """A weight and bias for every layer.

        Raises:
            ConfigError: the model or the relative is not of the form above, or there is no way to fuse.
            ModelError: the relative is no module, has no values, or cannot be run on the data.
            DataError: data are given, but empty.
        """
        try:
            check_model(request.relative)  # type: ignore[arg-type]
        except ModelError as error:
            raise ModelError(f"the relative cannot be inherited from: {error}") from error
        relative: nn.Module = request.relative  # type: ignore[assignment]
        ours, theirs = units_of(model, "the model"), units_of(relative, "the relative")
        groups = groups_of(theirs, ours)
        proposal = Proposal()
        if request.data is None:
            moments = assumed_moments(theirs)
            proposal.notes.append(f"{self.name}: without data, inputs of mean 0 and variance 1 are assumed")
        else:
            with isolated(request.seed, self.name):
                inputs = inputs_of(first_batch(request.data, self.name))
            moments = measured_moments(relative, theirs, inputs)
        for unit, group in zip(ours, groups, strict=True):
            made = fused(group, unit, moments)
            paths = ", ".join(part.path or "the relative" for part in group)
            for leaf, value in (("weight", made.weight), ("bias", made.offset)):
                full = f"{unit.path}.{leaf}" if unit.path else leaf
                if full in request.inventory:
                    proposal.values[full] = value.clone()
                    proposal.sources[full] = f"{self.name}: {'fused' if len(group) > 1 else 'copied'} from {paths}"
                elif leaf == "bias" and value.any():
                    proposal.notes.append(f"{self.name}: {unit.path} has no bias for the one that {paths} would give")
        return proposal


register(
    "layer-fusion", kind=Kind.INHERITED, needs=("relative",), paper="Ghods et al., CISS 2020, arXiv 2001.10509",
    summary="layers of a deeper sequential relative, fused with the least mean square error",
)(LayerFusion)  # fmt: skip
