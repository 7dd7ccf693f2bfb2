"""The traced graph against independent ways to the same facts: symbolic tracing (torch.fx) and back-propagation."""

from __future__ import annotations

import operator

import pytest
import torch
import torchvision
from torch import fx, nn

from generators.graph import trace

KINDS = {
    nn.modules.conv._ConvNd: "convolution",
    nn.Linear: "linear",
    nn.modules.batchnorm._NormBase: "normalisation",
}
MERGES = {operator.add: "add", operator.iadd: "add", operator.mul: "multiply", torch.cat: "concatenate"}


def symbolic(model: nn.Module) -> list[tuple]:
    """(kind, parameters, predecessors) per node, from the modules and functions that torch.fx sees."""
    rows: list[tuple] = []
    source: dict[fx.Node, int] = {}
    traced = fx.symbolic_trace(model)
    for node in traced.graph.nodes:
        before = tuple(dict.fromkeys(source[other] for other in node.all_input_nodes if other in source))
        module = traced.get_submodule(node.target) if node.op == "call_module" else None
        names = () if module is None else tuple(f"{node.target}.{name}" for name, _ in module.named_parameters())
        if node.op == "placeholder":
            rows.append(("input", (), ()))
        elif node.op == "output":
            rows.append(("output", (), before))
        elif names:
            rows.append((next(kind for base, kind in KINDS.items() if isinstance(module, base)), names, before))
        elif len(before) > 1:
            rows.append((MERGES[node.target], (), before))
        else:
            if before:
                source[node] = before[0]
            continue
        source[node] = len(rows) - 1
    return rows


@pytest.mark.parametrize(
    "name",
    ["resnet18", "densenet121", "mobilenet_v3_small", "efficientnet_b0", "shufflenet_v2_x0_5", "squeezenet1_1",
     "regnet_y_400mf", "mnasnet0_5"],
)  # fmt: skip
def test_edges_are_those_of_symbolic_tracing(name):
    model = torchvision.models.get_model(name).eval()
    graph = trace(model)
    assert [(node.kind, node.parameters, graph.predecessors[node.index]) for node in graph.nodes] == symbolic(model)


class Frozen(nn.Module):
    """A model that is always in evaluation mode."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        self.model.training = False
        return self.model(x)


@pytest.mark.parametrize("training", [False, True])
def test_unused_parameters_are_those_without_a_gradient(training):
    """GoogLeNet reads its auxiliary heads in training mode only."""
    inner = torchvision.models.googlenet(init_weights=False)
    model = inner.train() if training else Frozen(inner)
    output = model(torch.randn(2, 3, 64, 64))
    sum(value.sum() for value in (output if training else [output])).backward()
    without = tuple(name for name, value in model.named_parameters() if value.grad is None)
    assert len(without) == (0 if training else 14)
    assert trace(model, torch.zeros(2, 3, 64, 64)).unused == without
