"""Plain convolutional networks after VGG (Simonyan and Zisserman, ICLR 2015, arXiv 1409.1556), with batch norm.

DEPTH 3x3 convolutions in three stages of w, 2w, 4w channels, max pooling between the stages, global average pooling and
one linear layer in place of VGG's three; so 8x8 and 32x32 images both work.
"""

from __future__ import annotations

from torch import nn

from collect.architectures.stages import check_image, convolution, head, split_evenly


def build(depth: int, width: int, *, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """`vgg-DEPTH-wWIDTH` for images `(C, H, W)`. Raises `ConfigError` if DEPTH < 3 or the image is below 4x4."""
    check_image("vgg", shape)
    layers: list[nn.Module] = []
    inputs = shape[0]
    for stage, count in enumerate(split_evenly("vgg", depth)):
        if stage:
            layers.append(nn.MaxPool2d(2))
        for _ in range(count):
            layers += [*convolution(inputs, width << stage, 3), nn.ReLU()]
            inputs = width << stage
    return nn.Sequential(*layers, *head(inputs, classes))
