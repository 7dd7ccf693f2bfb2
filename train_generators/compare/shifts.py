"""Shifted test images: named kinds of shift at severities 0 (clean) to 5, the same for everyone from a seed.

The kinds follow the common-corruption benchmark of Hendrycks and Dietterich (2019) in spirit, not in detail: lengths
are shares of the image's side and intensities shares of the value range, so that 8 x 8 digits and 32 x 32 photographs
are shifted alike. Per image there is one random draw (a noise field, a sign, a direction) that severity only scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as image_functions

from generators.errors import unknown_name
from generators.seeds import stream

SEVERITIES = (0, 1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Shift:
    """One kind of shift.

    Attributes:
        apply: `apply(pictures [N, C, H, W] in [0, 1], magnitude, generator) -> [N, C, H, W]`.
        magnitudes: of severities 1 to 5.
        unit: what a magnitude is.
    """

    apply: Callable[[Tensor, float, torch.Generator], Tensor]
    magnitudes: tuple[float, float, float, float, float]
    unit: str


def _signs(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """One fair boolean per picture, `[N, 1, 1, 1]`."""
    return (torch.rand(len(pictures), generator=generator) < 0.5).view(-1, 1, 1, 1)


def _noise(pictures: Tensor, magnitude: float, generator: torch.Generator) -> Tensor:
    return pictures + magnitude * torch.randn(pictures.shape, generator=generator)


def _blur(pictures: Tensor, magnitude: float, generator: torch.Generator) -> Tensor:
    side = min(pictures.shape[-2:])
    sigma = magnitude * side
    reach = min(max(1, math.ceil(3 * sigma)), side - 1)  # reflection needs a border smaller than the picture
    return image_functions.gaussian_blur(pictures, [2 * reach + 1] * 2, [sigma, sigma]) if reach else pictures


def _rotation(pictures: Tensor, magnitude: float, generator: torch.Generator) -> Tensor:
    def turned(angle: float) -> Tensor:
        return image_functions.rotate(pictures, angle, interpolation=InterpolationMode.BILINEAR)

    return torch.where(_signs(pictures, generator), turned(magnitude), turned(-magnitude))


def _translation(pictures: Tensor, magnitude: float, generator: torch.Generator) -> Tensor:
    height, width = pictures.shape[-2:]

    def moved(x: float, y: float) -> Tensor:
        return image_functions.affine(
            pictures, angle=0.0, translate=[x * width, y * height], scale=1.0, shear=[0.0, 0.0],
            interpolation=InterpolationMode.BILINEAR,
        )  # fmt: skip

    sideways = torch.where(_signs(pictures, generator), moved(magnitude, 0), moved(-magnitude, 0))
    upright = torch.where(_signs(pictures, generator), moved(0, magnitude), moved(0, -magnitude))
    return torch.where(_signs(pictures, generator), sideways, upright)


def _contrast(pictures: Tensor, magnitude: float, generator: torch.Generator) -> Tensor:
    mean = pictures.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (1 - magnitude) * (pictures - mean)


SHIFTS: dict[str, Shift] = {
    "noise": Shift(_noise, (0.05, 0.1, 0.15, 0.2, 0.3), "std of added white noise, share of the value range"),
    "blur": Shift(_blur, (0.02, 0.04, 0.06, 0.09, 0.12), "std of a Gaussian blur, share of the side"),
    "rotation": Shift(_rotation, (10, 20, 30, 40, 50), "degrees, left or right"),
    "translation": Shift(_translation, (0.03, 0.06, 0.1, 0.15, 0.2), "share of the side, in one of four directions"),
    "contrast": Shift(_contrast, (0.25, 0.5, 0.65, 0.8, 0.9), "share of the contrast that is lost"),
}


def shift(pictures: Tensor, name: str, severity: int, *, seed: int) -> Tensor:
    """Shifted copies of `pictures` `[N, C, H, W]` with values in [0, 1]; severity 0 returns them as they are.

    Raises:
        UnknownNameError: no such kind of shift.
    """
    if name not in SHIFTS:
        raise unknown_name("shift", name, SHIFTS)
    if severity == 0:
        return pictures
    kind = SHIFTS[name]
    moved = kind.apply(pictures, kind.magnitudes[severity - 1], stream(seed, "shift", name))
    return moved.clamp(0, 1)


@dataclass(frozen=True)
class ShiftedSet:
    """Normalised test images `[N, C, H, W]` with labels `[N]` under one shift; clean has severity 0 and shift ""."""

    shift: str
    severity: int
    images: Tensor
    labels: Tensor


def shifted_sets(images: Any, names: tuple[str, ...], *, most: int, seed: int) -> Iterator[ShiftedSet]:
    """The clean test set of `images` (a `collect.data.ImageSet`), then every shift at severities 1 to 5.

    Pictures are brought to [0, 1] by the range of the training images, shifted, and normalised again. Shifted sets hold
    the first `most` test images.
    """
    clean = images.test
    yield ShiftedSet("", 0, clean.images, clean.labels)
    mean = torch.as_tensor(images.mean, dtype=torch.float32).view(1, -1, 1, 1)
    std = torch.as_tensor(images.std, dtype=torch.float32).view(1, -1, 1, 1)
    raw_train = images.train.images * std + mean
    low, high = raw_train.amin(), raw_train.amax()
    pictures = ((clean.images[:most] * std + mean - low) / (high - low)).clamp(0, 1)
    for name in names:
        for severity in SEVERITIES[1:]:
            shifted = shift(pictures, name, severity, seed=seed) * (high - low) + low
            yield ShiftedSet(name, severity, (shifted - mean) / std, clean.labels[:most])
