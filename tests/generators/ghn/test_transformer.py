"""The transformer encoder against the slow obvious one: distances projected for each of the N x N pairs."""

from __future__ import annotations

import math

import pytest
import torch

from collect.architectures import build
from generators.ghn.features import NodeTable, node_table
from generators.ghn.transformer import TransformerEncoder, distance_pairs
from generators.graph import Graph, trace

LIMIT, HEADS = 3, 2


def graph(name: str) -> Graph:
    return trace(build(name, shape=(1, 8, 8), classes=10), torch.zeros(1, 1, 8, 8))


def encoder(layers: int = 2) -> TransformerEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        return TransformerEncoder(16, layers=layers, heads=HEADS, distance_limit=LIMIT).double()


def table(one: Graph) -> NodeTable:
    made = node_table(one, distance_limit=LIMIT)
    return NodeTable(made.features.double(), made.pairs, made.relation, LIMIT)


def slow_biases(net: TransformerEncoder, one: Graph) -> torch.Tensor:
    """`[heads, N, N]`, target by source, from the distances of the graph itself, projected pair by pair."""
    steps = one.distances(LIMIT)
    steps[steps < 0] = LIMIT + 1
    codes = torch.cat([net.forwards(steps.T), net.backwards(steps)], dim=-1)
    return net.bias(codes).permute(2, 0, 1)


@pytest.mark.parametrize("name", ["resnet-20-w8", "vit-2-w16", "mlp-1-w8"])
def test_biases_from_the_table_are_those_of_every_pair(name):
    """To the last bits of double precision, as BLAS may sum otherwise for another number of rows; so the gradients."""
    one, net = graph(name), encoder()
    fast, slow = net.biases(table(one).dense), slow_biases(net, one)
    assert fast.shape == (HEADS, len(one.nodes), len(one.nodes))
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-14)
    fast.pow(3).sum().backward()
    found = [parameter.grad.clone() for parameter in net.bias.parameters()]
    net.zero_grad()
    slow.pow(3).sum().backward()
    for gradient, parameter in zip(found, net.bias.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_pairs_are_all_that_a_graph_without_cycles_can_have():
    """Against the distinct pairs of real graphs, row by row of `NodeTable.dense`."""
    pairs = distance_pairs(LIMIT)
    assert len(pairs.unique(dim=0)) == len(pairs) == 2 * LIMIT + 2
    for name in ("resnet-20-w8", "vit-2-w16"):
        one = graph(name)
        steps = one.distances(LIMIT)
        steps[steps < 0] = LIMIT + 1
        assert torch.equal(pairs[table(one).dense], torch.stack([steps.T, steps], dim=-1))


def test_encoder_against_attention_by_hand():
    """Scores, softmax and sum head by head and node by node, two layers."""
    one, net = graph("resnet-8-w4"), encoder()
    nodes = table(one)
    with torch.no_grad():
        bias = slow_biases(net, one)
        x = net.inlet(torch.cat([nodes.features, torch.sin(net.sine(nodes.features))], dim=1))
        for layer in net.layers:
            query, key, value = layer.query_key_value(layer.norm_attention(x)).chunk(3, dim=1)
            mixed = torch.zeros_like(x)
            for head in range(HEADS):
                part = slice(8 * head, 8 * head + 8)
                for target in range(len(x)):
                    scores = key[:, part] @ query[target, part] / math.sqrt(8) + bias[head, target]
                    mixed[target, part] = torch.softmax(scores, 0) @ value[:, part]
            x = x + layer.outlet(mixed)
            x = x + layer.mlp(layer.norm_mlp(x))
        torch.testing.assert_close(net(nodes), net.norm(x))


def test_order_of_nodes_does_not_matter_and_distances_do():
    one, net = table(graph("resnet-8-w4")), encoder()
    order = torch.randperm(len(one.features), generator=torch.Generator().manual_seed(2))
    other = NodeTable(one.features[order], torch.argsort(order)[one.pairs], one.relation, LIMIT)
    torch.testing.assert_close(net(other), net(one)[order])
    further = NodeTable(one.features, one.pairs, torch.where(one.relation == 1, 2, one.relation), LIMIT)
    assert (net(further) - net(one)).abs().max() > 1e-3
