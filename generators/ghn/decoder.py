"""What every decoder of a graph hypernetwork is: node vectors in, matrices of any shape and of known spread out.

`DECODERS` names them. `core` spreads a core tensor per node over the channels, `coordinate` makes low-rank factors from
the places of rows and columns, `block` and `fan-in-block` cut and tile blocks of fixed size, as GHN-2 and GHN-3 do.
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from generators.errors import unknown_name
from generators.ghn.plan import Group
from generators.ghn.spectrum import largest_singular_value

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
        spectrum_steps: Newton-Schulz steps of `spectrum.equalise`.
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


@dataclass(frozen=True)
class Part:
    """The decoded matrices of one group, G targets `[O, I, *kernel]` with K = I * S, for M members.

    Attributes:
        left: `[O, R]`, shared by all targets, or None for matrices that are no product.
        right: `[M, G, R, K]`, or the matrices `[M, G, O, K]` themselves.
        norm: `[M, G]`, Frobenius norm of the product for unit spread times the bounded gain; the product has norm 1.
        largest: `[M, G]`, largest singular value of the product, if it was asked for.
    """

    left: Tensor | None
    right: Tensor
    norm: Tensor
    largest: Tensor | None = None

    def matrices(self, scale: Tensor) -> Tensor:
        """The product times `scale` `[M, G]`: `[M, G, O, K]`."""
        right = self.right * scale[..., None, None]
        return right if self.left is None else self.left @ right


class Decoder(nn.Module, ABC):
    """Decodes groups of targets for M members at once.

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
    def parts(self, groups: Sequence[Group], node_vectors: Tensor, *, largest: bool = False) -> Iterator[Part]:
        """What the groups decode to, one `Part` after the other.

        Args:
            groups: the T targets of an architecture.
            node_vectors: `[M, N, C]`, a vector per member and node.
            largest: also find the largest singular values.
        """

    def targets(self, groups: Sequence[Group], node_vectors: Tensor) -> Tensor:
        """`[M, T, C]`: the vector of each target, from those of the nodes `[M, N, C]`."""
        nodes, blocks = (torch.cat(each) for each in zip(*((g.nodes, g.block_rows) for g in groups), strict=True))
        return node_vectors.index_select(1, nodes) + self.block_codes.index_select(0, blocks)

    def norms(self, groups: Sequence[Group], targets: Tensor) -> Tensor:
        """`[M, T]`: Frobenius norm of each target for unit spread, times its bounded gain."""
        sizes = [math.sqrt(math.prod(group.shape)) for group in groups for _ in group.names]
        return torch.tensor(sizes, device="cpu").to(targets) * self.settings.gain_bound ** torch.tanh(
            self.gain(targets)[..., 0]
        )

    def forward(self, group: Group, node_vectors: Tensor) -> Tensor:
        """Weights of unit spread times their bounded gain, `[M, G, O, I, *kernel]`; see `parts`."""
        (part,) = self.parts([group], node_vectors)
        return part.matrices(part.norm).unflatten(-1, (group.inputs, *group.kernel))


class MatrixDecoder(Decoder):
    """A decoder that makes the matrices of one group as they are, without factors."""

    @abstractmethod
    def matrices(self, group: Group, targets: Tensor) -> Tensor:
        """`[M, G, O, I * S]` of unit Frobenius norm from the vectors `[M, G, C]` of the targets; see `Group`."""

    def parts(self, groups: Sequence[Group], node_vectors: Tensor, *, largest: bool = False) -> Iterator[Part]:
        targets = self.targets(groups, node_vectors)
        counts = [len(group.names) for group in groups]
        parts = zip(groups, targets.split(counts, 1), self.norms(groups, targets).split(counts, 1), strict=True)
        for group, own, norm in parts:
            matrices = self.matrices(group, own)
            yield Part(None, matrices, norm, largest_singular_value(matrices) if largest else None)


def make_decoder(name: str, settings: DecoderSettings, *, generator: torch.Generator) -> Decoder:
    """The decoder that `DECODERS` lists as `name`, with start values from `generator`.

    Raises:
        UnknownNameError: there is none of that name.
    """
    if name not in DECODERS:
        raise unknown_name("decoder", name, DECODERS)
    module, _, attribute = DECODERS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)(settings, generator=generator)
