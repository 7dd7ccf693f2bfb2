"""Small untrained GHNs and the networks that tests fill with them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from collect.architectures import build
from generators.ghn.config import GHNConfig

SMALL = GHNConfig(hidden=16, heads=2, layers=2, width=24, rank=6, cells=8)
NOISY = replace(SMALL, anchor=0.6, code=4)
IMAGE = torch.zeros(1, 1, 8, 8)


def network(name: str = "resnet-8-w4", classes: int = 10) -> nn.Module:
    return build(name, shape=(1, 8, 8), classes=classes)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two state dicts hold the same bits under the same names."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
