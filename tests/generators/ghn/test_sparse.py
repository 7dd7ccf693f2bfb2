"""The sparse encoder: message passing along the signed distances, whatever the order of the nodes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from generators.ghn.features import FEATURES, TILE, NodeTable
from generators.ghn.sparse import SparseEncoder, TransformerConv


def table(nodes: int, limit: int, seed: int = 0) -> NodeTable:
    """Random features on a chain of `nodes` nodes with relations up to `limit` steps."""
    generator = torch.Generator().manual_seed(seed)
    pairs, relation = [], []
    for source in range(nodes):
        for target in range(nodes):
            steps = target - source
            if abs(steps) <= limit:
                pairs.append((source, target))
                relation.append(steps if steps >= 0 else limit - steps)
    features = torch.randn(nodes, FEATURES, generator=generator)
    return NodeTable(features, torch.tensor(pairs).T, torch.tensor(relation), limit)


def encoder(layers: int = 2, limit: int = 3) -> SparseEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        return SparseEncoder(16, layers=layers, heads=2, distance_limit=limit)


def test_order_of_nodes_and_pairs_does_not_matter():
    """Renumbering the nodes permutes the embeddings; shuffling the pairs changes nothing."""
    one, net = table(9, 3), encoder()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    shuffled = torch.randperm(one.pairs.shape[1], generator=torch.Generator().manual_seed(3))
    place = torch.argsort(order)  # node i of `one` is node place[i] of `other`
    other = NodeTable(one.features[order], place[one.pairs][:, shuffled], one.relation[shuffled], 3)
    torch.testing.assert_close(net(other), net(one)[order], rtol=1e-4, atol=1e-5)


def test_embeddings_have_unit_second_moment():
    found = encoder()(table(7, 3))
    assert found.shape == (7, 16)
    torch.testing.assert_close(found.square().mean(1), torch.ones(7), rtol=1e-2, atol=0)


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_messages_travel_one_relation_per_layer(layers):
    """The gradient of a node reaches the features of nodes up to `layers * limit` steps away, and no further."""
    limit, nodes = 2, 12
    one, net = table(nodes, limit), encoder(layers, limit)
    features = one.features.requires_grad_()
    (gradient,) = torch.autograd.grad(net(NodeTable(features, one.pairs, one.relation, limit))[0, 0], features)
    reached = (gradient.abs().sum(1) > 0).nonzero().flatten().tolist()
    assert reached == list(range(min(layers * limit + 1, nodes)))


def test_direction_and_distance_matter():
    """Turning all edges round, or calling one step two, gives other embeddings."""
    one, net = table(6, 3), encoder()
    turned = one.relation.clone()
    turned[one.relation > 3] -= 3
    turned[(one.relation > 0) & (one.relation <= 3)] += 3
    further = torch.where(one.relation == 1, 2, one.relation)
    for relation in (turned, further):
        assert (net(one) - net(NodeTable(one.features, one.pairs, relation, 3))).abs().max() > 1e-3


def test_one_layer_against_loops():
    """A layer against attention written with loops: per head, scores of queries with keys plus the relation."""
    one, net = table(5, 2), encoder(layers=1, limit=2)
    with torch.no_grad():
        x = net.inlet(torch.cat([one.features, torch.sin(net.sine(one.features))], dim=1))
        layer: Any = net.layers[0]
        normed, attention = layer.norm_attention(x), layer.attention
        mixed = torch.zeros(5, 2, 8)
        for target in range(5):
            into = [k for k in range(one.pairs.shape[1]) if one.pairs[1, k] == target]
            for head in range(2):
                part = slice(8 * head, 8 * head + 8)
                scores, values = [], []
                for k in into:
                    edge = attention.lin_edge(net.relations.weight[one.relation[k]])[part]
                    source = normed[one.pairs[0, k]]
                    key = attention.lin_key(source)[part] + edge
                    scores.append(attention.lin_query(normed[target])[part] @ key / 8**0.5)
                    values.append(attention.lin_value(source)[part] + edge)
                weights = torch.softmax(torch.stack(scores), 0)
                mixed[target, head] = sum(weight * value for weight, value in zip(weights, values, strict=True))
        x = x + mixed.flatten(1)
        x = x + layer.mlp(layer.norm_mlp(x))
        torch.testing.assert_close(net(one), net.norm(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nodes", [5, TILE, TILE + 1, 3 * TILE - 7])
def test_tiles_against_attention_pair_by_pair(nodes):
    """Values and gradients are those of torch-geometric's own attention, which makes a vector of every pair."""
    one, net = table(nodes, 3), encoder().double()
    one = replace(one, features=one.features.double())
    attention: Any = net.layers[0].attention
    x = torch.randn(nodes, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    ours = attention(x, one.tiles, net.relations.weight)
    theirs = TransformerConv.forward(attention, x, one.pairs, net.relations(one.relation))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    weights = [net.relations.weight, *(value for name, value in attention.named_parameters() if "skip" not in name)]
    for found, wanted in zip(
        torch.autograd.grad(ours.square().sum(), weights), torch.autograd.grad(theirs.square().sum(), weights),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)


def test_importing_it_warns_of_nothing():
    """Users do not see what torch-geometric's import raises in newer versions of torch."""
    command = [sys.executable, "-W", "error::FutureWarning", "-c", "import generators.ghn.sparse"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
