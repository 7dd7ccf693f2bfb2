"""The gated encoder against the walk node by node of the papers."""

from __future__ import annotations

import pytest
import torch

from collect.architectures import build
from generators.ghn.features import FEATURES, NodeTable, node_table
from generators.ghn.gated import GatedEncoder
from generators.graph import trace

LIMIT = 4


def table(name: str = "resnet-14-w8") -> NodeTable:
    graph = trace(build(name, shape=(1, 8, 8), classes=10), torch.zeros(1, 1, 8, 8))
    return node_table(graph, distance_limit=LIMIT)


def encoder(layers: int = 1) -> GatedEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        return GatedEncoder(16, layers=layers, heads=1, distance_limit=LIMIT)


def slow_walk(net: GatedEncoder, x: torch.Tensor, one: NodeTable, *, along: bool) -> torch.Tensor:
    """Node after node in (reversed) topological order, neighbour after neighbour, as in equations 3 and 4."""
    states = list(x)
    for node in range(len(x)) if along else reversed(range(len(x))):
        heard = torch.zeros(x.shape[1])
        for (source, target), relation in zip(one.pairs.T.tolist(), one.relation.tolist(), strict=True):
            steps = relation if along else relation - LIMIT
            if target == node and 1 <= steps <= LIMIT:
                heard = heard + (net.near(states[source]) if steps == 1 else net.far(states[source]) / steps)
        states[node] = net.gate(heard[None], states[node][None])[0]
    return torch.stack(states)


@pytest.mark.parametrize("name", ["resnet-14-w8", "vit-2-w16", "mlp-2-w8"])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_levels_against_nodes(name, layers):
    one, net = table(name), encoder(layers)
    with torch.no_grad():
        x = net.inlet(torch.cat([one.features, torch.sin(net.sine(one.features))], dim=1))
        for _ in range(layers):
            for along in (True, False):
                x = slow_walk(net, x, one, along=along)
        torch.testing.assert_close(net(one), net.norm(x), rtol=1e-4, atol=1e-5)


def test_gradients_against_nodes():
    """Those of all parameters, through both walks."""
    one, fast, slow = table(), encoder(), encoder()
    fast(one).pow(3).sum().backward()
    x = slow.inlet(torch.cat([one.features, torch.sin(slow.sine(one.features))], dim=1))
    for along in (True, False):
        x = slow_walk(slow, x, one, along=along)
    slow.norm(x).pow(3).sum().backward()
    for (name, found), wanted in zip(fast.named_parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_order_of_nodes_does_not_matter():
    """Numbers of nodes and the order of the pairs are names only."""
    one, net = table(), encoder()
    count = len(one.features)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(2))
    shuffled = torch.randperm(one.pairs.shape[1], generator=torch.Generator().manual_seed(3))
    other = NodeTable(one.features[order], torch.argsort(order)[one.pairs][:, shuffled], one.relation[shuffled], LIMIT)
    torch.testing.assert_close(net(other), net(one)[order], rtol=1e-4, atol=1e-5)


def test_one_walk_carries_messages_from_end_to_end():
    """Unlike a layer of attention within the limit: the last node hears the first, ten steps away, and back."""
    count = 11
    pairs = torch.tensor([(i, i) for i in range(count)] + [(i, i + 1) for i in range(count - 1)]
                         + [(i + 1, i) for i in range(count - 1)]).T  # fmt: skip
    relation = torch.tensor([0] * count + [1] * (count - 1) + [2] * (count - 1))
    features = torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    found = encoder().double()(NodeTable(features, pairs, relation, 1))
    for end, start in ((-1, 0), (0, -1)):
        (gradient,) = torch.autograd.grad(found[end, 0], features, retain_graph=True)
        assert gradient[start].abs().max() > 0


def test_updates_are_as_many_as_levels():
    """64 branches side by side cost three updates per walk, not 66."""
    branches = 64
    ways = [(0, 1 + i) for i in range(branches)] + [(1 + i, 1 + branches) for i in range(branches)]
    count = branches + 2
    pairs = torch.tensor([(i, i) for i in range(count)] + ways + [(b, a) for a, b in ways]).T
    relation = torch.tensor([0] * count + [1] * len(ways) + [2] * len(ways))
    wide = NodeTable(torch.zeros(count, FEATURES), pairs, relation, 1)
    assert [len(walk) for walk in wide.traversals] == [3, 3]
    net, calls = encoder(), []
    net.gate.register_forward_hook(lambda *_: calls.append(1))
    net(wide)
    assert len(calls) == 6
