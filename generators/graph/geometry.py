"""Attributes of a layer node from the shapes of its operands: channels, kernel, stride, groups, storage order."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from generators.graph.drafts import Call

_TWO_FACTORS = frozenset({"matmul", "mm", "addmm"})


def layer_attributes(
    kind: str, call: Call, weights: list[Tensor], data: Tensor, result: Tensor, stored: tuple[int, ...]
) -> tuple[dict[str, Any], float | None]:
    """Attributes of a layer, see `Node.attributes`.

    Args:
        kind: of the node.
        call: the operation.
        weights: the operands that are made from parameters, the weight before its bias.
        data: the operand that the layer works on.
        result: the layer's result.
        stored: shape of the main parameter as the model stores it.

    Returns:
        The attributes, and the number of grid positions of the result if it is not that of its values / channels.
    """
    weight = next((value for value in weights if value.ndim >= 2), weights[0])
    facts: dict[str, Any] = {"operation": call.base}
    if kind == "convolution":
        return {**facts, **_convolution(call, weight, data, result)}, None
    if kind == "embedding":
        return {**facts, "in_channels": weight.shape[0], "out_channels": weight.shape[-1]}, None
    if kind == "recurrent":  # its result may hold both directions, or the last step alone
        hidden = next((value.shape[1] for value in weights[1:] if value.ndim >= 2), weight.shape[0])
        positions = data.numel() / max(data.shape[-1], 1)
        return {**facts, "in_channels": weight.shape[1], "out_channels": hidden}, positions
    if kind in ("normalisation", "activation"):
        channels = weights[0].numel()
        if kind == "activation" and channels == 1:  # one slope for all
            channels = data.shape[1] if data.ndim > 1 else 1
        return {**facts, "in_channels": channels, "out_channels": channels}, None
    inputs = data.shape[-1] if data.ndim else 1
    outputs = result.shape[-1] if result.ndim else 1
    if weight.ndim == 2:
        square = stored == (inputs, outputs) == (outputs, inputs)
        facts["transposed"] = _multiplies_from_the_right(call, weight) if square else stored == (inputs, outputs)
    return {**facts, "in_channels": inputs, "out_channels": outputs}, None


def _multiplies_from_the_right(call: Call, weight: Tensor) -> bool:
    """Whether a square weight is stored as W of `x @ W`: its shape does not tell, its strides and place do."""
    turned = weight.stride(0) < weight.stride(1)  # a view of the parameter with its axes swapped
    if call.base == "linear":
        return turned
    factors = [value for value in call.operands if value.ndim > 1][-2:]  # an addmm has its summand first
    return call.base in _TWO_FACTORS and len(factors) == 2 and factors[1] is weight and not turned


def _convolution(call: Call, weight: Tensor, data: Tensor, result: Tensor) -> dict[str, Any]:
    kernel = tuple(weight.shape[2:])
    inputs, outputs = (value.shape[1 if value.ndim == weight.ndim else 0] for value in (data, result))
    transposed = "transpose" in call.base or (call.base == "convolution" and bool(call.args[6]))
    stride = call.kwargs.get("stride", 1)
    if len(call.args) > 3 and call.base != "deform_conv2d":
        stride = call.args[3]
    if isinstance(stride, int):
        stride = (stride,)
    return {
        "in_channels": inputs,
        "out_channels": outputs,
        "kernel": kernel,
        "stride": tuple(stride) * (len(kernel) if len(stride) == 1 else 1),
        "groups": (outputs if transposed else inputs) // max(weight.shape[1], 1),
        "transposed": transposed,
    }


class RecurrentStack(NamedTuple):
    """Arguments of `lstm`, `gru`, `rnn_tanh` and `rnn_relu`, batched or packed."""

    data: Tensor
    states: tuple[Tensor, ...]
    weights: list[Tensor]
    layers: int
    directions: int


def recurrent_stack(args: tuple) -> RecurrentStack:
    """From (data, [batch sizes,] states, weights, biases?, layers, dropout, training?, bidirectional?, ...)."""
    packed = isinstance(args[1], Tensor) and not args[1].is_floating_point()
    place = 3 if packed else 2
    states = args[place - 1]
    return RecurrentStack(
        data=args[0],
        states=tuple(states) if isinstance(states, list | tuple) else (states,),
        weights=list(args[place]),
        layers=args[place + 2],
        directions=2 if args[place + 5] else 1,
    )


def recurrent_result(args: tuple) -> tuple[Tensor, ...]:
    """What a recurrent stack returns on the meta device, without the thousands of steps that its own kernel takes.

    Returns:
        The outputs `[..., directions * hidden]` and the last states, shaped as the first.
    """
    stack = recurrent_stack(args)
    width = stack.states[0].shape[-1] * stack.directions
    output = stack.data.new_empty((*stack.data.shape[:-1], width))
    return output, *(torch.empty_like(state) for state in stack.states)
