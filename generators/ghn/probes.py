"""The models for which a graph hypernetwork must make sound weights before it is saved; see `generators.checkpoint`.

Every sort of layer that `generators.ghn.familiar` tells apart is in one of them, so large that its spectrum is judged
(classifiers of a few classes have none to judge).
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn


def _convnet(classes: int) -> nn.Module:
    """Plain, strided, depthwise, 1 x 1 and 5 x 5 convolutions for colour images of any size."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.Conv2d(64, 96, 1), nn.ReLU(),
        nn.Conv2d(96, 48, 5, padding=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, classes),
    )  # fmt: skip


def _perceptron(classes: int) -> nn.Module:
    """Layers that grow and shrink."""
    widths = (64, 256, 128, 32)
    layers = [part for one, two in itertools.pairwise(widths) for part in (nn.Linear(one, two), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def _upwards(conv: type[nn.Module], transposed: type[nn.Module], pool: type[nn.Module], classes: int) -> nn.Module:
    """Wide grouped and transposed convolutions, and a classifier of many inputs: sorts that are narrow elsewhere."""
    return nn.Sequential(
        conv(16, 128, 3, padding=1), nn.GroupNorm(1, 128), nn.ReLU(),
        conv(128, 128, 3, padding=1, groups=2), nn.GroupNorm(1, 128), nn.ReLU(),
        transposed(128, 128, 2, stride=2), nn.GroupNorm(1, 128), nn.ReLU(),
        transposed(128, 256, 3, padding=1, groups=2), nn.ReLU(),
        pool(1), nn.Flatten(), nn.Linear(256, classes),
    )  # fmt: skip


class _Transformer(nn.Module):
    """Two encoder layers: stacked query, key and value, and the layers behind them."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.inlet = nn.Linear(24, 64)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True) for _ in range(2))
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inlet(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(dim=1))


def probes(classes: int) -> dict[str, tuple[nn.Module, Tensor]]:
    """Name -> a model for `classes` classes, without values, and an input that it accepts."""
    with torch.device("meta"):
        return {
            "convnet": (_convnet(classes), torch.zeros(1, 3, 32, 32)),
            "perceptron": (_perceptron(classes), torch.zeros(1, 64)),
            "transformer": (_Transformer(classes), torch.zeros(1, 5, 24)),
            "image": (
                _upwards(nn.Conv2d, nn.ConvTranspose2d, nn.AdaptiveAvgPool2d, classes), torch.zeros(1, 16, 8, 8)
            ),
            "signal": (
                _upwards(nn.Conv1d, nn.ConvTranspose1d, nn.AdaptiveAvgPool1d, classes), torch.zeros(1, 16, 32)
            ),
        }  # fmt: skip
