"""The core decoder: a core tensor per node, spread over the channels of a target of any size without copies.

For a target `[O, I, *kernel]` with S kernel positions, a linear head turns the node vector into a core of R x R x K
numbers (K positions of a 3 x 3 grid). Rows, columns and kernel positions are named by their *relative* place, and

    W[o, i, s] = sum_{r, q, k} U[o, r] core[r, q, k] V[i, q] B[s, k]

with U and V read from learned tables by interpolation (a Tucker-2 form). A wider layer is a finer sampling of the same
core, so no block is ever tiled; the reference GHN-2/3 copies 64 x 64 blocks, and 3 % of the values of a ResNet-50 are
distinct. The core is linear in the head, so a GHN learns about as fast as a network: factors made by coordinate
networks needed five times the steps, or did not get there (docs/decisions.md).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from generators.ghn.decoder import Decoder, DecoderSettings
from generators.ghn.plan import MAX_BLOCKS, Group
from generators.hyperfan import hyperfan_

GRID = 3  # the core holds a 3 x 3 kernel, the most common one; others are read from it by interpolation
SHARED, OWN = 0.5, 0.35  # start spread of the part of a core that all nodes share, and of the part of the node
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic of Jordan et al. 2024: maps singular values in (0, 1] towards 1


def equalise(matrices: Tensor, steps: int) -> Tensor:
    """Pull the singular values of `[..., O, K]` matrices together by `steps` Newton-Schulz steps, unit Frobenius norm.

    Each step multiplies small singular values by up to 3.4 relative to the large ones and keeps the singular vectors;
    five steps make the matrix nearly orthogonal, none only rescales it. Zero matrices stay zero.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-12)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-12)
    return x.mT if tall else x


def interpolation(count: int, cells: int, *, device: torch.device | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Lower cell, upper cell and weight of the upper one for `count` evenly spread places over `cells` cells."""
    place = (torch.arange(count, device=device) + 0.5) / count * cells - 0.5
    low = place.floor().clamp(0, cells - 1)
    return low.long(), (low.long() + 1).clamp(max=cells - 1), (place - low).clamp(0, 1)


def read_table(table: Tensor, count: int) -> Tensor:
    """`[cells, R]` to `[count, R]`, linear between the centres of neighbouring cells."""
    low, high, weight = interpolation(count, len(table), device=table.device)
    return torch.lerp(table[low], table[high], weight.to(table)[:, None])


def kernel_basis(kernel: tuple[int, ...], *, device: torch.device | None = None) -> Tensor:
    """`[S, GRID * GRID]`: how much of each position of the grid every position of `kernel` takes.

    A 3 x 3 kernel takes the grid as it is, a 1 x 1 kernel and a linear layer its centre, a 1-D kernel the middle row,
    larger kernels interpolate.
    """

    def axis(size: int) -> Tensor:
        grid = torch.eye(GRID, device=device)
        if size == 1:
            return grid[GRID // 2 : GRID // 2 + 1]
        low, high, weight = interpolation(size, GRID, device=device)
        return torch.lerp(grid[low], grid[high], weight[:, None])

    height, width = (1, 1, *kernel)[-2:]
    return torch.einsum("hk,wl->hwkl", axis(height), axis(width)).reshape(height * width, GRID * GRID)


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

    def matrices(self, group: Group, node: Tensor) -> Tensor:
        left, right = self.factors(group, node)
        return right if left is None else left @ right

    def factors(self, group: Group, node: Tensor) -> tuple[Tensor | None, Tensor]:
        rank = self.settings.rank
        core = self.head(nn.functional.gelu(self.hidden(node))).unflatten(-1, (rank, rank, GRID * GRID))
        kernel = kernel_basis(group.kernel, device=core.device)
        columns = torch.einsum(
            "mgrqk,iq,sk->mgris", core, read_table(self.columns, group.inputs), kernel.to(core)
        ).flatten(-2)  # [M, G, R, I * S]
        rows = self.class_codes if group.output else read_table(self.rows, group.outputs)
        if group.outputs <= rank:
            return None, equalise(rows @ columns, self.settings.spectrum_steps)
        # rows = frame @ triangle with orthonormal columns in frame: equalising in its R dimensions is the same
        # as equalising the O rows, and the Gram matrices stay R x R
        frame, rows = torch.linalg.qr(rows)
        return frame, equalise(rows @ columns, self.settings.spectrum_steps)
