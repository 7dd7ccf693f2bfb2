"""The inventory: every parameter of a model with its role, fans, consumer and depth.

Roles come from the base class of the owning module and the shape of the tensor; with a traced graph
(`generators.graph`), also from the operation that consumes it. Never from a substring of a name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm


class Role(str, Enum):
    """What a parameter is for. The value is the word used in reports and files."""

    CONV_WEIGHT = "conv_weight"
    CONV_BIAS = "conv_bias"
    LINEAR_WEIGHT = "linear_weight"
    LINEAR_BIAS = "linear_bias"
    ATTENTION_WEIGHT = "attention_in_weight"  # stacked query, key, value projections
    RECURRENT_WEIGHT = "recurrent_weight"  # stacked gates, input-to-hidden or hidden-to-hidden
    RECURRENT_BIAS = "recurrent_bias"
    NORM_SCALE = "norm_scale"
    NORM_SHIFT = "norm_shift"
    EMBEDDING = "embedding"
    POSITION_TABLE = "position_table"
    TOKEN = "token"
    LAYER_SCALE = "layer_scale"
    RELATIVE_BIAS = "relative_bias_table"
    GAIN = "gain"
    TEMPERATURE = "temperature"
    SLOPE = "activation_slope"
    MATRIX = "matrix"  # two or more axes, consumer unknown
    OTHER = "other"


MATRIX_ROLES = frozenset(
    {Role.CONV_WEIGHT, Role.LINEAR_WEIGHT, Role.ATTENTION_WEIGHT, Role.RECURRENT_WEIGHT, Role.MATRIX}
)
BIAS_ROLES = frozenset({Role.CONV_BIAS, Role.LINEAR_BIAS, Role.RECURRENT_BIAS, Role.NORM_SHIFT})


@dataclass(frozen=True)
class ParameterInfo:
    """One parameter.

    Attributes:
        name: its name in the state dict.
        shape: its shape as torch stores it.
        role: what it is for.
        module: path of the owning module ("" for the root).
        module_type: the torch base class that decided the role ("Conv2d", "Linear", ...) or the owner's own class name.
        fan_in: inputs per output unit: input channels per group x kernel positions.
        fan_out: outputs per input unit: output channels per group x kernel positions.
        kernel: spatial kernel size, () for everything but convolutions.
        groups: convolution groups, 1 elsewhere.
        blocks: how many stacked matrices the first axis holds (3 for query-key-value, 4 for LSTM gates, 1 elsewhere).
        depth: position of the owner in the model, 0 (input) to 1 (output).
        order: index of the owning module among those that own parameters, in registration order.
        consumer: kind of the graph node that consumes it, None without a graph.
        output: True for the weight or bias of the layer that makes the model's output (the classifier).
        transposed: True for transposed convolutions (stored input-first).
        trainable: `requires_grad`.
        tied_to: name of the first parameter that shares this storage, or None.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    module: str
    module_type: str
    fan_in: int
    fan_out: int
    kernel: tuple[int, ...] = ()
    groups: int = 1
    blocks: int = 1
    depth: float = 0.0
    order: int = 0
    consumer: str | None = None
    output: bool = False
    transposed: bool = False
    trainable: bool = True
    tied_to: str | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def he_std(self) -> float:
        """sqrt(2 / fan_in), or sqrt(1 / fan_in) for the layer that makes the output (no ReLU follows)."""
        return math.sqrt((1.0 if self.output else 2.0) / max(self.fan_in, 1))


@dataclass(frozen=True)
class Inventory:
    """All parameters of one model in registration order; a mapping from name to `ParameterInfo`."""

    parameters: tuple[ParameterInfo, ...]

    def __iter__(self) -> Iterator[ParameterInfo]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)

    def __getitem__(self, name: str) -> ParameterInfo:
        for info in self.parameters:
            if info.name == name:
                return info
        raise KeyError(name)

    def where(self, *roles: Role) -> list[ParameterInfo]:
        """The parameters that have one of `roles`."""
        return [info for info in self.parameters if info.role in roles]


def _owner_role(owner: nn.Module, leaf: str, shape: tuple[int, ...]) -> tuple[Role, str]:
    """Role and deciding base class of parameter `leaf` of module `owner`."""
    weight = leaf.startswith("weight") or leaf.startswith("in_proj_weight")
    if isinstance(owner, _ConvNd):
        name = next(base.__name__ for base in type(owner).__mro__ if base.__module__.startswith("torch.nn"))
        return (Role.CONV_WEIGHT if len(shape) > 1 else Role.CONV_BIAS), name
    if isinstance(owner, nn.MultiheadAttention):
        if len(shape) == 2:
            return Role.ATTENTION_WEIGHT, "MultiheadAttention"
        return (Role.LINEAR_BIAS if len(shape) == 1 else Role.TOKEN), "MultiheadAttention"
    if isinstance(owner, nn.RNNBase | nn.RNNCellBase):
        return (Role.RECURRENT_WEIGHT if len(shape) == 2 else Role.RECURRENT_BIAS), type(owner).__name__
    if isinstance(owner, nn.Linear | nn.Bilinear):
        return (Role.LINEAR_WEIGHT if len(shape) > 1 else Role.LINEAR_BIAS), "Linear"
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return Role.EMBEDDING, "Embedding"
    if isinstance(owner, _NormBase | _InstanceNorm | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
        return (Role.NORM_SCALE if weight else Role.NORM_SHIFT), "Norm"
    if isinstance(owner, nn.PReLU):
        return Role.SLOPE, "PReLU"
    return (Role.MATRIX if len(shape) > 1 else Role.OTHER), type(owner).__name__


def _geometry(owner: nn.Module, role: Role, shape: tuple[int, ...]) -> dict:
    """Fans, kernel, groups, blocks and transposition of a parameter."""
    if role is Role.CONV_WEIGHT and isinstance(owner, _ConvNd):
        kernel = shape[2:]
        area = math.prod(kernel)
        transposed = isinstance(owner, _ConvTransposeNd)
        inputs = owner.in_channels // owner.groups
        outputs = owner.out_channels // owner.groups
        return dict(
            fan_in=inputs * area, fan_out=outputs * area, kernel=kernel, groups=owner.groups, transposed=transposed
        )
    blocks = 1
    if isinstance(owner, nn.MultiheadAttention) and role is Role.ATTENTION_WEIGHT and shape[0] == 3 * owner.embed_dim:
        blocks = 3
    elif isinstance(owner, nn.LSTM | nn.LSTMCell) and role is Role.RECURRENT_WEIGHT and shape[0] % 4 == 0:
        blocks = 4
    elif isinstance(owner, nn.GRU | nn.GRUCell) and role is Role.RECURRENT_WEIGHT and shape[0] % 3 == 0:
        blocks = 3
    if len(shape) < 2:
        return dict(fan_in=1, fan_out=shape[0] if shape else 1, blocks=blocks)
    return dict(fan_in=math.prod(shape[1:]), fan_out=shape[0] // blocks * math.prod(shape[2:]), blocks=blocks)


def inventory(model: nn.Module) -> Inventory:
    """Every parameter of `model`, tied ones once per name.

    The model is neither run nor changed.

    Args:
        model: any module; lazy modules must have been run once.
    """
    owners = {path: module for path, module in model.named_modules(remove_duplicate=False)}
    named = list(model.named_parameters(remove_duplicate=False))
    paths = list(dict.fromkeys(name.rpartition(".")[0] for name, _ in named))
    first: dict[int, str] = {}
    infos = []
    last_matrix = ""
    for name, value in named:
        path, _, leaf = name.rpartition(".")
        shape = tuple(value.shape) if not isinstance(value, torch.nn.parameter.UninitializedParameter) else ()
        role, module_type = _owner_role(owners[path], leaf, shape)
        order = paths.index(path)
        tied_to = first.setdefault(id(value), name)
        if role in MATRIX_ROLES:
            last_matrix = path
        infos.append(
            dict(
                name=name, shape=shape, role=role, module=path, module_type=module_type, order=order,
                depth=order / max(len(paths) - 1, 1), trainable=value.requires_grad,
                tied_to=None if tied_to == name else tied_to, **_geometry(owners[path], role, shape),
            )
        )  # fmt: skip
    return Inventory(
        tuple(
            ParameterInfo(
                **info,
                output=info["module"] == last_matrix and info["role"] in (Role.LINEAR_WEIGHT, Role.LINEAR_BIAS),
            )
            for info in infos
        )
    )
