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

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from generators.ghn.decoder import Decoder, DecoderSettings, Part
from generators.ghn.plan import MAX_BLOCKS, Group
from generators.ghn.spectrum import equaliser, largest_of_product, mixture
from generators.hyperfan import hyperfan_
from generators.seeds import plain_tensors

GRID = 3  # the core holds a 3 x 3 kernel, the most common one; others are read from it by interpolation
CLASSES = -1  # the "size" under which classifiers find the class codes
SHARED, OWN = 0.5, 0.35  # start spread of the part of a core that all nodes share, and of the part of the node


@functools.lru_cache(maxsize=128)
@plain_tensors()
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


@functools.lru_cache(maxsize=128)
@plain_tensors()
def kernel_basis(kernel: tuple[int, ...], *, device: torch.device | None = None) -> Tensor:
    """`[S, GRID * GRID]`: how much of each position of the grid every position of `kernel` takes.

    A 3 x 3 kernel takes the grid as it is, a 1 x 1 kernel and a linear layer its centre, a 1-D kernel the middle row,
    larger kernels interpolate.
    """
    height, width = (interpolation(size, GRID, device=device) for size in (1, 1, *kernel)[-2:])
    return torch.einsum("hk,wl->hwkl", height, width).reshape(-1, GRID * GRID)


@functools.lru_cache(maxsize=128)
@plain_tensors()
def kernel_root(kernel: tuple[int, ...]) -> Tensor:
    """`[s, GRID * GRID]` with the Gram matrix of `kernel_basis` and no more rows than columns."""
    basis = kernel_basis(kernel)
    return basis if len(basis) <= GRID * GRID else torch.linalg.qr(basis.double()).R.to(basis)


@dataclass(frozen=True)
class Readings:
    """A table as layers of several sizes read it.

    Attributes:
        values: size to `[n, R]`, a row per channel, class or kernel position.
        grams: `values^T values` of each, `[sizes, R, R]`, in double precision: tables are far from orthogonal.
    """

    values: dict[Any, Tensor]
    grams: Tensor

    @classmethod
    def of(cls, values: dict[Any, Tensor]) -> Readings:
        exact = [each.double() if each.device.type != "mps" else each for each in values.values()]  # mps has none
        return cls(values, torch.stack([each.mT @ each for each in exact]))

    def grams_of(self, sizes: Sequence[Any]) -> Tensor:
        """`[T, R, R]` for T targets of these sizes."""
        places = {size: place for place, size in enumerate(self.values)}
        index = torch.tensor([places[size] for size in sizes], device="cpu")
        return self.grams.index_select(0, index.to(self.grams.device))


def spread(cores: Tensor, columns: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """Cores over inputs and kernel positions: `[M, G, R, I * S]`.

    Args:
        cores: `[M, G, R, R, GRID * GRID]`.
        columns: V, `[I, R]`.
        kernel: S = prod(kernel) positions.
    """
    taken = cores if kernel == (GRID, GRID) else cores @ kernel_basis(kernel, device=cores.device).to(cores).mT
    return (taken.mT @ columns.mT).mT.flatten(-2)


def _right_gram(cores: Tensor, column_gram: Tensor, kernels: Sequence[tuple[int, ...]]) -> Tensor:
    """`right right^T` `[M, T, R, R]` for `right = spread(cores, ...)`, without the inputs: for each kernel in turn.

    Args:
        cores: `[M, T, R, R, GRID * GRID]`.
        column_gram: V^T V of each target, `[T, R, R]`, in the precision of the result.
        kernels: of the targets.
    """
    targets: dict[tuple[int, ...], list[int]] = {}
    for target, kernel in enumerate(kernels):
        targets.setdefault((1, 1, *kernel)[-2:], []).append(target)
    found = []
    for kernel, chosen in targets.items():
        index = torch.tensor(chosen, device="cpu").to(cores.device)
        root = kernel_root(kernel).to(cores)
        taken = cores.index_select(1, index)
        taken = (taken if kernel == (GRID, GRID) else taken @ root.mT).mT  # [M, T', R, s, R]
        taken = taken.to(column_gram.dtype, memory_format=torch.contiguous_format)
        met = taken.flatten(-3, -2) @ column_gram.index_select(0, index)
        found.append(taken.flatten(-2) @ met.unflatten(-2, taken.shape[-3:-1]).flatten(-2).mT)
    order = torch.tensor([target for chosen in targets.values() for target in chosen], device="cpu").argsort()
    return torch.cat(found, dim=1).index_select(1, order.to(cores.device))


def _row_size(group: Group) -> int:
    return CLASSES if group.output else group.outputs


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
        counts = [len(group.names) for group in groups]
        norms = self.norms(groups, targets).split(counts, dim=1)
        rows, columns = self.readings(groups)
        each_target = [group for group in groups for _ in group.names]
        row_gram = rows.grams_of([_row_size(group) for group in each_target])
        column_gram = columns.grams_of([group.inputs for group in each_target])
        cores = self.cores(targets)
        kernels = [group.kernel for group in each_target]  # one member at a time: what lies between stays in the cache
        right_gram = torch.cat([_right_gram(own, column_gram, kernels) for own in cores.split(1)])
        between = equaliser(row_gram, right_gram, self.settings.spectrum_steps)
        cores = (between @ cores.to(between).flatten(-2)).to(cores).unflatten(-1, cores.shape[-2:])
        found: Sequence[Tensor | None] = [None] * len(groups)
        if largest:
            starts = {size: mixture(values) for size, values in rows.values.items()}
            start = torch.stack([starts[_row_size(group)] for group in each_target]).to(row_gram)
            values = largest_of_product(row_gram, between @ right_gram @ between.mT, start)
            found = values.to(cores).split(counts, dim=1)
        for group, own, norm, value in zip(groups, cores.split(counts, dim=1), norms, found, strict=True):
            right = spread(own, columns.values[group.inputs], group.kernel)
            yield Part(rows.values[_row_size(group)], right, norm, value)

    def cores(self, targets: Tensor) -> Tensor:
        """`[M, T, R, R, GRID * GRID]` from the vectors of targets `[M, T, C]`."""
        rank = self.settings.rank
        return self.head(nn.functional.gelu(self.hidden(targets))).unflatten(-1, (rank, rank, GRID * GRID))

    def readings(self, groups: Sequence[Group]) -> tuple[Readings, Readings]:
        """The tables of rows and columns as the groups read them; each size is read once."""
        rows: dict[Any, Tensor] = {}
        for size in dict.fromkeys(_row_size(group) for group in groups):
            rows[size] = self.class_codes if size == CLASSES else read_table(self.rows, size)
        columns = {size: read_table(self.columns, size) for size in dict.fromkeys(group.inputs for group in groups)}
        return Readings.of(rows), Readings.of(columns)
