"""The sparse encoder: a small graph transformer over close pairs of nodes, whose attention knows their distance.

Each layer is pre-norm attention over all pairs within the distance limit, with an embedding of the signed distance as
edge feature (the idea of GHN-3, Knyazev et al. 2023, arXiv 2303.04143, and Graphormer), then a position-wise MLP.
torch-geometric does the batching and the attention (`TransformerConv`, Shi et al. 2021, arXiv 2009.03509).
"""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from generators.ghn.encoder import Encoder
from generators.ghn.features import NodeTable

with (
    warnings.catch_warnings()
):  # it scripts helpers while it is imported, which newer versions of torch announce to drop
    warnings.filterwarnings("ignore", ".torch.jit.script. is deprecated", FutureWarning)
    from torch_geometric.nn import TransformerConv


class EncoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, hidden: int, *, heads: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(hidden)
        self.attention = TransformerConv(hidden, hidden // heads, heads=heads, edge_dim=hidden, root_weight=False)
        self.norm_mlp = nn.LayerNorm(hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden))

    def forward(self, x: Tensor, pairs: Tensor, relation: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x), pairs, relation)
        return x + self.mlp(self.norm_mlp(x))


class SparseEncoder(Encoder):
    """See the module docstring; `distance_limit` fixes the number of relations."""

    def __init__(self, hidden: int, *, layers: int, heads: int, distance_limit: int) -> None:
        super().__init__(hidden)
        self.relations = nn.Embedding(2 * distance_limit + 1, hidden)
        self.layers = nn.ModuleList(EncoderLayer(hidden, heads=heads) for _ in range(layers))

    def exchange(self, x: Tensor, table: NodeTable) -> Tensor:
        relation = self.relations(table.relation)
        for layer in self.layers:
            x = layer(x, table.pairs, relation)
        return x
