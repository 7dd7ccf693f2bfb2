"""The transformer encoder: attention over all pairs of nodes, with a bias by the distances of a pair (GHN-3).

Knyazev et al. 2023 (arXiv 2303.04143), after Graphormer: the bias of source u and target v is an MLP of two embeddings,
one of the steps from u to v and one of those from v to u; all layers share it. In a graph without cycles at most one of
the two distances is finite, so there are 2 * limit + 2 distinct pairs: the MLP runs on a table of those, and the N x N
biases are read from it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generators.ghn.encoder import Encoder
from generators.ghn.features import NodeTable


def distance_pairs(limit: int) -> Tensor:
    """int64 `[2 * limit + 2, 2]`: steps forwards and backwards of each relation of `NodeTable.dense`.

    limit + 1 stands for no way within the limit.
    """
    far = limit + 1
    forwards = [(steps, far) for steps in range(1, far)]
    backwards = [(far, steps) for steps in range(1, far)]
    return torch.tensor([(0, 0), *forwards, *backwards, (far, far)])


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, hidden: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(hidden)
        self.query_key_value = nn.Linear(hidden, 3 * hidden)
        self.outlet = nn.Linear(hidden, hidden)
        self.norm_mlp = nn.LayerNorm(hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x: `[N, hidden]`; bias: `[heads, N, N]`, target by source."""
        parts = self.query_key_value(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.permute(1, 2, 0, 3)  # [heads, N, hidden / heads] each
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        x = x + self.outlet(mixed.transpose(0, 1).flatten(1))
        return x + self.mlp(self.norm_mlp(x))


class TransformerEncoder(Encoder):
    """See the module docstring."""

    def __init__(self, hidden: int, *, layers: int, heads: int, distance_limit: int) -> None:
        super().__init__(hidden)
        self.forwards, self.backwards = (nn.Embedding(distance_limit + 2, hidden) for _ in range(2))
        self.bias = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.GELU(), nn.Linear(hidden, heads, bias=False))
        self.layers = nn.ModuleList(TransformerLayer(hidden, heads=heads) for _ in range(layers))
        self.distances: Tensor
        self.register_buffer("distances", distance_pairs(distance_limit), persistent=False)

    def biases(self, dense: Tensor) -> Tensor:
        """`[heads, N, N]` for relations `[N, N]`, see `NodeTable.dense`."""
        forwards, backwards = self.distances.T
        table = self.bias(torch.cat([self.forwards(forwards), self.backwards(backwards)], dim=-1))
        return table[dense].permute(2, 0, 1)

    def exchange(self, x: Tensor, table: NodeTable) -> Tensor:
        bias = self.biases(table.dense)
        for layer in self.layers:
            x = layer(x, bias)
        return x
