"""The block decoders of GHN-2 and GHN-3, the baseline: blocks of fixed size, cut or repeated to fit.

Knyazev et al. 2021 (arXiv 2110.13100) and 2023 (arXiv 2303.04143), for node vectors of C numbers, kernels of S x S and
blocks of B x B:

    linear C -> 4 C x S x S, ReLU, the middle of the kernel, 1 x 1 convolutions 4 C -> 8 C -> ReLU -> B * B,

the first rows and columns of the block if the target has fewer channels, whole blocks side by side if it has more. A
classifier has a head of its own, ReLU and B rows -> classes. What that costs: a target of n x n blocks has rank B at
most and holds every number n^2 times, so there are neurons that get the same gradient for ever.

`FanInBlockDecoder` is the reference to the letter: its spread is fan-in scaled and otherwise free. In training behind
batch norm it grows without bound, and an anchor loses its share. `BlockDecoder` brings each target to unit spread.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generators.ghn.decoder import DecoderSettings, MatrixDecoder
from generators.ghn.plan import MAX_BLOCKS, Group
from generators.hyperfan import hyperfan_


class BlockDecoder(MatrixDecoder):
    """See the module docstring. Reads `block` (B) and `block_kernel` (S)."""

    def __init__(self, settings: DecoderSettings, *, generator: torch.Generator) -> None:
        super().__init__(settings)
        width, block, kernel = settings.node_width, settings.block, settings.block_kernel
        self.block_codes = nn.Parameter(0.5 * torch.randn(MAX_BLOCKS, width, generator=generator))
        # a ReLU halves the second moment of the rows that the class codes read
        self.class_codes = nn.Parameter(
            math.sqrt(2 / block) * torch.randn(settings.classes, block, generator=generator)
        )
        self.positions = nn.Linear(width, 4 * width * kernel**2)
        self.mix = nn.Linear(4 * width, 8 * width)
        self.blocks = nn.Linear(8 * width, block**2)
        self.gain = nn.Linear(width, 1)
        self.calibrate(generator)

    @torch.no_grad()
    def calibrate(self, generator: torch.Generator) -> None:
        """He's spread before ReLUs, hyperfan for the head on node vectors of unit second moment; gains are 1."""
        for layer in (self.positions, self.mix):
            nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.in_features), generator=generator)
            nn.init.zeros_(layer.bias)
        nodes = torch.randn(1024, self.settings.node_width, generator=generator)
        hidden = self.hidden(nodes + self.block_codes[0], 1, 1)
        hyperfan_(self.blocks, fan_in=1, fan_out=1, generator=generator, hidden=hidden.flatten(0, -2), relu=False)
        nn.init.zeros_(self.gain.weight)
        nn.init.zeros_(self.gain.bias)

    def hidden(self, node: Tensor, height: int, width: int) -> Tensor:
        """`[..., C]` to `[..., height * width, 8 C]`, the middle `height` x `width` positions of the S x S."""
        side = self.settings.block_kernel
        top, left = (side - height) // 2, (side - width) // 2

        def middle(parameter: Tensor) -> Tensor:
            grid = parameter.unflatten(0, (-1, side, side))[:, top : top + height, left : left + width]
            return grid.flatten(0, 2)

        x = F.relu(F.linear(node, middle(self.positions.weight), middle(self.positions.bias)))
        return F.relu(self.mix(x.unflatten(-1, (-1, height * width)).mT))

    def tiles(self, group: Group, node: Tensor) -> Tensor:
        """`[M, G, O, I * S]` as the reference makes them, of about unit spread at the start."""
        side, block = self.settings.block_kernel, self.settings.block
        height, width = (1, 1, *group.kernel)[-2:]
        made = min(height, side), min(width, side)
        rows, columns = block if group.output else min(group.outputs, block), min(group.inputs, block)
        weight = self.blocks.weight.unflatten(0, (block, block))[:rows, :columns].flatten(0, 1)
        bias = self.blocks.bias.unflatten(0, (block, block))[:rows, :columns].flatten()
        x = F.linear(self.hidden(node, *made), weight, bias).mT.unflatten(
            2, (rows, columns)
        )  # [M, G, rows, columns, S]
        if made != (height, width):
            grid = x.flatten(0, 3).unflatten(-1, made)[:, None]
            x = F.interpolate(grid, (height, width), mode="bilinear").flatten(1).unflatten(0, x.shape[:4])
        if group.output:
            x = torch.einsum("cr,mgris->mgcis", self.class_codes, F.relu(x))
        else:
            x = x[:, :, torch.arange(group.outputs, device=x.device) % block]
        return x[:, :, :, torch.arange(group.inputs, device=x.device) % block].flatten(-2)

    def matrices(self, group: Group, targets: Tensor) -> Tensor:
        tiles = self.tiles(group, targets)
        return tiles / (tiles.norm(dim=(-2, -1), keepdim=True) + 1e-12)


class FanInBlockDecoder(BlockDecoder):
    """`BlockDecoder` with sqrt(beta / fan_in) as the only scale: unit spread at the start on average, free afterwards.

    Its matrices are not of unit norm, and `gain_bound` does not bound them. beta is 2, or 1 for depthwise kernels and
    those that are wider than high.
    """

    def matrices(self, group: Group, targets: Tensor) -> Tensor:
        tiles = self.tiles(group, targets)
        height, width = (1, 1, *group.kernel)[-2:]
        beta = 1.0 if height < width or (group.inputs == 1 and group.kernel) else 2.0
        he = 1.0 if group.output else 2.0  # what `Group.target_std` takes for beta
        return tiles * math.sqrt(beta / he / math.prod(tiles.shape[-2:]))
