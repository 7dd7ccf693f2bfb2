"""Real handwritten digits in batches, and the deep network without normalisation that scales matter to."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


def digits(count: int, *, flat: bool = True) -> Batch:
    """`count` standardised images `[N, 64]`, or `[N, 1, 8, 8]`, and their labels `[N]`."""
    found = load_digits()
    images = torch.tensor(found.images[:count], dtype=torch.float32)
    images = (images - images.mean()) / images.std()
    return images.flatten(1) if flat else images[:, None], torch.tensor(found.target[:count])


def digit_batches(count: int, size: int, *, flat: bool = True) -> list[Batch]:
    """The first `count` digits in batches of `size`."""
    images, labels = digits(count, flat=flat)
    return list(zip(images.split(size), labels.split(size), strict=True))


def deep_mlp(hidden: int = 9, width: int = 64, *, bias: bool = True) -> nn.Sequential:
    """A ReLU network of `hidden` + 1 linear layers on flat digits."""
    layers: list[nn.Module] = []
    for index in range(hidden):
        layers += [nn.Linear(width if index else 64, width, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10, bias=bias))
