"""Small vision transformers (Dosovitskiy et al., ICLR 2021, arXiv 2010.11929).

Patch convolution, class token, learned position table, DEPTH pre-norm blocks of attention and a two-layer MLP of four
times the width, norm, classifier on the class token. No dropout.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from generators.errors import ConfigError

HEAD_SIZE = 8  # units per attention head; small, because these networks are 16 to 64 wide
MOST_PATCHES = 8  # along one side: 2x2 patches for 8x8 images, 4x4 for 32x32


class Tokens(nn.Module):
    """Class token in front of the patches, plus the position table: `[N, T, D]` to `[N, T + 1, D]`."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, patches + 1, width))

    def forward(self, patches: Tensor) -> Tensor:
        return torch.cat([self.token.expand(patches.shape[0], -1, -1), patches], dim=1) + self.position


class Attention(nn.Module):
    """Multi-head self-attention over `[N, T, D]`, all heads in one query-key-value projection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD_SIZE
        self.query_key_value = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        split = self.query_key_value(tokens).unflatten(-1, (3, self.heads, HEAD_SIZE))
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each [N, heads, T, HEAD_SIZE]
        # written out, because torch's fused attention has no batching rule for many members at once
        mixed = (query @ key.transpose(-1, -2) * HEAD_SIZE**-0.5).softmax(-1) @ value
        return self.projection(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block: `x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(tokens)
        return tokens + self.mlp(tokens)


class VisionTransformer(nn.Module):
    """Images `[N, C, H, W]` to logits `[N, classes]`."""

    def __init__(self, depth: int, width: int, *, shape: tuple[int, int, int], classes: int, patch: int) -> None:
        super().__init__()
        self.patches = nn.Sequential(nn.Conv2d(shape[0], width, patch, stride=patch), nn.Flatten(2))
        self.tokens = Tokens((shape[1] // patch) * (shape[2] // patch), width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.tokens(self.patches(images).transpose(1, 2))
        return self.classifier(self.norm(self.blocks(tokens))[:, 0])


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
    return VisionTransformer(depth, width, shape=shape, classes=classes, patch=patch)
