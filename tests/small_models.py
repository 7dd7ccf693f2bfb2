"""Models that several tests write down in a line or two, and their graphs as rows to compare with."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from generators.graph import Graph


class Forward(nn.Module):
    """A module whose forward is the function that it is given: `forward(module, x)`."""

    def __init__(self, function: Callable[[Any, Any], Any], **members: Any) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x):
        return self.function(self, x)


def sequential_mlp(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def sequential_conv_net(*widths: int, hidden: int = 0, kernel: int = 3) -> nn.Sequential:
    """Convolutions on 8 x 8 images of one channel, pooling to 4 x 4, one or two linear layers."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip((1, *widths), widths, strict=False):
        layers += [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.ReLU()]
    head = [nn.Linear(16 * widths[-1], hidden), nn.ReLU(), nn.Linear(hidden, 10)] if hidden else []
    return nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), *(head or [nn.Linear(16 * widths[-1], 10)]))


def attention_block(fused: bool, *, width: int = 8, linear: Callable[[int, int], nn.Module] = nn.Linear) -> Forward:
    """Self-attention of `[batch, tokens, width]` with two heads: torch's fused operation, or matrix products by hand.

    `linear(inputs, outputs)` makes its layers.
    """

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in m.qkv(m.norm(x)).chunk(3, -1))
        if fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = F.dropout((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1), 0.1, m.training) @ v
        return x + m.out(y.transpose(1, 2).flatten(2))

    return Forward(forward, norm=nn.LayerNorm(width), qkv=linear(width, 3 * width), out=linear(width, width))


class InputFirst(nn.Module):
    """A linear layer whose weight is stored `[inputs, outputs]`, as those of GPT-2 are."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


def rows(graph: Graph) -> list[tuple]:
    """The graph as (kind, parameters, predecessors) per node."""
    return [(node.kind, node.parameters, graph.predecessors[node.index]) for node in graph.nodes]


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """What DistributedDataParallel needs to be made."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()
