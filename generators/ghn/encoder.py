"""What every encoder of a graph hypernetwork is: the node table of an architecture in, one embedding per node out.

`ENCODERS` names them. `sparse` attends over the pairs of nodes within the distance limit, `transformer` over all pairs
with a bias by distance (GHN-3), `gated` runs a recurrent unit along the computation and back (GHN-2).
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from generators.errors import unknown_name
from generators.ghn.features import FEATURES, NodeTable

ENCODERS: dict[str, str] = {
    "sparse": "generators.ghn.sparse:SparseEncoder",
    "transformer": "generators.ghn.transformer:TransformerEncoder",
    "gated": "generators.ghn.gated:GatedEncoder",
}
"""Name in a configuration -> where its class lives (imported when first used)."""

SINE_SCALE = 0.3  # spread of the random phases per unit of feature; at 1.5 unseen depths were at chance


class Encoder(nn.Module, ABC):
    """Features `[N, F]` of N nodes to embeddings `[N, hidden]` of unit second moment per node.

    Called with several tables it gives the embeddings of one after those of the other. Random sine features in front
    tell layers apart that differ only in depth. Subclasses add the messages.

    Args:
        hidden: width of the embeddings.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.sine = nn.Linear(FEATURES, hidden)
        nn.init.normal_(self.sine.weight, std=SINE_SCALE)
        nn.init.uniform_(self.sine.bias, -math.pi, math.pi)
        self.inlet = nn.Linear(FEATURES + hidden, hidden)
        self.norm = nn.LayerNorm(hidden)

    @abstractmethod
    def exchange(self, x: Tensor, table: NodeTable) -> Tensor:
        """Node states `[N, hidden]` before the exchange of messages to those after it."""

    def exchange_together(self, x: Tensor, tables: Sequence[NodeTable]) -> Tensor:
        """`exchange` within each of several architectures, whose nodes follow one another in `x`."""
        parts = x.split([len(table.features) for table in tables])
        return torch.cat([self.exchange(part, table) for part, table in zip(parts, tables, strict=True)])

    def forward(self, *tables: NodeTable) -> Tensor:
        features = torch.cat([table.features for table in tables])
        x = self.inlet(torch.cat([features, torch.sin(self.sine(features))], dim=-1))
        return self.norm(self.exchange_together(x, tables))


def make_encoder(name: str, hidden: int, *, layers: int, heads: int, distance_limit: int) -> Encoder:
    """The encoder that `ENCODERS` lists as `name`; start values come from torch's global stream.

    Args:
        name: key of `ENCODERS`.
        hidden: width of the embeddings.
        layers: rounds of messages.
        heads: of attention, if the encoder has any.
        distance_limit: that of the node tables.

    Raises:
        UnknownNameError: there is none of that name.
    """
    if name not in ENCODERS:
        raise unknown_name("encoder", name, ENCODERS)
    module, _, attribute = ENCODERS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)(
        hidden, layers=layers, heads=heads, distance_limit=distance_limit
    )
