"""CIFAR ResNets (He et al., CVPR 2016, arXiv 1512.03385, section 4.2) with parameter-free shortcuts (option A).

Depth 6n + 2: a stem, three stages of n blocks of two 3x3 convolutions, a classifier. ResNet-20-w16 has 19 of them.

The same without normalisation is `bare-resnet`: convolutions have biases, and every branch ends with a scalar, as in
SkipInit (De and Smith, NeurIPS 2020, arXiv 2002.10444), which is 1 unless an initialiser says otherwise. It stands for
networks in which scale is not hidden, where initialisers matter most.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collect.architectures.stages import STAGES, check_image, convolution, head
from generators.errors import ConfigError


class Shortcut(nn.Module):
    """Option A: every `stride`-th pixel, and zero channels on both sides up to `outputs`; no parameters.

    A leaf for `collect.grouped`, which has a rule for it.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (outputs - inputs) // 2
        self.after = outputs - inputs - self.before

    def forward(self, images: Tensor) -> Tensor:
        """`[N, inputs, H, W]` to `[N, outputs, ceil(H / stride), ceil(W / stride)]`."""
        return F.pad(images[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class Gain(nn.Module):
    """Multiplies by one learned number."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return self.gain * images


class Block(nn.Module):
    """`relu(shortcut(x) + bn(conv(relu(bn(conv(x))))))`."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.body = self.branch(inputs, outputs, stride=stride)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else Shortcut(inputs, outputs, stride=stride)
        self.activation = nn.ReLU()

    @staticmethod
    def branch(inputs: int, outputs: int, *, stride: int) -> nn.Sequential:
        """What is added to the shortcut."""
        return nn.Sequential(
            *convolution(inputs, outputs, 3, stride=stride), nn.ReLU(), *convolution(outputs, outputs, 3)
        )

    def forward(self, images: Tensor) -> Tensor:
        """`[N, inputs, H, W]` to `[N, outputs, H / stride, W / stride]`."""
        return self.activation(self.body(images) + self.shortcut(images))


class BareBlock(Block):
    """`relu(shortcut(x) + gain * conv(relu(conv(x))))`."""

    @staticmethod
    def branch(inputs: int, outputs: int, *, stride: int) -> nn.Sequential:
        """What is added to the shortcut."""
        first = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        return nn.Sequential(first, nn.ReLU(), nn.Conv2d(outputs, outputs, 3, padding=1), Gain())


def _build(
    family: str, depth: int, width: int, *, shape: tuple[int, int, int], classes: int, stem: list[nn.Module],
    block: Callable[..., nn.Module],
) -> nn.Module:  # fmt: skip
    if depth < 8 or (depth - 2) % 6:
        below = max(8, depth - (depth - 2) % 6)
        raise ConfigError(f"the depth of {family} is 6n + 2 (8, 14, 20, ...), got {depth}; try {below} or {below + 6}")
    check_image(family, shape)
    layers = [*stem, nn.ReLU()]
    inputs = width
    for stage in range(STAGES):
        for number in range((depth - 2) // 6):
            layers.append(block(inputs, width << stage, stride=2 if stage and not number else 1))
            inputs = width << stage
    return nn.Sequential(*layers, *head(inputs, classes))


def build(depth: int, width: int, *, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """`resnet-DEPTH-wWIDTH` for images `(C, H, W)`. Raises `ConfigError` unless DEPTH is 6n + 2 with n >= 1."""
    stem = convolution(shape[0], width, 3)
    return _build("resnet", depth, width, shape=shape, classes=classes, stem=stem, block=Block)


def build_bare(depth: int, width: int, *, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """`bare-resnet-DEPTH-wWIDTH`, the same without normalisation."""
    stem: list[nn.Module] = [nn.Conv2d(shape[0], width, 3, padding=1)]
    return _build("bare-resnet", depth, width, shape=shape, classes=classes, stem=stem, block=BareBlock)
