"""The inventory: every parameter of a model with its role, fans, consumer and depth.

Roles come from the base class of the owning module and the shape of the tensor; with a traced graph
(`generators.graph`), also from the operation that consumes it (`generators.graph.roles`). Never from a substring of a
name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

if TYPE_CHECKING:
    from generators.graph import Graph


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
    OFFSET = "offset"  # one number that is added to a stream
    TEMPERATURE = "temperature"
    SLOPE = "activation_slope"
    MATRIX = "matrix"  # two or more axes, consumer unknown
    NO_FLOAT = "integer_complex_or_quantised"  # whatever it is for: no initialiser writes such numbers
    OTHER = "other"


MATRIX_ROLES = frozenset(
    {Role.CONV_WEIGHT, Role.LINEAR_WEIGHT, Role.ATTENTION_WEIGHT, Role.RECURRENT_WEIGHT, Role.MATRIX}
)
BIAS_ROLES = frozenset({Role.CONV_BIAS, Role.LINEAR_BIAS, Role.RECURRENT_BIAS, Role.NORM_SHIFT})
FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


@dataclass(frozen=True)
class ParameterInfo:
    """One parameter.

    Attributes:
        name: its name in the state dict.
        shape: its shape as torch stores it.
        role: what it is for.
        module: path of the owning module ("" for the root); of the parametrised one for what parametrises it.
        module_type: the torch base class that decided the role ("Conv2d", "Linear", ...) or the owner's own class name.
        fan_in: inputs per output unit: input channels per group x kernel positions.
        fan_out: outputs per input unit: output channels per group x kernel positions.
        kernel: spatial kernel size, () for everything but convolutions.
        groups: convolution groups, 1 elsewhere.
        blocks: how many stacked matrices it holds (3 for query-key-value, 4 for LSTM gates, 1 elsewhere).
        depth: position in the model, 0 (input) to 1 (output): on the longest path of the graph, or, without a graph, of
            the owner in registration order.
        order: index of the owning module among those that own parameters, in registration order.
        consumer: kind of the graph node that consumes it ("convolution", "add", ...); None without a graph or if the
            forward does not use it.
        output: True for the weight or bias of a layer that makes the model's output (a classifier): with a graph,
            every layer whose result reaches the output and no other matrix; without one, the last linear layer.
        transposed: True for weights that are stored input-first, such as those of transposed convolutions.
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
    def block_axis(self) -> int:
        """The axis along which matrices are stacked: that of the outputs."""
        return int(self.transposed and self.blocks > 1)

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

    @cached_property
    def _by_name(self) -> dict[str, ParameterInfo]:
        return {info.name: info for info in self.parameters}

    def __getitem__(self, name: str) -> ParameterInfo:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def where(self, *roles: Role) -> list[ParameterInfo]:
        """The parameters that have one of `roles`."""
        return [info for info in self.parameters if info.role in roles]


def _conv_shape(owner: _ConvNd) -> tuple[int, ...]:
    first, second = owner.out_channels, owner.in_channels
    if isinstance(owner, _ConvTransposeNd):
        first, second = second, first
    return (first, second // owner.groups, *owner.kernel_size)


def _weight_or_bias(shape: tuple[int, ...], leaf: str, weight: tuple[int, ...], roles: tuple[Role, Role]) -> Role:
    """Role of a parameter of a layer whose weight has shape `weight`; subclasses may add gains of their own."""
    if shape == weight:
        return roles[0]
    if len(shape) == 1 and leaf in ("bias", "bias_orig"):  # the second is what torch's pruning makes of it
        return roles[1]
    return Role.MATRIX if sum(size > 1 for size in shape) > 1 else Role.GAIN


def _owner_role(owner: nn.Module, leaf: str, shape: tuple[int, ...]) -> tuple[Role, str]:
    """Role and deciding base class of parameter `leaf` of module `owner`."""
    bases = (base.__name__ for base in type(owner).__mro__ if base.__module__.startswith("torch.nn.modules"))
    if isinstance(owner, _ConvNd):
        return _weight_or_bias(shape, leaf, _conv_shape(owner), (Role.CONV_WEIGHT, Role.CONV_BIAS)), next(bases)
    if isinstance(owner, nn.Linear | nn.Bilinear):
        inputs = (owner.in_features,) if isinstance(owner, nn.Linear) else (owner.in1_features, owner.in2_features)
        weight = (owner.out_features, *inputs)
        return _weight_or_bias(shape, leaf, weight, (Role.LINEAR_WEIGHT, Role.LINEAR_BIAS)), "Linear"
    if isinstance(owner, nn.MultiheadAttention):
        if len(shape) == 2:
            return Role.ATTENTION_WEIGHT, "MultiheadAttention"
        return (Role.LINEAR_BIAS if len(shape) == 1 else Role.TOKEN), "MultiheadAttention"
    if isinstance(owner, nn.RNNBase | nn.RNNCellBase):
        return (Role.RECURRENT_WEIGHT if len(shape) == 2 else Role.RECURRENT_BIAS), next(bases)
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag):
        return Role.EMBEDDING, "Embedding"
    if isinstance(owner, _NormBase | _InstanceNorm | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
        return {"weight": Role.NORM_SCALE, "bias": Role.NORM_SHIFT}.get(leaf, Role.OTHER), "Norm"
    if isinstance(owner, nn.PReLU):
        return Role.SLOPE, "PReLU"
    # a free parameter: tables and tokens start with an axis of 1, matrices do not
    matrix = len(shape) > 1 and shape[0] > 1 and sum(size > 1 for size in shape) > 1
    return (Role.MATRIX if matrix else Role.OTHER), type(owner).__name__


def _geometry(owner: nn.Module, role: Role, shape: tuple[int, ...]) -> dict[str, Any]:
    """Fans, kernel, groups, blocks and transposition of a parameter."""
    if role is Role.CONV_WEIGHT and isinstance(owner, _ConvNd):
        area = math.prod(owner.kernel_size)
        return dict(
            fan_in=owner.in_channels // owner.groups * area,
            fan_out=owner.out_channels // owner.groups * area,
            kernel=tuple(owner.kernel_size),
            groups=owner.groups,
            transposed=isinstance(owner, _ConvTransposeNd),
        )
    blocks = 1
    if isinstance(owner, nn.MultiheadAttention) and role is Role.ATTENTION_WEIGHT:
        blocks = 3 if shape[0] == 3 * owner.embed_dim else 1
    elif role is Role.RECURRENT_WEIGHT:
        gates = 4 if isinstance(owner, nn.LSTM | nn.LSTMCell) else 3 if isinstance(owner, nn.GRU | nn.GRUCell) else 1
        blocks = gates if shape[0] == gates * getattr(owner, "hidden_size", 0) else 1  # else the projection of an LSTM
    if len(shape) < 2:
        return dict(fan_in=1, fan_out=shape[0] if shape else 1, blocks=blocks)
    return dict(fan_in=math.prod(shape[1:]), fan_out=shape[0] // blocks * math.prod(shape[2:]), blocks=blocks)


def _resolve(name: str, modules: dict[str, nn.Module]) -> tuple[str, str]:
    """Path of the owner and what the parameter is there: `c.parametrizations.weight.original0` is the weight of c."""
    path, _, leaf = name.rpartition(".")
    if isinstance(modules[path], ParametrizationList):
        path, _, leaf = path.rpartition(".")
        path = path.rpartition(".")[0] if "." in path else ""
    return path, leaf


def memory_of(value: Any) -> object:
    """A key that two parameters share if they are the same numbers: one object, or two views of the same memory."""
    if is_lazy(value) or value.layout is not torch.strided:
        return id(value)
    return value.untyped_storage()._cdata, value.storage_offset(), value.shape, value.stride()


def _shape(value: Any) -> tuple[int, ...]:
    """Sizes of a parameter; () for a lazy one, which has none yet."""
    return () if is_lazy(value) else tuple(value.shape)


def inventory(model: nn.Module, graph: Graph | None = None) -> Inventory:
    """Every parameter of `model`, tied ones once per name.

    The model is neither run nor changed.

    Args:
        model: any module; lazy modules must have been run once.
        graph: its traced graph. Without it, only parameters of torch's own layers and their subclasses have a known
            role; free parameters of other modules are `MATRIX` or `OTHER`.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    named = list(model.named_parameters(remove_duplicate=False))
    places = [_resolve(name, modules) for name, _ in named]
    orders = {path: order for order, path in enumerate(dict.fromkeys(path for path, _ in places))}
    largest: dict[tuple[str, str], int] = {}  # of several tensors that make one weight, the largest has its role
    for place, (_, value) in zip(places, named, strict=True):
        largest[place] = max(largest.get(place, 0), math.prod(_shape(value)))
    first: dict[object, str] = {}
    infos: list[ParameterInfo] = []
    last_matrix = ""
    for (path, leaf), (name, value) in zip(places, named, strict=True):
        shape = _shape(value)
        role, module_type = _owner_role(modules[path], leaf, shape)
        if math.prod(shape) < largest[path, leaf]:
            role = Role.GAIN
        if value.dtype not in FLOATS:
            role = Role.NO_FLOAT
        if role in MATRIX_ROLES:
            last_matrix = path
        tied_to = first.setdefault(memory_of(value), name)
        infos.append(
            ParameterInfo(
                name=name, shape=shape, role=role, module=path, module_type=module_type, order=orders[path],
                depth=orders[path] / max(len(orders) - 1, 1), trainable=value.requires_grad,
                tied_to=None if tied_to == name else tied_to, **_geometry(modules[path], role, shape),
            )
        )  # fmt: skip
    if graph is not None:
        from generators.graph.roles import refined

        return Inventory(tuple(refined(info, graph) for info in infos))
    linear = (Role.LINEAR_WEIGHT, Role.LINEAR_BIAS)
    return Inventory(
        tuple(replace(i, output=True) if i.module == last_matrix and i.role in linear else i for i in infos)
    )
