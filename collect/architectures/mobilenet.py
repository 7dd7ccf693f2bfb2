"""Depthwise separable networks after MobileNet (Howard et al., 2017, arXiv 1704.04861).

A 3x3 stem, then DEPTH blocks of a depthwise 3x3 and a pointwise 1x1 convolution, each with batch norm and ReLU, in
three stages of w, 2w, 4w channels; the first block of the later stages has stride 2.
"""

from __future__ import annotations

from torch import nn

from collect.architectures.stages import check_image, convolution, head, split_evenly


def build(depth: int, width: int, *, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """`mobilenet-DEPTH-wWIDTH` for images `(C, H, W)`. Raises `ConfigError` if DEPTH < 3 or the image is below 4x4."""
    check_image("mobilenet", shape)
    layers: list[nn.Module] = [*convolution(shape[0], width, 3), nn.ReLU()]
    inputs = width
    for stage, count in enumerate(split_evenly("mobilenet", depth)):
        for number in range(count):
            stride = 2 if stage and not number else 1
            layers += [*convolution(inputs, inputs, 3, stride=stride, groups=inputs), nn.ReLU()]
            layers += [*convolution(inputs, width << stage, 1), nn.ReLU()]
            inputs = width << stage
    return nn.Sequential(*layers, *head(inputs, classes))
