"""A vector-quantised VAE of slices whose prior over code maps is a gated PixelCNN (arXiv 1606.05328).

    p(codes) = prod_j p(code_j | codes before j),   places in reading order

Two stacks of convolutions see what comes before a place: one the rows above it, one what is to its left. Each layer is
gated, `tanh(a) sigmoid(b)`, and the first looks past the place itself. The prior learns the codes while they settle:
its loss moves neither encoder nor codes.
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from generators.local.config import LocalOptions
from generators.local.vector_quantised import VectorQuantisedVAE

REACH = 2  # how many rows above and columns to the left a layer sees
LAYERS = 3


def _gated(values: Tensor) -> Tensor:
    """`tanh(a) sigmoid(b)` of the halves a, b of `[N, 2 c, h, w]`."""
    first, second = values.chunk(2, dim=1)
    return first.tanh() * second.sigmoid()


class GatedLayer(nn.Module):
    """One layer of both stacks `[N, c, h, w]`.

    Args:
        channels: c.
        first: the horizontal stack must not see the place itself, and has no residual.
    """

    def __init__(self, channels: int, *, first: bool) -> None:
        super().__init__()
        self.first = first
        self.above = nn.Conv2d(channels, 2 * channels, (REACH + 1, 2 * REACH + 1))
        self.left = nn.Conv2d(channels, 2 * channels, (1, REACH if first else REACH + 1))
        self.across = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, vertical: Tensor, horizontal: Tensor) -> tuple[Tensor, Tensor]:
        height, width = vertical.shape[2:]
        above = self.above(pad(vertical, (REACH, REACH, REACH, 0)))
        left = self.left(pad(horizontal, (REACH, 0, 0, 0)))[..., :width]
        # what is above a place ends in the row before it
        found = _gated(left + self.across(pad(above, (0, 0, 1, 0))[:, :, :height]))
        return _gated(above), self.out(found) + (0.0 if self.first else horizontal)


class PixelCNN(nn.Module):
    """Logits `[N, K, h, w]` of the code at every place, given those before it, from code maps `[N, h, w]`."""

    def __init__(self, codes: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, channels)
        self.layers = nn.ModuleList(GatedLayer(channels, first=index == 0) for index in range(LAYERS))
        self.head = nn.Sequential(nn.SiLU(), nn.Conv2d(channels, 2 * channels, 1), nn.SiLU())
        self.logits = nn.Conv2d(2 * channels, codes, 1)

    def forward(self, indices: Tensor) -> Tensor:
        vertical = horizontal = self.embedding(indices).permute(0, 3, 1, 2)
        for layer in self.layers:
            vertical, horizontal = layer(vertical, horizontal)
        return self.logits(self.head(horizontal))

    def sample(self, uniform: Tensor) -> Tensor:
        """Code maps from uniform draws, both `[N, h, w]`: place by place the inverse distribution function.

        What a place is computed from is kept, so that every place and layer is computed once. All maps are padded with
        `REACH` zeros above and on both sides.
        """
        layers = cast(list[GatedLayer], list(self.layers))
        count, height, width = uniform.shape
        channels = self.embedding.embedding_dim
        found = torch.zeros(uniform.shape, dtype=torch.long, device=uniform.device)
        vertical = uniform.new_zeros(LAYERS + 1, count, channels, height + REACH, width + 2 * REACH)
        above = [uniform.new_zeros(count, 2 * channels, 1, width) for _ in layers]
        for row in range(height):
            across = [layer.across(values) for layer, values in zip(layers, above, strict=True)]
            horizontal = uniform.new_zeros(LAYERS + 1, count, channels, 1, REACH + width)
            for column in range(width):
                here = slice(REACH + column, REACH + column + 1)
                for index, layer in enumerate(layers):
                    left = layer.left(horizontal[index, ..., column : column + layer.left.kernel_size[1]])
                    value = layer.out(_gated(left + across[index][..., column : column + 1]))
                    horizontal[index + 1, ..., here] = value if layer.first else value + horizontal[index, ..., here]
                cumulated = self.logits(self.head(horizontal[-1, ..., here])).flatten(1).softmax(1).cumsum(1)
                codes = (cumulated < uniform[:, row, column, None]).sum(1).clamp_max(cumulated.shape[1] - 1)
                found[:, row, column] = codes
                horizontal[0, ..., 0, REACH + column] = self.embedding(codes)
            vertical[0, :, :, REACH + row] = pad(horizontal[0, ..., 0, :], (0, REACH))
            for index, layer in enumerate(layers):
                above[index] = layer.above(vertical[index, :, :, row : row + REACH + 1])
                vertical[index + 1, :, :, REACH + row, REACH:-REACH] = _gated(above[index])[:, :, 0]
        return found


class PixelCNNVAE(VectorQuantisedVAE):
    """Codes that depend on each other. Options: channels, codes. After "VQVAE*" of arXiv 2310.16695."""

    summary: ClassVar[str] = (
        "one vector-quantised VAE with a gated PixelCNN prior per weight group (kernel size, role, depth)"
    )

    def __init__(self, shape: tuple[int, ...], options: LocalOptions) -> None:
        super().__init__(shape, options)
        self.pixelcnn = PixelCNN(options.codes, options.channels)

    def rate(self, indices: Tensor) -> Tensor:
        maps = indices.reshape(-1, *self.grid)
        return cross_entropy(self.pixelcnn(maps), maps) * self.size

    def indices(self, latents: Tensor) -> Tensor:
        return self.pixelcnn.sample(torch.special.ndtr(latents).reshape(-1, *self.grid)).flatten(1)
