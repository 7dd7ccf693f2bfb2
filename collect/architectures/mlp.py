"""Multilayer perceptrons: DEPTH hidden layers of WIDTH ReLU units on the flattened image, no normalisation."""

from __future__ import annotations

import math

from torch import nn


def build(depth: int, width: int, *, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """`mlp-DEPTH-wWIDTH` for images `(C, H, W)`."""
    layers: list[nn.Module] = [nn.Flatten()]
    inputs = math.prod(shape)
    for _ in range(depth):
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, classes))
