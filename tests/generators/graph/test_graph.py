"""`generators.graph.graph`: the passes over a graph against slow and obvious ones."""

from __future__ import annotations

from collections import deque

import pytest
import torch
import torchvision
from torch import nn

from generators.graph import Graph, Node, trace


def breadth_first(graph: Graph, limit: int | None) -> list[list[int]]:
    """Shortest ways by a search from every node."""
    table = []
    for start in range(len(graph)):
        row = [-1] * len(graph)
        row[start] = 0
        queue = deque([start])
        while queue:
            here = queue.popleft()
            for following in graph.successors[here]:
                if row[following] < 0:
                    row[following] = row[here] + 1
                    queue.append(following)
        table.append([-1 if limit is not None and steps > limit else steps for steps in row])
    return table


def longest_ways(graph: Graph) -> list[float]:
    """Depth by recursion over predecessors."""

    def length(index: int) -> int:
        return max((length(before) + 1 for before in graph.predecessors[index]), default=0)

    return [length(index) / length(len(graph) - 1) for index in range(len(graph))]


@pytest.mark.parametrize("limit", [None, 3, 0, 254, 255])
def test_distances_are_those_of_a_breadth_first_search(limit):
    """Close pairs are the positive ones among them; limits on both sides of what a byte holds."""
    graph = trace(torchvision.models.densenet121())
    wanted = breadth_first(graph, limit)
    assert graph.distances(limit).tolist() == wanted
    if limit is not None:
        pairs = {(i, j, steps) for i, row in enumerate(wanted) for j, steps in enumerate(row) if steps > 0}
        found = list(zip(*(each.tolist() for each in graph.close_pairs(limit)), strict=True))
        assert set(found) == pairs and len(found) == len(pairs)


def test_depth_is_the_longest_way():
    graph = trace(torchvision.models.resnet18())
    assert [node.depth for node in graph.nodes] == pytest.approx(longest_ways(graph))


def test_distance_to_the_output_is_the_last_column():
    graph = trace(torchvision.models.googlenet(init_weights=False))
    assert [node.attributes["to_output"] for node in graph.nodes] == graph.distances()[:, -1].tolist()


def test_edges_are_in_topological_order_and_unique():
    for name in ("swin_t", "googlenet"):
        model = torchvision.models.get_model(name, **({"init_weights": False} if name == "googlenet" else {}))
        edges = trace(model).edges
        assert edges.dtype == torch.int64
        assert (edges[0] < edges[1]).all()
        assert (edges[1].diff() >= 0).all()
        assert len(set(map(tuple, edges.T.tolist()))) == edges.shape[1]


def net(width: int = 8, *, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width, bias=bias), nn.ReLU(), nn.Linear(width, 2))


def test_signature_depends_on_structure_and_not_on_values():
    assert trace(net()).signature == trace(net()).signature
    assert trace(net(), torch.randn(5, 4)).signature == trace(net()).signature
    different = {trace(model).signature for model in (net(), net(9), net(bias=False), nn.Sequential(net()))}
    assert len(different) == 4
    assert trace(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))).signature not in different


def test_repr_counts_kinds():
    assert repr(trace(net())) == "Graph(4 nodes, 3 edges: 1 input, 2 linear, 1 output)"


def test_output_layers_of_a_chain_with_a_branch():
    """0 input -> 1 linear -> 2 linear -> 4 output, 1 -> 3 linear -> 4, and 5th, unread, beside: 2 and 3 are heads."""
    rows = [("input", 2), ("linear", 2), ("linear", 1), ("linear", 1), ("linear", -1), ("output", 0)]
    nodes = tuple(Node(i, kind, attributes={"to_output": steps}) for i, (kind, steps) in enumerate(rows))
    edges = torch.tensor([[0, 1, 1, 1, 2, 3], [1, 2, 3, 4, 5, 5]])
    assert Graph(nodes, edges).output_layers == {2, 3}
