"""Which layer of a trained relative stands behind which layer of a model.

A layer is a module with parameters or running statistics of its own. Two layers are of one kind if they have the same
parameters by leaf name, role, number of axes, kernel and grouping, the same running statistics, and if both or neither
make the model's output; a 1 x 1 convolution is of the kind of a linear layer. The rule:

1. By name: if every layer of the model that does not make its output has a layer of its kind at the same path of the
   relative, these are pairs. This is the surest sign of one family, and means the first N layers of each stage where
   the relative is deeper.
2. By order, for all layers that are left (all of them, if the names do not agree as a whole): the k-th layer of a kind
   in a stage is paired with the k-th of that kind and stage in the relative. Stages are counted from the input; one is
   what has the same resolution in the traced graph, so models without downsampling have a single one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from generators.batches import map_tensors
from generators.checking import check_model
from generators.errors import ModelError
from generators.graph import Graph, trace
from generators.inventory import Inventory, ParameterInfo, Role, inventory

RUNNING_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Layer:
    """A module that owns parameters or running statistics.

    Attributes:
        path: where it is in the model.
        parameters: its own, in registration order.
        buffers: leaf names of its running statistics.
        stage: number of the resolution at which it works, 0 for the first one; None if the graph does not tell.
    """

    path: str
    parameters: tuple[ParameterInfo, ...] = ()
    buffers: tuple[str, ...] = ()
    stage: int | None = None

    def full(self, leaf: str) -> str:
        """State-dict name of a parameter or buffer of the layer."""
        return f"{self.path}.{leaf}" if self.path else leaf

    def leaf(self, info: ParameterInfo) -> str:
        """The name of one of its parameters within the layer."""
        return info.name.removeprefix(f"{self.path}.") if self.path else info.name

    @property
    def output(self) -> bool:
        return any(info.output for info in self.parameters)

    @property
    def kind(self) -> Hashable:
        """Equal for layers that can inherit from each other, their widths apart."""
        parameters = tuple((self.leaf(info), *_form(info)) for info in self.parameters)
        return parameters, self.buffers, self.output


def is_pointwise(info: ParameterInfo) -> bool:
    """Whether a weight is that of a convolution that does what a linear layer does at every position."""
    return info.role is Role.CONV_WEIGHT and set(info.kernel) == {1} and info.groups == 1 and not info.transposed


def _form(info: ParameterInfo) -> tuple:
    """What two parameters that can inherit from each other have in common."""
    if is_pointwise(info):
        return Role.LINEAR_WEIGHT, 2, (), False
    role = Role.LINEAR_BIAS if info.role is Role.CONV_BIAS else info.role
    return role, len(info.shape), info.kernel, info.groups > 1


def _in_precision_of(model: nn.Module, value: Any) -> Any:
    """`value` with its floating-point tensors in the precision of the first such parameter of `model`."""
    dtype = next((own.dtype for own in model.parameters() if own.is_floating_point()), torch.float32)
    return map_tensors(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, value)


def graph_of_relative(relative: Any, example_inputs: Any = None) -> tuple[Inventory, Graph]:
    """Inventory and graph of a relative.

    Raises:
        ModelError: it is no module, has no values, or cannot be traced.
    """
    try:
        check_model(relative)
        graph = trace(relative, _in_precision_of(relative, example_inputs))
    except ModelError as error:
        raise ModelError(f"the relative cannot be inherited from: {error}") from error
    return inventory(relative, graph), graph


def layers_of(model: nn.Module, found: Inventory, graph: Graph) -> dict[str, Layer]:
    """The layers of `model` by path, in registration order."""
    owned: dict[str, list[ParameterInfo]] = defaultdict(list)
    for info in found:
        owned[info.module].append(info)
    layers = []
    for path, module in model.named_modules(remove_duplicate=False):
        tracked = getattr(module, "track_running_stats", False)
        buffers = [leaf for leaf in RUNNING_STATISTICS if tracked and isinstance(getattr(module, leaf, None), Tensor)]
        if owned[path] or buffers:
            layers.append(Layer(path, tuple(owned[path]), tuple(buffers)))
    resolutions = {layer.path: _resolution(layer, graph) for layer in layers}
    known = sorted({value for value in resolutions.values() if value is not None}, reverse=True)
    ranks: dict[int | None, int] = {value: rank for rank, value in enumerate(known)}
    return {layer.path: replace(layer, stage=ranks.get(resolutions[layer.path])) for layer in layers}


def _resolution(layer: Layer, graph: Graph) -> int | None:
    """log2 of the grid's side relative to the input's, rounded: a class token beside the patches makes no stage."""
    for info in layer.parameters:
        if info.name in graph.by_parameter:
            resolution = graph.nodes[graph.by_parameter[info.name]].attributes.get("resolution")
            return None if resolution is None else round(resolution)
    return None


def match(layers: dict[str, Layer], candidates: dict[str, Layer]) -> dict[str, str]:
    """Path of a layer -> path of the layer of the relative that stands behind it, by the rule of this module."""
    named = {path for path, layer in layers.items() if path in candidates and candidates[path].kind == layer.kind}
    agree = all(path in named for path, layer in layers.items() if not layer.output)
    pairs = {path: path for path in layers if agree and path in named}
    queues: dict[Hashable, list[str]] = defaultdict(list)
    for path, layer in reversed(candidates.items()):
        if path not in pairs:
            queues[layer.kind, layer.stage].append(path)
    for path, layer in layers.items():
        if path not in pairs and queues[layer.kind, layer.stage]:
            pairs[path] = queues[layer.kind, layer.stage].pop()
    return pairs
