"""The node table: one row of numbers per node, signed distances of close pairs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from collect.architectures import build
from generators.ghn.features import FEATURES, TILE, node_table
from generators.graph import NODE_KINDS, Graph, Node, trace

# 0 -> 1 -> 2 -> 4 and a shortcut 0 -> 3 -> 4
DIAMOND = Graph(
    nodes=(
        Node(0, "input", depth=0.0),
        Node(1, "convolution", ("a.weight",), ("weight",), (8, 4, 3, 3), {"out_channels": 8, "in_channels": 4}, 0.33),
        Node(2, "linear", ("b.weight",), ("weight",), (8, 8), {"out_channels": 8, "in_channels": 8}, 0.66),
        Node(3, "linear", ("c.weight",), ("weight",), (8, 4), {"out_channels": 8, "in_channels": 4}, 0.5),
        Node(4, "output", depth=1.0),
    ),
    edges=torch.tensor([[0, 1, 0, 2, 3], [1, 2, 3, 4, 4]]),
)


@pytest.mark.parametrize("limit", [1, 2, 3, 8])
def test_relations_of_a_graph_made_by_hand(limit):
    """Every relation against distances counted by eye, in both directions, and none that is too far or sideways."""
    ways = {(0, 1): 1, (0, 2): 2, (0, 3): 1, (0, 4): 2, (1, 2): 1, (1, 4): 2, (2, 4): 1, (3, 4): 1}
    wanted = {(node, node): 0 for node in range(5)}
    for (source, target), steps in ways.items():
        if steps <= limit:
            wanted[source, target] = steps
            wanted[target, source] = limit + steps
    table = node_table(DIAMOND, distance_limit=limit)
    found = dict(zip(map(tuple, table.pairs.T.tolist()), table.relation.tolist(), strict=True))
    assert found == wanted
    assert table.relation.max() <= 2 * limit, "every relation is a row of the encoder's table"


@pytest.mark.parametrize("limit", [1, 2])
def test_dense_relations_and_levels_of_a_graph_made_by_hand(limit):
    """The diamond has levels 0 | 1 3 | 2 | 4 along the data and 4 | 2 3 | 1 | 0 against it."""
    table = node_table(DIAMOND, distance_limit=limit)
    dense = torch.full((5, 5), 2 * limit + 1)
    for source, target, relation in zip(*table.pairs.tolist(), table.relation.tolist(), strict=True):
        dense[target, source] = relation
    assert torch.equal(table.dense, dense) and dense[1, 3] == dense[3, 1] == 2 * limit + 1
    along, against = table.traversals
    assert [level.nodes.tolist() for level in along] == [[0], [1, 3], [2], [4]]
    assert [level.nodes.tolist() for level in against] == [[4], [2, 3], [1], [0]]
    messages = {
        (int(source), int(level.nodes[into]), int(steps))
        for level in along for source, into, steps in zip(level.sources, level.into, level.steps, strict=True)
    }  # fmt: skip
    edges = {(0, 1, 1), (1, 2, 1), (0, 3, 1), (2, 4, 1), (3, 4, 1)}
    assert messages == edges | ({(0, 2, 2), (0, 4, 2), (1, 4, 2)} if limit == 2 else set())
    assert sum(len(level.sources) for level in against) == len(messages)


@pytest.mark.parametrize("name", ["resnet-38-w8", "vit-3-w32"])
def test_tiles_hold_every_pair_once(name):
    """Tiles against the dense table: the same relations, and nodes left out of a tile send its targets nothing."""
    table = node_table(trace(build(name, shape=(1, 8, 8), classes=10), torch.zeros(1, 1, 8, 8)), distance_limit=4)
    assert len(table.tiles) == -(-len(table.features) // TILE)
    dense = torch.full_like(table.dense, 9)
    for tile in table.tiles:
        dense[tile.targets, tile.sources] = tile.relation
    assert torch.equal(dense, table.dense)


def test_tiles_of_a_long_chain_grow_with_its_length():
    """Twice the depth is about twice the entries, not four times: neighbours have like neighbours."""
    sizes = []
    for depth in (200, 400):
        layers = [nn.Linear(4, 4) for _ in range(depth)]
        table = node_table(trace(nn.Sequential(*layers), torch.zeros(1, 4)), distance_limit=8)
        sizes.append(sum(tile.relation.numel() for tile in table.tiles))
    assert sizes[1] < 2.3 * sizes[0]


def test_rows_tell_kind_shape_and_place():
    """One row per node, of order 1, with the kind as one-hot; equal layers at other depths differ, and so do widths."""
    table = node_table(DIAMOND, distance_limit=2)
    assert table.features.shape == (5, FEATURES) and table.features.dtype == torch.float32
    kinds = table.features[:, : len(NODE_KINDS)]
    assert [NODE_KINDS[int(row.argmax())] for row in kinds] == [node.kind for node in DIAMOND.nodes]
    assert torch.equal(kinds.sum(1), torch.ones(5))
    assert not torch.equal(table.features[2], table.features[3]), "another width and place"


@pytest.mark.parametrize("name", ["resnet-20-w16", "vgg-5-w64", "mobilenet-4-w8", "mlp-6-w128", "vit-3-w32"])
def test_features_are_bounded_for_every_family(name):
    """Finite and below 4 in size; nodes of one network differ in pairs; relative place, so the ends are alike."""
    deep = node_table(trace(build(name, shape=(1, 8, 8), classes=10), torch.zeros(1, 1, 8, 8)), distance_limit=4)
    assert torch.isfinite(deep.features).all() and deep.features.abs().max() < 4
    assert len(deep.features.unique(dim=0)) == len(deep.features)


def test_place_is_relative_to_the_whole():
    """Stem and classifier of a 9-layer MLP look most like stem and classifier of a 3-layer one, the middle like it."""
    rows = []
    for depth in (3, 9):
        layers = [layer for _ in range(depth - 1) for layer in (nn.Linear(16, 16), nn.ReLU())]
        graph = trace(nn.Sequential(*layers, nn.Linear(16, 16)), torch.zeros(1, 16))
        features = node_table(graph, distance_limit=4).features
        rows.append(features[[node.index for node in graph.nodes if node.kind == "linear"]])
    short, long = rows
    nearest = torch.cdist(long, short).argmin(dim=1)
    assert nearest[0] == 0 and nearest[4] == 1 and nearest[8] == 2
    assert torch.equal(nearest, nearest.sort().values)
