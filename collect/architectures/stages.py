"""What the convolutional families share: three stages that halve the resolution and double the channels."""

from __future__ import annotations

from torch import nn

from generators.errors import ConfigError

STAGES = 3
SMALLEST_IMAGE = 2 ** (STAGES - 1)


def check_image(family: str, shape: tuple[int, int, int]) -> None:
    """Raise `ConfigError` if an image `(C, H, W)` is too small to be halved between the stages."""
    if min(shape[1:]) < SMALLEST_IMAGE:
        raise ConfigError(
            f"{family} halves its resolution {STAGES - 1} times, so images must be at least "
            f"{SMALLEST_IMAGE}x{SMALLEST_IMAGE}, got {shape[1]}x{shape[2]}; use larger images or an mlp"
        )


def split_evenly(family: str, depth: int) -> list[int]:
    """`depth` layers over the stages, earlier stages first: 7 -> [3, 2, 2]. `ConfigError` if a stage stays empty."""
    if depth < STAGES:
        raise ConfigError(f"{family} has {STAGES} stages, so its depth must be at least {STAGES}, got {depth}")
    return [depth // STAGES + (stage < depth % STAGES) for stage in range(STAGES)]


def convolution(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution without bias (the norm has one) and batch norm; odd kernels keep the resolution at stride 1."""
    return [
        nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


def head(features: int, classes: int) -> list[nn.Module]:
    """Global average pooling and the classifier."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, classes)]
