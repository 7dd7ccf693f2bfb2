"""Residual branches of known networks, and of random graphs against a search of all ways."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from generators.graph import MATRIX_KINDS, Graph, Node, trace
from generators.graph.branches import Branch, branches, last_nodes
from small_models import Forward, attention_block

timm = pytest.importorskip("timm")
models = pytest.importorskip("torchvision.models")
NORM_OR_MATRIX = MATRIX_KINDS | {"normalisation"}


def _names(graph: Graph, nodes: tuple[int, ...]) -> list[str]:
    return [graph.nodes[index].parameters[0] for index in nodes if graph.nodes[index].parameters]


def _pyramid() -> nn.Module:
    return models.detection.fcos_resnet50_fpn(weights=None, weights_backbone=None).backbone


@pytest.mark.parametrize(
    ("make", "count", "lengths", "last"),
    [
        (models.resnet18, 8, {2}, "bn2.weight"),
        (models.resnet50, 16, {3}, "bn3.weight"),
        (lambda: timm.create_model("resnetv2_50"), 16, {3}, "conv3.weight"),  # pre-activation: no norm at the end
        (lambda: timm.create_model("seresnet50"), 16, {3}, "bn3.weight"),  # the gates are not the end
        (lambda: timm.create_model("res2net50_26w_4s"), 16, {2}, "bn3.weight"),  # sums of chunks within are none
        (lambda: timm.create_model("vit_tiny_patch16_224"), 24, {2}, ("attn.proj.weight", "mlp.fc2.weight")),
        (models.convnext_tiny, 18, {3}, "block.5.weight"),
        (models.mobilenet_v2, 10, {3}, "conv.3.weight"),
        (lambda: timm.create_model("mvitv2_tiny"), 20, {2, 3}, ("attn.proj.weight", "mlp.fc2.weight")),  # no scores
        (models.densenet121, 0, set(), ""),
        (models.squeezenet1_1, 0, set(), ""),
        (lambda: models.googlenet(init_weights=False), 0, set(), ""),
        (_pyramid, 16, {3}, "bn3.weight"),
    ],
)  # fmt: skip
def test_known_networks(make, count: int, lengths: set[int], last: str | tuple[str, ...]) -> None:
    """How many branches, how many matrices on each, and the layer that each ends in."""
    with torch.device("meta"):
        model = make()
    graph = trace(model)
    found = branches(graph)
    assert len(found) == count
    assert {branch.length for branch in found} == lengths
    for branch in found:
        (end,) = _names(graph, last_nodes(graph, branch, NORM_OR_MATRIX))
        assert end.endswith(last), end


def test_projection_shortcuts() -> None:
    """Where a ResNet changes its width the projection is the shortcut, not the branch: 3 blocks of ResNet-18."""
    graph = trace(models.resnet18())
    around = [_names(graph, (branch.shortcut,)) for branch in branches(graph) if branch.shortcut != branch.fork]
    assert [name for names in around for name in names if "downsample" in name] == [
        f"layer{stage}.0.downsample.1.weight" for stage in (2, 3, 4)
    ]
    first = branches(graph)[2]
    assert _names(graph, first.nodes) == [f"layer2.0.{name}.weight" for name in ("conv1", "bn1", "conv2", "bn2")]


def test_ends_of_branches() -> None:
    """Layer scales, gates, several layers that are added up, and values of an attention."""
    graph = trace(models.convnext_tiny())
    for branch in branches(graph):
        (scale,) = _names(graph, last_nodes(graph, branch, NORM_OR_MATRIX | {"parameter"}))
        assert scale.endswith("layer_scale")
    layers = {name: nn.Linear(4, 4) for name in "abcd"}
    gated = trace(Forward(lambda m, x: x + m.b(m.a(x)) * m.c(x).sigmoid(), **layers))
    parallel = trace(Forward(lambda m, x: x + (m.b(m.a(x)) + m.d(m.c(x))), **layers))
    for graph, names in ((gated, ["b.weight"]), (parallel, ["b.weight", "d.weight"])):
        (branch,) = branches(graph)
        assert _names(graph, last_nodes(graph, branch, MATRIX_KINDS)) == names
    graph = trace(attention_block(fused=False), torch.zeros(1, 5, 8))
    (branch,) = branches(graph)
    assert _names(graph, branch.nodes) == ["norm.weight", "qkv.weight", "out.weight"]


def test_sums_that_are_no_branches() -> None:
    """Two heads, gates of one depth, a stream with its position table, and a branch that something else reads too."""
    layers = {name: nn.Linear(4, 4) for name in "abc"}
    for forward in (
        lambda m, x: m.a(x) + m.b(x),
        lambda m, x: m.b(m.a(x)) + m.c(m.a(x)),
        lambda m, x: m.a(x + m.b.bias),
        lambda m, x: torch.cat([x + (y := m.b(m.a(x))), y], -1),
    ):
        assert branches(trace(Forward(forward, **layers))) == ()


def test_encoder_and_decoder() -> None:
    """Branches with two inputs: an attention to the memory counts for the stream of its queries."""
    inputs = torch.zeros(1, 5, 32), torch.zeros(1, 5, 32)
    graph = trace(nn.Transformer(32, 4, 2, 2, 64, batch_first=True), inputs)
    ends = [_names(graph, last_nodes(graph, branch, MATRIX_KINDS))[0] for branch in branches(graph)]
    assert len(ends) == 2 * 2 + 2 * 3
    assert sum("multihead_attn.out_proj" in name for name in ends) == 2


def _random_graph(seed: int) -> Graph:
    """Layers, additions and a few other joins of earlier nodes, all fed by one input."""
    draws = random.Random(seed)
    nodes, edges = [Node(0, "input")], []
    for index in range(1, 14):
        kind = draws.choice(["linear", "linear", "normalisation", "add", "add", "add", "multiply"])
        count = 1 if kind in ("linear", "normalisation") else 2
        sources = {draws.randrange(max(0, index - 3), index) for _ in range(count)}
        nodes.append(Node(index, kind))
        edges += [(source, index) for source in sorted(sources)]
    nodes.append(Node(14, "output"))
    edges.append((13, 14))
    return Graph(tuple(nodes), torch.tensor(edges).T)


def _ways(graph: Graph, start: int, end: int) -> list[tuple[int, ...]]:
    """Every way from `start` to `end`, both included."""
    if start == end:
        return [(end,)]
    return [(*way, end) for before in graph.predecessors[end] for way in _ways(graph, start, before)]


def _slow(graph: Graph) -> set[Branch]:
    """The definition by search: forks are what all ways share, lengths the fewest matrices over all ways."""
    found = set()
    for node in graph.nodes:
        if node.kind != "add" or len(graph.predecessors[node.index]) < 2:
            continue
        ways = _ways(graph, 0, node.index)
        fork = max(set.intersection(*map(set, ways)) - {node.index})
        lengths = {
            end: min(sum(graph.nodes[i].kind == "linear" for i in way[1:]) for way in _ways(graph, fork, end))
            for end in graph.predecessors[node.index]
        }
        shortcut = min(lengths, key=lambda end: (lengths[end], end))
        for end, length in lengths.items():
            nodes = {index for way in _ways(graph, fork, end) for index in way[1:]}
            outside = {after for index in nodes for after in graph.successors[index]} - nodes - {node.index}
            if lengths[shortcut] < 2 and length > lengths[shortcut] and not outside:
                found.add(Branch(fork, node.index, end, shortcut, tuple(sorted(nodes)), length))
    return found


def test_random_graphs_against_all_ways() -> None:
    """The same branches on 600 random graphs, of which many have some."""
    total = 0
    for seed in range(600):
        graph = _random_graph(seed)
        found = branches(graph)
        assert set(found) == _slow(graph) and len(set(found)) == len(found)
        total += len(found)
    assert total > 100


def test_deep_chains_are_cheap() -> None:
    """5,000 blocks one after another: with walks from the front this would take a minute."""
    count = 5_000
    nodes, edges = [Node(0, "input")], []
    for block in range(count):
        nodes += [Node(2 * block + 1, "linear"), Node(2 * block + 2, "add")]
        edges += [(2 * block, 2 * block + 1), (2 * block, 2 * block + 2), (2 * block + 1, 2 * block + 2)]
    found = branches(Graph(tuple(nodes), torch.tensor(edges).T))
    assert len(found) == count and {branch.length for branch in found} == {1}
