"""Small plain convolutional networks after the Small CNN Zoo (Unterthiner et al., 2020, arXiv 2002.11448): no norms.

DEPTH 3x3 convolutions with bias, all of w channels, each but the first with stride 2 as long as there is resolution to
halve, then global average pooling and one linear layer. The zoo's own networks, three convolutions of 16 channels on
one colour and 4,970 parameters, stride the first convolution as well: they start from 28x28 images.
"""

from __future__ import annotations

from torch import nn

from collect.architectures.stages import head


def build(depth: int, width: int, *, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """`cnn-DEPTH-wWIDTH` for images `(C, H, W)` of any size."""
    layers: list[nn.Module] = []
    inputs, side = shape[0], min(shape[1:])
    for number in range(depth):
        stride = 2 if number and side > 1 else 1
        side = -(-side // stride)
        layers += [nn.Conv2d(inputs, width, 3, stride=stride, padding=1), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, *head(width, classes))
