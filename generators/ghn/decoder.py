"""What every decoder of a graph hypernetwork is: node vectors in, matrices of any shape and of known spread out.

`DECODERS` names them. `core` spreads a core tensor per node over the channels, `coordinate` makes low-rank factors from
the places of rows and columns, `block` and `fan-in-block` cut and tile blocks of fixed size, as GHN-2 and GHN-3 do.
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from generators.errors import unknown_name
from generators.ghn.plan import Group

DECODERS: dict[str, str] = {
    "core": "generators.ghn.core:CoreDecoder",
    "coordinate": "generators.ghn.coordinate:CoordinateDecoder",
    "block": "generators.ghn.block:BlockDecoder",
    "fan-in-block": "generators.ghn.block:FanInBlockDecoder",
}
"""Name in a configuration -> where its class lives (imported when first used)."""


@dataclass(frozen=True)
class DecoderSettings:
    """What decoders are made of; each reads what it needs.

    Attributes:
        node_width: C, length of the node vectors (embedding and noise code).
        classes: rows of classifiers are named by learned class codes, since classes have no order.
        width: hidden width in front of a head.
        rank: R, columns of the factors.
        cells: resolution of the tables of row and column places.
        spectrum_steps: Newton-Schulz steps of `core.equalise`.
        gain_bound: the spread of a target is its He spread times at most this factor, at least its inverse.
        block: side of the blocks of the block decoders.
        block_kernel: kernel side of the blocks.
    """

    node_width: int
    classes: int
    width: int = 128
    rank: int = 16
    cells: int = 16
    spectrum_steps: int = 3
    gain_bound: float = 1.0
    block: int = 64
    block_kernel: int = 11


class Decoder(nn.Module, ABC):
    """Decodes one `Group` for M members at once.

    Subclasses make the parameters below, each in the order in which it draws them.

    Attributes:
        class_codes: `[classes, *]`, one row per class: classifiers read them in place of row places.
        block_codes: `[MAX_BLOCKS, C]`, added to the node vector, so that query, key and value differ.
        gain: of the node vector; its tanh is the exponent of `gain_bound`.
    """

    class_codes: nn.Parameter
    block_codes: nn.Parameter
    gain: nn.Linear

    def __init__(self, settings: DecoderSettings) -> None:
        super().__init__()
        self.settings = settings

    @abstractmethod
    def matrices(self, group: Group, node: Tensor) -> Tensor:
        """`[M, G, O, I * S]` of unit Frobenius norm from the vectors `[M, G, C]` of the targets; see `Group`."""

    def factors(self, group: Group, node: Tensor) -> tuple[Tensor | None, Tensor]:
        """The `matrices` as left `[O, R]` (or one per target) and right `[M, G, R, I * S]`; None and the whole if they
        are no product. A writer takes the product where the weights are to be, and needs no room for it.
        """
        return None, self.matrices(group, node)

    def targets(self, group: Group, node_vectors: Tensor) -> Tensor:
        """`[M, G, C]`: the vector of each target, from those of the nodes `[M, N, C]`."""
        return node_vectors[:, group.nodes] + self.block_codes[group.block_rows]

    def spread(self, group: Group, node: Tensor) -> Tensor:
        """`[M, G, 1]`: Frobenius norm of each target for unit spread, times its bounded gain."""
        return math.sqrt(math.prod(group.shape)) * self.settings.gain_bound ** torch.tanh(self.gain(node))

    def forward(self, group: Group, node_vectors: Tensor) -> Tensor:
        """Weights of unit spread times their bounded gain.

        Args:
            group: G targets `[O, I, *kernel]`.
            node_vectors: `[M, N, C]`, a vector per member and node.

        Returns:
            `[M, G, O, I, *kernel]`.
        """
        node = self.targets(group, node_vectors)
        matrices = self.matrices(group, node) * self.spread(group, node)[..., None]
        return matrices.unflatten(-1, (group.inputs, *group.kernel))


def make_decoder(name: str, settings: DecoderSettings, *, generator: torch.Generator) -> Decoder:
    """The decoder that `DECODERS` lists as `name`, with start values from `generator`.

    Raises:
        UnknownNameError: there is none of that name.
    """
    if name not in DECODERS:
        raise unknown_name("decoder", name, DECODERS)
    module, _, attribute = DECODERS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)(settings, generator=generator)
