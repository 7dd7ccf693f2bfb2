"""The sparse encoder: a small graph transformer over close pairs of nodes, whose attention knows their distance.

Each layer is pre-norm attention over all pairs within the distance limit, with an embedding of the signed distance as
edge feature (the idea of GHN-3, Knyazev et al. 2023, arXiv 2303.04143, and Graphormer), then a position-wise MLP. The
attention is torch-geometric's (`TransformerConv`, Shi et al. 2021, arXiv 2009.03509) in another order of operations: a
few relations stand behind many pairs, so they meet queries and attention weights as a small table, and vectors of
numbers per pair are never made.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from generators.ghn.encoder import Encoder
from generators.ghn.features import NodeTable, Tile

with (
    warnings.catch_warnings()
):  # it scripts helpers while it is imported, which newer versions of torch announce to drop
    warnings.filterwarnings("ignore", ".torch.jit.script. is deprecated", FutureWarning)
    from torch_geometric.nn import TransformerConv


def side_by_side(tables: Sequence[NodeTable]) -> tuple[Tile, ...]:
    """The tiles of several architectures whose nodes follow one another."""
    tiles, first = [], 0
    for table in tables:
        for tile in table.tiles:
            targets = slice(tile.targets.start + first, tile.targets.stop + first)
            tiles.append(Tile(targets, tile.sources + first if first else tile.sources, tile.relation))
        first += len(table.features)
    return tuple(tiles)


class RelationAttention(TransformerConv):
    """`TransformerConv` with parameters of the same names and, up to rounding, the same result.

    With r the relation of source j to target i, it attends by `q_i (k_j + e_r)` to `v_j + e_r`.
    """

    def forward(self, x: Tensor, tiles: tuple[Tile, ...], relations: Tensor) -> Tensor:
        """x: `[N, hidden]`; relations: `[R, hidden]`, the embedding of each; returns `[N, heads * channels]`."""
        query, key, value, edge = (
            layer(rows).unflatten(-1, (self.heads, -1)).transpose(0, 1)  # [heads, rows, channels]
            for layer, rows in (
                (self.lin_query, x), (self.lin_key, x), (self.lin_value, x), (self.lin_edge, relations)
            )
        )  # fmt: skip
        query = query / math.sqrt(self.out_channels)
        mixed = []
        for tile in tiles:
            own = query[:, tile.targets]
            relation = tile.relation.expand(self.heads, -1, -1)  # [heads, T, S]; R where there is none
            by_relation = nn.functional.pad(own @ edge.mT, (0, 1), value=-math.inf)  # [heads, T, R + 1]
            weights = torch.softmax(
                own @ key.index_select(1, tile.sources).mT + by_relation.gather(2, relation), dim=-1
            )
            shares = torch.zeros_like(by_relation).scatter_add(2, relation, weights)[..., :-1]
            mixed.append(weights @ value.index_select(1, tile.sources) + shares @ edge)
        return torch.cat(mixed, dim=1).transpose(0, 1).flatten(1)


class EncoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, hidden: int, *, heads: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(hidden)
        self.attention = RelationAttention(hidden, hidden // heads, heads=heads, edge_dim=hidden, root_weight=False)
        self.norm_mlp = nn.LayerNorm(hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden))

    def forward(self, x: Tensor, tiles: tuple[Tile, ...], relations: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x), tiles, relations)
        return x + self.mlp(self.norm_mlp(x))


class SparseEncoder(Encoder):
    """See the module docstring; `distance_limit` fixes the number of relations."""

    def __init__(self, hidden: int, *, layers: int, heads: int, distance_limit: int) -> None:
        super().__init__(hidden)
        self.relations = nn.Embedding(2 * distance_limit + 1, hidden)
        self.layers = nn.ModuleList(EncoderLayer(hidden, heads=heads) for _ in range(layers))

    def exchange(self, x: Tensor, table: NodeTable) -> Tensor:
        return self.exchange_together(x, [table])

    def exchange_together(self, x: Tensor, tables: Sequence[NodeTable]) -> Tensor:
        tiles = side_by_side(tables)
        for layer in self.layers:
            x = layer(x, tiles, self.relations.weight)
        return x
