"""The core decoder: a core tensor per node, spread over the channels of a target of any size without copies.

For a target `[O, I, *kernel]` with S kernel positions, a linear head turns the node vector into a core of R x R x K
numbers (K positions of a 3 x 3 grid). Rows, columns and kernel positions are named by their *relative* place, and

    W[o, i, s] = sum_{r, q, k} U[o, r] core[r, q, k] V[i, q] B[s, k]

with U and V read from learned tables by interpolation (a Tucker-2 form), brought to unit norm; between U and the rest
stands a matrix that pulls the singular values together (`generators.ghn.spectrum`). A wider layer is a finer sampling
of the same core, so no block is ever tiled; the reference GHN-2/3 copies 64 x 64 blocks, and 3 % of the values of a
ResNet-50 are distinct. The core is linear in the head, so a GHN learns about as fast as a network: factors made by
coordinate networks needed five times the steps, or did not get there (docs/decisions.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from generators.ghn.decoder import Decoder, DecoderSettings, Part
from generators.ghn.plan import MAX_BLOCKS, Group
from generators.ghn.spectrum import equaliser, largest_of_product, mixture
from generators.hyperfan import hyperfan_

GRID = 3  # the core holds a 3 x 3 kernel, the most common one; others are read from it by interpolation
SHARED, OWN = 0.5, 0.35  # start spread of the part of a core that all nodes share, and of the part of the node


def interpolation(count: int, cells: int, *, device: torch.device | None = None) -> Tensor:
    """`[count, cells]`: how much of each of `cells` cells each of `count` evenly spread places takes.

    Linear between the centres of neighbouring cells, level beyond the outer ones.
    """
    place = (torch.arange(count, device=device) + 0.5) / count * cells - 0.5
    distance = place.clamp(0, cells - 1)[:, None] - torch.arange(cells, device=device)
    return (1 - distance.abs()).clamp_min(0)


def read_table(table: Tensor, count: int) -> Tensor:
    """`[cells, R]` to `[count, R]`, interpolated."""
    return interpolation(count, len(table), device=table.device).to(table) @ table


def kernel_basis(kernel: tuple[int, ...], *, device: torch.device | None = None) -> Tensor:
    """`[S, GRID * GRID]`: how much of each position of the grid every position of `kernel` takes.

    A 3 x 3 kernel takes the grid as it is, a 1 x 1 kernel and a linear layer its centre, a 1-D kernel the middle row,
    larger kernels interpolate.
    """
    height, width = (interpolation(size, GRID, device=device) for size in (1, 1, *kernel)[-2:])
    return torch.einsum("hk,wl->hwkl", height, width).reshape(-1, GRID * GRID)


@dataclass(frozen=True)
class Table:
    """A table as layers of one size read it.

    Attributes:
        values: `[n, R]`, a row per channel, class or kernel position.
        gram: `values^T values`, `[R, R]`, in double precision: tables are far from orthogonal.
    """

    values: Tensor
    gram: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Table:
        exact = values.double() if values.device.type != "mps" else values  # which has no double precision
        return cls(values, exact.mT @ exact)


@dataclass(frozen=True)
class Reading:
    """The tables as targets `[O, I, *kernel]` with S kernel positions read them.

    Attributes:
        rows: U, values `[O, R]`.
        columns: V, values `[I, R]`.
        kernel: B, values `[S, GRID * GRID]`.
    """

    rows: Table
    columns: Table
    kernel: Table

    def spread(self, cores: Tensor) -> Tensor:
        """Cores `[M, G, R, R, GRID * GRID]` over inputs and kernel positions: `[M, G, R, I * S]`."""
        taken = (cores @ self.kernel.values.mT).mT  # [M, G, R, S, R]
        return (taken @ self.columns.values.mT).mT.flatten(-2)


def _right_gram(cores: Tensor, column_gram: Tensor, kernel_gram: Tensor) -> Tensor:
    """`right right^T` `[M, T, R, R]` for `right = Reading.spread(cores)`, from the Gram matrices of its tables.

    Args:
        cores: `[M, T, R, R, GRID * GRID]`.
        column_gram: `[T, R, R]`.
        kernel_gram: `[T, GRID * GRID, GRID * GRID]`.
    """
    shape = cores.mT.shape[-3:]  # R, GRID * GRID, R
    met = (cores.flatten(-3, -2) @ kernel_gram).unflatten(-2, cores.shape[-3:-1]).mT
    met = (met.flatten(-3, -2) @ column_gram).unflatten(-2, shape[:2])
    return cores.mT.flatten(-2) @ met.flatten(-2).mT


class CoreDecoder(Decoder):
    """See the module docstring. Reads `width`, `rank`, `cells` and `spectrum_steps`."""

    def __init__(self, settings: DecoderSettings, *, generator: torch.Generator) -> None:
        super().__init__(settings)
        rank, node_width = settings.rank, settings.node_width
        self.rows = nn.Parameter(torch.randn(settings.cells, rank, generator=generator))
        self.columns = nn.Parameter(torch.randn(settings.cells, rank, generator=generator))
        self.class_codes = nn.Parameter(torch.randn(settings.classes, rank, generator=generator))
        self.block_codes = nn.Parameter(0.5 * torch.randn(MAX_BLOCKS, node_width, generator=generator))
        self.hidden = nn.Linear(node_width, settings.width)
        self.head = nn.Linear(settings.width, rank * rank * GRID * GRID)
        self.gain = nn.Linear(node_width, 1)
        self.calibrate(generator)

    @torch.no_grad()
    def calibrate(self, generator: torch.Generator) -> None:
        """Hyperfan start, calibrated on unit node vectors, times OWN; gains are 1.

        Mostly shared cores at the start let all layers and architectures learn together before they part.
        """
        nn.init.normal_(self.hidden.weight, std=math.sqrt(1.0 / self.hidden.in_features), generator=generator)
        nn.init.zeros_(self.hidden.bias)
        nodes = torch.randn(1024, self.hidden.in_features, generator=generator)
        hidden = nn.functional.gelu(self.hidden(nodes))
        hyperfan_(self.head, fan_in=1, fan_out=1, generator=generator, hidden=hidden, relu=False)
        self.head.weight.mul_(OWN)
        nn.init.normal_(self.head.bias, std=SHARED, generator=generator)
        nn.init.zeros_(self.gain.weight)
        nn.init.zeros_(self.gain.bias)

    def parts(self, groups: Sequence[Group], node_vectors: Tensor, *, largest: bool = False) -> Iterator[Part]:
        targets = self.targets(groups, node_vectors)
        readings = self.readings(groups)
        counts = [len(group.names) for group in groups]
        norms = self.norms(groups, targets).split(counts, dim=1)

        def per_target(values: Iterable[Tensor]) -> Tensor:
            return torch.cat([each.expand(count, *each.shape) for each, count in zip(values, counts, strict=True)])

        row_gram = per_target(each.rows.gram for each in readings)
        column_gram = per_target(each.columns.gram for each in readings)
        kernel_gram = per_target(each.kernel.gram for each in readings)
        cores = self.cores(targets)
        right_gram = _right_gram(cores.to(row_gram.dtype), column_gram, kernel_gram)
        between = equaliser(row_gram, right_gram, self.settings.spectrum_steps)
        cores = (between @ cores.to(between).flatten(-2)).to(cores).unflatten(-1, cores.shape[-2:])
        found: Sequence[Tensor | None] = [None] * len(groups)
        if largest:
            starts = per_target(mixture(each.rows.values) for each in readings).to(row_gram)
            values = largest_of_product(row_gram, between @ right_gram @ between.mT, starts)
            found = values.to(cores).split(counts, dim=1)
        for each, own, norm, value in zip(readings, cores.split(counts, dim=1), norms, found, strict=True):
            yield Part(each.rows.values, each.spread(own), norm, value)

    def cores(self, targets: Tensor) -> Tensor:
        """`[M, T, R, R, GRID * GRID]` from the vectors of targets `[M, T, C]`."""
        rank = self.settings.rank
        return self.head(nn.functional.gelu(self.hidden(targets))).unflatten(-1, (rank, rank, GRID * GRID))

    def readings(self, groups: Sequence[Group]) -> list[Reading]:
        """The tables as each group reads them; each size is read once."""
        device = self.rows.device
        classes = Table.of(self.class_codes) if any(each.output for each in groups) else None
        rows = {size: Table.of(read_table(self.rows, size)) for size in {each.outputs for each in groups}}
        columns = {size: Table.of(read_table(self.columns, size)) for size in {each.inputs for each in groups}}
        kernels = {
            size: Table.of(kernel_basis(size, device=device).to(self.rows)) for size in {each.kernel for each in groups}
        }
        return [
            Reading(
                classes if each.output and classes else rows[each.outputs], columns[each.inputs], kernels[each.kernel]
            )
            for each in groups
        ]
