"""Small vision transformers (Dosovitskiy et al., ICLR 2021, arXiv 2010.11929).

Patch convolution, class token, learned position table, DEPTH pre-norm blocks of attention and a two-layer MLP of four
times the width, norm, classifier on the class token. No dropout.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from generators.errors import ConfigError

HEAD_SIZE = 16  # units per attention head; small, because these networks are 16 to 64 wide
MOST_PATCHES = 8  # along one side: 2x2 patches for 8x8 images, 4x4 for 32x32


class ToTokens(nn.Module):
    """Pixels as a sequence: `[N, D, H, W]` to `[N, T, D]`, T = H W."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(2).transpose(1, 2)


class Tokens(nn.Module):
    """Class token in front of the patches, plus the position table: `[N, T, D]` to `[N, T + 1, D]`."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, patches + 1, width))

    def forward(self, patches: Tensor) -> Tensor:
        return torch.cat([self.token.expand(patches.shape[0], -1, -1), patches], dim=1) + self.position


class Mix(nn.Module):
    """Scaled dot-product attention of all heads, without parameters: `[..., T, 3 D]` (q, k, v) to `[..., T, D]`."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, projected: Tensor) -> Tensor:
        split = projected.flatten(0, -3).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each [N, heads, T, size]
        # Written out: torch's fused attention has no second derivative and no batching rule, initialisers need both.
        mixed = (query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)).softmax(-1) @ value
        return mixed.transpose(1, 2).flatten(2).unflatten(0, projected.shape[:-2])


class ClassToken(nn.Module):
    """The token that the classifier reads: `[..., T, D]` to `[..., D]`."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[..., 0, :]


class Block(nn.Module):
    """Pre-norm transformer block: `x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 3 * width), Mix(width // HEAD_SIZE), nn.Linear(width, width)
        )
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(tokens)
        return tokens + self.mlp(tokens)


def build(depth: int, width: int, *, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """`vit-DEPTH-wWIDTH` for images `(C, H, W)`.

    Raises:
        ConfigError: WIDTH is not a multiple of `HEAD_SIZE`, or no patch of 2 pixels or more divides the image into at
            most `MOST_PATCHES` along each side.
    """
    if width % HEAD_SIZE:
        lower = max(HEAD_SIZE, width - width % HEAD_SIZE)
        raise ConfigError(
            f"the width of a vit is a multiple of {HEAD_SIZE} (units per head), got {width}; try {lower} or "
            f"{lower + HEAD_SIZE}"
        )
    height, breadth = shape[1:]
    fitting = (
        patch for patch in range(2, min(height, breadth) // 2 + 1)
        if height % patch == breadth % patch == 0 and max(height, breadth) <= MOST_PATCHES * patch
    )  # fmt: skip
    patch = next(fitting, None)
    if patch is None:
        raise ConfigError(
            f"no square patch of 2 pixels or more cuts a {height}x{breadth} image into 2 to {MOST_PATCHES} patches "
            "along each side; use images whose sides have a common divisor, such as 8x8, 28x28 or 32x32"
        )
    return nn.Sequential(
        nn.Conv2d(shape[0], width, patch, stride=patch),
        ToTokens(),
        Tokens((height // patch) * (breadth // patch), width),
        *(Block(width) for _ in range(depth)),
        nn.LayerNorm(width),
        ClassToken(),
        nn.Linear(width, classes),
    )
