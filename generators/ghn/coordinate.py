"""The coordinate decoder: low-rank factors from the places of rows and columns, with a spectrum within known bounds.

For a target `[O, I, *kernel]` with S kernel positions and r = min(R, O, I * S),

    W = U diag(s) V^T,
    U = orthogonal((rows(o) * gate_u) B_u),    V = orthogonal((columns(i) * kernel(k) * gate_v) B_v)

where rows and columns are linear in cosines of *relative* places, which are orthogonal on any number of places, the
gates are made from the node vector, and Newton-Schulz steps make the columns of a factor nearly orthogonal. The gains s
lie within a factor of e of 1, so no direction can take over: behind batch norm, which hides scale, free factors fall to
one direction within minutes of training. Gates multiply features and nothing else stands between node and factors:
networks over coordinates *and* nodes learn many times slower (docs/decisions.md).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generators.ghn.core import GRID, kernel_basis
from generators.ghn.decoder import DecoderSettings, MatrixDecoder
from generators.ghn.plan import MAX_BLOCKS, Group
from generators.ghn.spectrum import equalise

STEPS = 5  # Newton-Schulz steps, which bring singular values down to a hundredth of the norm to about 1
OWN = 0.7  # start spread of a gate around 1: most of a factor is shared by all nodes


def cosines(count: int, frequencies: int, *, device: torch.device | None = None) -> Tensor:
    """`[count, frequencies]`: sqrt(2) cos(pi f (k + 1/2) / count), orthogonal over the places k; 1 for f = 0.

    Frequencies that `count` places cannot tell from lower ones are 0.
    """
    frequency = torch.arange(frequencies, device=device)
    place = (torch.arange(count, device=device) + 0.5) / count
    waves = math.sqrt(2) * torch.cos(math.pi * place[:, None] * frequency)
    waves[:, 0] = 1.0
    return waves * (frequency < count)


class CoordinateDecoder(MatrixDecoder):
    """See the module docstring. Reads `width`, `rank` (R) and `cells` (half the number of cosines)."""

    def __init__(self, settings: DecoderSettings, *, generator: torch.Generator) -> None:
        super().__init__(settings)
        node_width, width, waves = settings.node_width, settings.width, 2 * settings.cells

        def normal(*shape: int, std: float = 1.0) -> nn.Parameter:
            return nn.Parameter(std * torch.randn(shape, generator=generator))

        self.class_codes = normal(settings.classes, waves)
        self.block_codes = normal(MAX_BLOCKS, node_width, std=0.5)
        self.rows, self.columns = (normal(waves, width, std=waves**-0.5) for _ in range(2))
        self.kernel = normal(GRID * GRID, width)
        self.row_base, self.column_base = (normal(width, settings.rank, std=width**-0.5) for _ in range(2))
        self.hidden = nn.Linear(node_width, width)
        self.row_gate, self.column_gate = nn.Linear(width, width), nn.Linear(width, width)
        self.spectrum = nn.Linear(width, settings.rank)
        self.gain = nn.Linear(node_width, 1)
        with torch.no_grad():
            nn.init.normal_(self.hidden.weight, std=math.sqrt(2 / node_width), generator=generator)
            for gate in (self.row_gate, self.column_gate):
                nn.init.normal_(gate.weight, std=OWN / math.sqrt(width), generator=generator)
                nn.init.ones_(gate.bias)
            for layer in (self.spectrum, self.gain):
                nn.init.zeros_(layer.weight)
            for layer in (self.hidden, self.spectrum, self.gain):
                nn.init.zeros_(layer.bias)

    def matrices(self, group: Group, targets: Tensor) -> Tensor:
        waves, length = self.rows.shape[0], group.inputs * math.prod(group.kernel)
        rank = min(self.settings.rank, group.outputs, length)
        hidden = F.gelu(self.hidden(targets))
        device = targets.device
        places = self.class_codes if group.output else cosines(group.outputs, waves, device=device).to(targets)
        rows = places @ self.rows  # [O, width]
        kernel = kernel_basis(group.kernel, device=device).to(targets) @ self.kernel
        columns = ((cosines(group.inputs, waves, device=device).to(targets) @ self.columns)[:, None] * kernel).flatten(
            0, 1
        )
        left = equalise(rows * self.row_gate(hidden)[..., None, :] @ self.row_base[:, :rank], STEPS)
        right = equalise(columns * self.column_gate(hidden)[..., None, :] @ self.column_base[:, :rank], STEPS)
        gains = torch.exp(torch.tanh(self.spectrum(hidden)[..., None, :rank]))
        matrices = left * gains @ right.mT
        return matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-12)
