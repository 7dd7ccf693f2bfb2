"""Architecture families with free depth and width, for zoos of many small networks.

A network is named `FAMILY-DEPTH-wWIDTH`, such as `resnet-20-w16`. All families are made of leaf modules, additions and
little else, so that `collect.forms` can train K of them as one grouped network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import nn

from collect.architectures import cnn, mlp, mobilenet, resnet, vgg, vit
from generators.errors import ConfigError, unknown_name

Build = Callable[..., nn.Module]


@dataclass(frozen=True)
class Family:
    """One architecture family.

    Attributes:
        build: `build(depth, width, *, shape, classes)`, a module from images `[N, C, H, W]` to logits `[N, classes]`.
        depth: what the number after the family's name counts.
        width: what the number after `w` counts.
        paper: where the family comes from.
        example: a name that works on 8x8 and on 32x32 images.
    """

    build: Build
    depth: str
    width: str
    paper: str
    example: str


FAMILIES: dict[str, Family] = {
    "resnet": Family(
        resnet.build, "layers with weights on the longest path, 6n + 2", "channels w, 2w, 4w in the three stages",
        "He et al., CVPR 2016, arXiv 1512.03385, section 4.2", "resnet-20-w16",
    ),
    "bare-resnet": Family(
        resnet.build_bare, "as for resnet", "as for resnet",
        "the same without normalisation, with the scalars of De and Smith, NeurIPS 2020, arXiv 2002.10444",
        "bare-resnet-20-w16",
    ),
    "cnn": Family(
        cnn.build, "3x3 convolutions, at least 1", "channels of all of them",
        "Unterthiner et al., 2020, arXiv 2002.11448, without its first stride", "cnn-3-w16",
    ),
    "vgg": Family(
        vgg.build, "3x3 convolutions, at least 3", "channels w, 2w, 4w in the three stages",
        "Simonyan and Zisserman, ICLR 2015, arXiv 1409.1556, with batch norm", "vgg-6-w16",
    ),
    "mobilenet": Family(
        mobilenet.build, "depthwise separable blocks, at least 3", "channels w, 2w, 4w in the three stages",
        "Howard et al., 2017, arXiv 1704.04861", "mobilenet-6-w16",
    ),
    "mlp": Family(
        mlp.build, "hidden layers, at least 1", "units per hidden layer",
        "Rumelhart et al., Nature 323, 1986", "mlp-3-w64",
    ),
    "vit": Family(
        vit.build, "transformer blocks, at least 1", f"embedding size, a multiple of {vit.HEAD_SIZE} (one head each)",
        "Dosovitskiy et al., ICLR 2021, arXiv 2010.11929", "vit-4-w32",
    ),
}  # fmt: skip

LARGEST = 10_000  # depth and width; beyond it there are slips of the hand
_NUMBER = "0|[1-9][0-9]*"  # one way to write each, so that one network has one name
_NAME = re.compile(rf"(?P<family>.+)-(?P<depth>{_NUMBER})-w(?P<width>{_NUMBER})")


@dataclass(frozen=True)
class Architecture:
    """A network up to its image shape and number of classes; `str` gives the name that `parse` reads."""

    family: str
    depth: int
    width: int

    def __str__(self) -> str:
        return f"{self.family}-{self.depth}-w{self.width}"

    def to_json(self, *, shape: tuple[int, int, int], classes: int) -> str:
        """Canonical JSON of all that `build` needs."""
        return json.dumps(asdict(self) | {"shape": list(shape), "classes": classes}, sort_keys=True)


def families() -> tuple[str, ...]:
    """The names of all families."""
    return tuple(FAMILIES)


def parse(name: str) -> Architecture:
    """The architecture that `name` ("resnet-20-w16") stands for.

    Raises:
        UnknownNameError: no such family.
        ConfigError: not of the form FAMILY-DEPTH-wWIDTH.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ConfigError(
            f"architecture {name!r} is not of the form FAMILY-DEPTH-wWIDTH; "
            f"write it like {', '.join(family.example for family in FAMILIES.values())}"
        )
    family, depth, width = match["family"], int(match["depth"]), int(match["width"])
    if family not in FAMILIES:
        raise unknown_name("architecture", name, [f"{known}-{depth}-w{width}" for known in FAMILIES])
    return Architecture(family, depth, width)


def build(architecture: Architecture | str, *, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The network, with torch's own initial weights, always the same ones: it is to be initialised.

    Args:
        architecture: or its name.
        shape: `(C, H, W)` of one image: channels, height, width.
        classes: number of logits.

    Raises:
        ConfigError: the depth, width or image size is impossible for the family; the message says what is possible.
        UnknownNameError: no such family.
    """
    if isinstance(architecture, str):
        architecture = parse(architecture)
    for name, value in (("depth", architecture.depth), ("width", architecture.width)):
        if not 1 <= value <= LARGEST:
            raise ConfigError(f"{architecture}: {name} must be at least 1 and at most {LARGEST}, as in resnet-8-w4")
    if classes < 2:
        raise ConfigError(f"{architecture}: a classifier needs at least 2 classes, got {classes}")
    if min(shape) < 1:
        raise ConfigError(f"{architecture}: image shape must be (channels, height, width), got {tuple(shape)}")
    # Constructors draw from the global random state: give them a state of their own.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return FAMILIES[architecture.family].build(architecture.depth, architecture.width, shape=shape, classes=classes)
