"""The gated encoder of GHN-1 and GHN-2: a recurrent unit that walks along the computation and back.

Zhang, Ren and Urtasun 2019 (arXiv 1810.05749) with the virtual edges of Knyazev et al. 2021 (arXiv 2110.13100, eq. 4):

    m_v = sum over edges u -> v of mlp(h_u) + sum over pairs of 1 < s <= limit steps of mlp_far(h_u) / s
    h_v = GRU(m_v, h_v),        h_u being the state after u's own update in the same walk.

Nodes that no way connects are updated together: as many updates as the longest way has nodes, not as many as the graph.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from generators.ghn.encoder import Encoder
from generators.ghn.features import Level, NodeTable


class GatedEncoder(Encoder):
    """See the module docstring; a layer is one walk along the data and one against it, all with the same weights."""

    def __init__(self, hidden: int, *, layers: int, heads: int, distance_limit: int) -> None:
        super().__init__(hidden)
        del heads, distance_limit  # it has no attention, and reads distances from the node table
        self.walks = layers
        self.near, self.far = (
            nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden)) for _ in range(2)
        )
        self.gate = nn.GRUCell(hidden, hidden)

    def exchange(self, x: Tensor, table: NodeTable) -> Tensor:
        for _ in range(self.walks):
            for levels in table.traversals:
                x = self.walk(x, levels)
        return x

    def walk(self, x: Tensor, levels: tuple[Level, ...]) -> Tensor:
        """States `[N, hidden]` after one update of every node, level after level."""
        count = len(x)
        said = x.new_zeros(2 * count, x.shape[1])  # what each node says to its neighbours, and to nodes further away
        for level in levels:
            senders = level.sources + count * (level.steps > 1)
            weighted = said[senders] / level.steps[:, None]
            heard = x.new_zeros(len(level.nodes), x.shape[1]).index_add(0, level.into, weighted)
            state = self.gate(heard, x[level.nodes])
            x = x.index_copy(0, level.nodes, state)
            places = torch.cat([level.nodes, level.nodes + count])
            said = said.index_copy(0, places, torch.cat([self.near(state), self.far(state)]))
        return x
