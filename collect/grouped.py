"""K networks of one architecture as one network with K groups.

Activations are `[N, K C, H, W]` in channels-last order; a convolution gets K times its groups; batch norm over K C
channels *is* batch norm per member; a linear layer is one batched product. The network is traced once into a list of
leaf modules and additions, and every kind of leaf module has a rule.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from collect.architectures.resnet import Gain, Shortcut
from collect.architectures.vit import ClassToken, Mix, Tokens, ToTokens
from collect.dropout import MaskedLinear

EVALUATION_BATCH = 64  # images at a time in evaluations: small, so that activations of all members stay in cache

Tensors = dict[str, Tensor]


class UnsupportedError(Exception):
    """A form cannot run this module."""


# A rule gets the leaf module, the stacked tensors of its own (leaf name -> [K, ...]), the value and K. A value is
# [N, K C, H, W] up to `Flatten` or `ToTokens`, and [K, N, ..., features] after it.

Rule = Callable[[Any, Tensors, Tensor, int], Tensor]


def _convolution(module: nn.Conv2d, own: Tensors, images: Tensor, members: int) -> Tensor:
    if module.padding_mode != "zeros":
        raise UnsupportedError(f"convolution with padding mode {module.padding_mode}")
    weight, bias = own["weight"].flatten(0, 1), own["bias"].flatten() if "bias" in own else None
    # A calibration pass has hundreds of images; outside the cache grouped convolution is up to four times slower.
    pieces = (images,) if torch.is_grad_enabled() else images.split(EVALUATION_BATCH)
    groups = members * module.groups
    outputs = [
        F.conv2d(piece, weight, bias, module.stride, module.padding, module.dilation, groups) for piece in pieces
    ]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _batch_norm(module: nn.BatchNorm2d, own: Tensors, images: Tensor, members: int) -> Tensor:
    if not module.track_running_stats or not module.affine or module.momentum is None:
        raise UnsupportedError("batch norm without running statistics, scale or momentum")
    if module.training:
        own["num_batches_tracked"].add_(1)
    # view, not flatten: the statistics are updated in place
    return F.batch_norm(
        images, own["running_mean"].view(-1), own["running_var"].view(-1), own["weight"].flatten(),
        own["bias"].flatten(), module.training, module.momentum, module.eps,
    )  # fmt: skip


def _linear(module: nn.Linear, own: Tensors, features: Tensor, members: int) -> Tensor:
    rows, weight = features.flatten(1, -2), own["weight"].transpose(1, 2)
    outputs = torch.baddbmm(own["bias"][:, None], rows, weight) if "bias" in own else rows @ weight
    return outputs.unflatten(1, features.shape[1:-1])


def _masked_linear(module: MaskedLinear, own: Tensors, features: Tensor, members: int) -> Tensor:
    return _linear(module, own, features * own["mask"] if module.training else features, members)


def _flatten(module: nn.Flatten, own: Tensors, images: Tensor, members: int) -> Tensor:
    if module.start_dim != 1 or module.end_dim != -1:
        raise UnsupportedError("flattening of some axes only")
    return images.unflatten(1, (members, -1)).flatten(2).transpose(0, 1)


def _shortcut(module: Shortcut, own: Tensors, images: Tensor, members: int) -> Tensor:
    pixels = images[:, :, :: module.stride, :: module.stride].permute(0, 2, 3, 1).unflatten(3, (members, -1))
    return F.pad(pixels, (module.before, module.after)).flatten(3).permute(0, 3, 1, 2)


def _gain(module: Gain, own: Tensors, images: Tensor, members: int) -> Tensor:
    return images * own["gain"].repeat_interleave(images.shape[1] // members)[:, None, None]


def _to_tokens(module: ToTokens, own: Tensors, images: Tensor, members: int) -> Tensor:
    return images.permute(0, 2, 3, 1).unflatten(3, (members, -1)).flatten(1, 2).movedim(2, 0)


def _tokens(module: Tokens, own: Tensors, patches: Tensor, members: int) -> Tensor:
    token = own["token"].expand(-1, patches.shape[1], -1, -1)
    return torch.cat([token, patches], dim=2) + own["position"]


def _layer_norm(module: nn.LayerNorm, own: Tensors, value: Tensor, members: int) -> Tensor:
    scale, shift = (own[name].view(members, *[1] * (value.dim() - 2), -1) for name in ("weight", "bias"))
    return F.layer_norm(value, module.normalized_shape, eps=module.eps) * scale + shift


def _unchanged(module: nn.Module, own: Tensors, value: Tensor, members: int) -> Tensor:
    return module(value)


RULES: dict[type[nn.Module], Rule] = {
    nn.Conv2d: _convolution,
    nn.BatchNorm2d: _batch_norm,
    nn.Linear: _linear,
    MaskedLinear: _masked_linear,
    nn.Flatten: _flatten,
    Shortcut: _shortcut,
    Gain: _gain,
    ToTokens: _to_tokens,
    Tokens: _tokens,
    nn.LayerNorm: _layer_norm,
    **dict.fromkeys((nn.ReLU, nn.GELU, nn.Identity), _unchanged),  # elementwise
    **dict.fromkeys((nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d), _unchanged),  # channel by channel
    **dict.fromkeys((Mix, ClassToken), _unchanged),  # work on the last axes
}


class _Tracer(fx.Tracer):
    """Symbolic tracing that stops at the modules for which there is a rule."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in RULES


@dataclass(frozen=True)
class _Step:
    """One operation: `result` <- `rule` of leaf `module` on `inputs`, or their sum where `module` is None."""

    result: str
    inputs: tuple[str, ...]
    module: nn.Module | None
    own: tuple[tuple[str, str], ...]  # (leaf name, full name) of the module's tensors
    done_with: tuple[str, ...]  # values that no later step reads


class Grouped:
    """All members as one network with K groups.

    Raises:
        UnsupportedError: the module does anything else than chain leaf modules with rules and add their results.
    """

    name = "grouped"

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.steps = tuple(self._compile(module))

    @staticmethod
    def _compile(module: nn.Module) -> Iterator[_Step]:
        try:
            graph = _Tracer().trace(module)
        except Exception as error:  # whatever the model's own code raises under symbolic tracing
            raise UnsupportedError(f"not traceable: {error}") from error
        last_reader: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            last_reader.update(dict.fromkeys(node.all_input_nodes, node))
        for node in graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            leaf = None
            if node.op == "call_module":
                leaf = module.get_submodule(str(node.target))
            elif node.target not in (operator.add, torch.add) or len(node.all_input_nodes) != 2:
                raise UnsupportedError(f"operation {node.target}")
            names = [name for name, _ in (*leaf.named_parameters(), *leaf.named_buffers())] if leaf else []
            yield _Step(
                result=node.name,
                inputs=tuple(source.name for source in node.all_input_nodes),
                module=leaf,
                own=tuple((name, f"{node.target}.{name}") for name in names),
                done_with=tuple(source.name for source, reader in last_reader.items() if reader is node),
            )

    def __call__(self, parameters: Tensors, buffers: Tensors, images: Tensor, *, training: bool) -> Tensor:
        """Logits `[K, N, classes]` for images `[K, N, C, H, W]`; see `collect.forms.Form`."""
        self.module.train(training)
        members = len(images)
        tensors = parameters | buffers
        merged = images.transpose(0, 1).flatten(1, 2).contiguous(memory_format=torch.channels_last)
        values = {self.steps[0].inputs[0]: merged}
        for step in self.steps:
            inputs = [values[name] for name in step.inputs]
            for name in step.done_with:
                del values[name]
            if step.module is None:
                value = operator.add(*inputs)
            else:
                own = {leaf: tensors[name] for leaf, name in step.own}
                value = RULES[type(step.module)](step.module, own, inputs[0], members)
            values[step.result] = value
        return value
